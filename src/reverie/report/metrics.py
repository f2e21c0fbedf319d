"""The numbers of a run, gathered: what `metrics.json` holds beside the images and the times.

Full precision is the captured network, `quantized` the fake-quantized student, `exported` the file in ONNX Runtime; all
three see the same images in the same order.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.export import _verify as verify
from reverie.export.onnx import export_float
from reverie.graph.quantized import QuantizedNetwork
from reverie.images import Images
from reverie.progress import Progress
from reverie.report.measure import accuracy, agreement, latency, paired_interval

# Codes of every tensor are compared on so many images; more would only repeat the same arithmetic.
_PARITY_IMAGES = 64


def collect(
    teacher: fx.GraphModule,
    reference: fx.GraphModule,
    quantized: QuantizedNetwork,
    shape: tuple[int, int, int],
    sets: dict[str, Images],
    path: Path,
    float_file: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Accuracy, agreement, parity, size and latency.

    Args:
        sets: "synthetic" (held out), "unlabelled" and "evaluation", as far as there are any.
        path: The run directory; holds `network.onnx` unless nothing was exported.
        float_file: Where the full-precision ONNX file to compare with may be written.

    Raises:
        ExportError: ONNX Runtime does not compute what the student does.
    """
    onnx = path / "network.onnx"
    exported = onnx.is_file()
    found: dict[str, Any] = {name: {"top1": None} for name in ("full_precision", "quantized", "exported")}
    found |= {"difference": {}, "agreement": {}, "parity": None, "bytes": {}, "latency_ms": None}
    if exported:
        session = verify.open_session(onnx, threads=torch.get_num_threads())
        probes = torch.cat([part.inputs[: max(1, _PARITY_IMAGES // len(sets))] for part in sets.values()]) if sets else None
        if probes is not None:
            parity = verify.measure_parity(quantized, onnx, probes, threads=torch.get_num_threads())
            verify.assert_parity(parity)
            found["parity"] = asdict(parity)
        found["float_layers"] = verify.float_layers(onnx, quantized.layers)
    steps = sum(-(-len(part) // _BATCH) for part in sets.values())
    with progress.stage("evaluate", total=max(1, steps)) as step:
        for name, part in sets.items():
            answers = {"full_precision": [], "quantized": [], "exported": []}  # type: dict[str, list[Tensor]]
            for inputs in torch.split(part.inputs, _BATCH):
                answers["full_precision"].append(_predict(teacher, inputs))
                answers["quantized"].append(_predict(quantized.graph, inputs))
                if exported:
                    answers["exported"].append(verify.predict(session, inputs, batch=_BATCH))
                step()
            classes = {key: torch.cat(parts).argmax(dim=1) for key, parts in answers.items() if parts}
            found["agreement"][name] = {"images": len(part)} | {
                key: agreement(classes["full_precision"], classes[key]) for key in classes if key != "full_precision"
            }
            if name == "evaluation" and part.labels is not None:
                right = {key: predicted == part.labels for key, predicted in classes.items()}
                for key, predicted in classes.items():
                    found[key] = {"top1": accuracy(predicted, part.labels), "images": len(part)}
                    if key != "full_precision":
                        found["difference"][key] = list(paired_interval(right[key], right["full_precision"]))
    found["bytes"] = {"network": (path / "network.safetensors").stat().st_size}
    if exported:
        export_float(reference, shape, float_file)
        found["bytes"] |= {"fp32": float_file.stat().st_size, "packed": onnx.stat().st_size}
        times = latency({"fp32": float_file, "quantized": onnx}, shape, batch=1, threads=torch.get_num_threads(), repeats=50)
        found["latency_ms"] = {name: asdict(value) for name, value in times.items()}
    return found


_BATCH = 128


@torch.inference_mode()
def _predict(graph: fx.GraphModule, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
    device = next((tensor.device for tensor in graph.buffers()), inputs.device)
    fast = inputs.to(device).contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs.to(device)
    answer: Tensor = graph(fast)
    return answer.cpu()
