"""The numbers of a run, gathered: what `metrics.json` holds beside the images and the times.

Full precision is the captured network, `quantized` the student executed on codes, `exported` the file in the runtime that it
is made for; all three see the same images in the same order.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx
from torch.nn import functional

from reverie import runtimes
from reverie.export import Exporter
from reverie.export import _verify as verify
from reverie.export._certificate import certify
from reverie.graph.integer import as_integers
from reverie.graph.quantized import QuantizedNetwork
from reverie.images import Images
from reverie.progress import Progress
from reverie.report import by_class
from reverie.report.estimate import CALIBRATED, distances
from reverie.report.measure import accuracy, agreement, latency, paired_interval, sizes

# Codes of every tensor are compared on so many images; more would only repeat the same arithmetic.
_PARITY_IMAGES = 64
BATCH = 64


def collect(
    teacher: fx.GraphModule,
    reference: fx.GraphModule,
    quantized: QuantizedNetwork,
    shape: tuple[int, int, int],
    sets: dict[str, Images],
    *,
    exported: Path | None,
    exporter: Exporter | None,
    packed: Path,
    float_file: Path,
    foreign: Images | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Accuracy, or the estimate of its drop, agreement, parity, size and latency.

    Args:
        sets: Images by what they are; those named "evaluation" have labels.
        foreign: Images to estimate the drop of accuracy on (`estimate.py`), if it is to be.
        exported: The exported model, if there is one; it is given its certificate.
        exporter: What wrote it.
        packed: The native checkpoint.
        float_file: Where the full-precision ONNX file to compare with may be written.

    Raises:
        ConfigError: The runtime that the exporter names is not installed.
        ExportError: It does not compute what the student does, or computes a layer in float.
    """
    found: dict[str, Any] = {name: {"top1": None} for name in ("full_precision", "quantized", "exported")}
    found |= {
        "difference": {},
        "agreement": {},
        "divergence": {},
        "parity": None,
        "certificate": None,
        "bytes": {},
        "latency_ms": None,
        "estimate": None,
    }
    threads = torch.get_num_threads()
    if exported is not None and exporter is not None:
        own = runtimes.load(exporter.runtime)
        session = own.open(exported, threads=threads)
        probes = torch.cat([part.inputs[: max(1, _PARITY_IMAGES // len(sets))] for part in sets.values()])
        with progress.stage("verify", total=1) as step:
            parity, found["certificate"] = certify(
                quantized, exported, probes, exporter.runtime, checkpoint=packed, threads=threads
            )
            if exporter.device is None:
                verify.assert_integer(exported, quantized, runtime=own)
            step()
        found["parity"] = asdict(parity)
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "full_precision": partial(predict, teacher),
        "quantized": partial(predict, as_integers(quantized)),
    }
    if exported is not None:
        models["exported"] = partial(verify.predict, session, batch=BATCH)
    steps = sum(-(-len(part) // BATCH) for part in sets.values()) + (foreign is not None)
    with progress.stage("evaluate", total=max(1, steps)) as step:
        for name, part in sets.items():
            scores = score(models, part, step)
            found["agreement"][name] = {"images": len(part)} | scores["agreement"]
            found["divergence"][name] = {"images": len(part)} | scores["divergence"]
            if name == "evaluation" and part.labels is not None:
                found |= {key: {"top1": value, "images": len(part)} for key, value in scores["top1"].items()}
                found |= {"difference": scores["difference"], "by_class": scores["by_class"]}
        if foreign is not None:
            best = models["quantized" if exported is None else "exported"]
            answers = (
                torch.cat([model(part) for part in torch.split(foreign.inputs, BATCH)])
                for model in (models["full_precision"], best)
            )
            found["estimate"] = asdict(CALIBRATED(distances(*answers)))
            step()
    found["bytes"] = {"network": packed.stat().st_size}
    if exported is not None and exporter is not None:
        reads = own if float_file.suffix in own.reads else runtimes.load("onnxruntime")
        # It imports what the extra `onnx` brings.
        from reverie.export._onnx import export_float

        with progress.stage("time", total=1) as step:
            export_float(reference, shape, float_file)
            times = latency({"fp32": reads.open(float_file, threads=threads), "quantized": session}, shape)
            step()
        found["bytes"] |= sizes({"fp32": float_file, "packed": exported})
        found["latency_ms"] = {name: value.median for name, value in times.items()} | {
            "ratio": times["fp32"].median / times["quantized"].median,
            "quartiles": {name: [value.lower_quartile, value.upper_quartile] for name, value in times.items()},
        }
    return found


def score(
    models: Mapping[str, Callable[[Tensor], Tensor]], images: Images, step: Callable[..., None] = lambda: None
) -> dict[str, Any]:
    """How often `models` are right, and how far they are from the one named "full_precision".

    Args:
        models: Give logits for inputs.
        step: Is called after each of the batches of `BATCH`.

    Returns:
        By model `agreement` and `divergence` (KL of its answer from full precision's, in nats, mean over images); with labels `top1`
        too, `difference` from full precision with its 95 % interval, and `by_class` (`by_class.py`) of the last model.
    """
    answers: dict[str, list[Tensor]] = {name: [] for name in models}
    divergences = dict.fromkeys((name for name in models if name != "full_precision"), 0.0)
    for inputs in torch.split(images.inputs, BATCH):
        logits = {name: model(inputs) for name, model in models.items()}
        for name, answer in logits.items():
            answers[name].append(answer.argmax(dim=1))
        known = functional.log_softmax(logits["full_precision"], dim=1)
        for name in divergences:
            ours = functional.log_softmax(logits[name], dim=1)
            divergences[name] += float(functional.kl_div(ours, known, reduction="sum", log_target=True)) / len(images)
        step()
    classes = {name: torch.cat(parts) for name, parts in answers.items()}
    full = classes["full_precision"]
    others = {name: predicted for name, predicted in classes.items() if name != "full_precision"}
    scores: dict[str, Any] = {
        "agreement": {name: agreement(full, predicted) for name, predicted in others.items()},
        "divergence": divergences,
    }
    labels = images.labels
    if labels is not None:
        scores["top1"] = {name: accuracy(predicted, labels) for name, predicted in classes.items()}
        scores["difference"] = {
            name: paired_interval(predicted == labels, full == labels)._asdict() for name, predicted in others.items()
        }
        scores["by_class"] = by_class.describe(labels, full, list(others.values())[-1], logits["full_precision"].shape[1])
    return scores


@torch.inference_mode()
def predict(graph: fx.GraphModule, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
    """The logits of a captured graph, on the CPU."""
    device = next((tensor.device for tensor in graph.buffers()), inputs.device)
    fast = inputs.to(device).contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs.to(device)
    answer: Tensor = graph(fast)
    return answer.cpu()
