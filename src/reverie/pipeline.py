"""The table of contents: a network in, a verified integer model out.

    load -> capture -> synthesize -> place, calibrate, round, correct -> export -> verify -> measure -> report

Each stage is a function of what came before; what takes long keeps checkpoints, so that the same call again goes on
where a killed run stopped and ends with the same bytes.
"""

import copy
import hashlib
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from reverie.checkpoints import Folder, Forgetful
from reverie.errors import ConfigError
from reverie.export._packed import write_packed
from reverie.graph.capture import capture
from reverie.graph.equalize import equalize
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import Student, place
from reverie.graph.quantized import QuantizedNetwork, finish
from reverie.images import Images
from reverie.images.store import contact_sheet, load_images, save_images, save_pngs
from reverie.models import Network
from reverie.progress import Progress, Silent
from reverie.randomness import Seed
from reverie.recipe import Quantization, Recipe, to_toml
from reverie.recovery.bias_correction import correct_biases
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.recovery.reconstruction import round_weights
from reverie.report.fidelity import describe
from reverie.report.metrics import collect
from reverie.report.render import render
from reverie.runs import RunDirectory, atomic_json, atomic_text, default_output
from reverie.synthesis import Teacher, lacks_batch_norm

_IMAGE_SETS = ("images", "held-out")


@dataclass(frozen=True)
class Run:
    """One execution of a recipe: where its files are, and what it measured.

    Args:
        path: The run directory.
        metrics: What `metrics.json` holds.
    """

    path: Path
    metrics: dict[str, Any]

    @property
    def onnx(self) -> Path:
        """The exported model."""
        return self.path / "network.onnx"


def run(
    recipe: Recipe,
    network: Network,
    *,
    output: Path | str | None = None,
    calibration: Images | None = None,
    evaluation: Images | None = None,
    unlabelled: Images | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Run:
    """Quantizes `network` as `recipe` says, exports it, proves it, measures it, and writes the run directory.

    Args:
        output: The run directory; None means `runs/NETWORK-wNaN`. An interrupted run in it goes on, a complete one is answered.
        calibration: Real images in network input units, used beside the synthetic ones.
        evaluation: Labelled images for accuracy; nothing is tuned on them.
        unlabelled: Images for agreement.
        device: Where synthesis and rounding happen.

    Raises:
        ConfigError: The request is wrong, the output folder is not ours, no space is left.
        ModelError: The network cannot be captured, or lacks what the synthesis method reads.
        ExportError: The file could not be made, or ONNX Runtime does not compute what the student does.
    """
    progress = Silent() if progress is None else progress
    check(recipe, network, calibrated=calibration is not None, device=device)
    sets = {"calibration": calibration, "evaluation": evaluation, "unlabelled": unlabelled}
    bits = recipe.quantization
    folder = Path(output or default_output(network.name, bits.weight_bits, bits.activation_bits))
    with _working_in(folder, recipe, network, device, {name: _digest(part) for name, part in sets.items()}) as directory:
        if directory.is_complete:
            return Run(directory.path, json.loads((directory.path / "metrics.json").read_text()))
        progress.plan(_plan(recipe))
        with _timed(directory, "capture"):
            teacher = as_teacher(network, device)
        with _timed(directory, "synthesize"):
            images = _images(recipe, teacher, directory, "images", progress)
            held_out = _images(recipe, teacher, directory, "held-out", progress)
            if images is not None:
                write_images(images, teacher, directory.path, limit=32)
        parts = {_method(recipe): images, "real": calibration}
        used = {name: part for name, part in parts.items() if part is not None}
        everything = Images.concatenate(list(used.values()))

        with _timed(directory, "quantize"):
            reference, quantized, errors = quantize(recipe, teacher, everything, directory, progress)
        with _timed(directory, "export"):
            facts = {"reverie.network": network.name, "reverie.recipe": recipe.fingerprint}
            packed = directory.path / "network.safetensors"
            write_packed(quantized, packed, facts=facts)
            # It gets its name when it is proven.
            unproven = None if recipe.export is None else directory.checkpoint("network.onnx")
            if recipe.export is not None and unproven is not None:
                recipe.export(quantized, network.input.shape, unproven, facts=facts)
        with _timed(directory, "measure"):
            known = {"synthetic": held_out, "unlabelled": unlabelled, "evaluation": evaluation}
            seen = {name: part for name, part in known.items() if part is not None and len(part)}
            measured = collect(
                teacher.graph,
                reference,
                quantized,
                network.input.shape,
                seen or {"calibration": everything},
                onnx=unproven,
                packed=packed,
                float_file=directory.checkpoint("float.onnx"),
                progress=progress,
            )
            if unproven is not None:
                unproven.replace(directory.path / "network.onnx")
            about = _about(everything, teacher, {name: len(part) for name, part in used.items()})
        metrics = {
            **_facts(network),
            "quantization": asdict(recipe.quantization),
            "rounding_errors": {name: {"before": before, "after": after} for name, (before, after) in errors.items()},
            **measured,
            "images": about,
            **_cost(directory, device),
        }
        atomic_json(directory.path / "metrics.json", metrics)
        atomic_text(directory.path / "report.html", render(metrics, recipe, directory.record, directory.path))
        directory.complete()
        return Run(directory.path, metrics)


def run_synthesis(
    recipe: Recipe, network: Network, *, output: Path | str, device: str = "cpu", progress: Progress | None = None
) -> Run:
    """The recipe's images alone, with what is measured about them, in the folder `output`; arguments and errors as for `run`."""
    progress = Silent() if progress is None else progress
    if recipe.images == 0:
        raise ConfigError("images must be at least 1, got 0")
    check(recipe, network, calibrated=False, device=device)
    with _working_in(Path(output), recipe, network, device, {"only": "images"}) as directory:
        if directory.is_complete:
            return Run(directory.path, json.loads((directory.path / "metrics.json").read_text()))
        with _timed(directory, "capture"):
            teacher = as_teacher(network, device)
        with _timed(directory, "synthesize"):
            images = _images(recipe, teacher, directory, "images", progress)
            assert images is not None
            write_images(images, teacher, directory.path, limit=None)
        about = _about(images, teacher, {_method(recipe): len(images)})
        metrics = {**_facts(network), "images": about, **_cost(directory, device)}
        atomic_json(directory.path / "metrics.json", metrics)
        directory.complete()
        return Run(directory.path, metrics)


@contextmanager
def _working_in(folder: Path, recipe: Recipe, network: Network, device: str, more: dict[str, str]) -> Iterator[RunDirectory]:
    """The run directory, opened for this recipe and network (and what `more` identifies), its recipe and facts written."""
    with RunDirectory.open(folder, identity(recipe, network) | more) as directory:
        atomic_text(directory.path / "recipe.toml", to_toml(recipe))
        directory.note(network=network.name, options=network.options, seed=recipe.seed, device=device)
        yield directory


def _plan(recipe: Recipe) -> dict[str, float]:
    """The stages that take time, with relative costs as seen on small networks."""
    plan = {"synthesize": 6.0, "calibrate": 0.5}
    if recipe.rounding.learned:
        plan["round"] = 6.0
    if recipe.quantization.bias_correction:
        plan["correct biases"] = 0.5
    return plan | {"evaluate": 2.0}


def identity(recipe: Recipe, network: Network) -> dict[str, str]:
    """What, besides the user's images, tells one run from another."""
    contract = hashlib.sha256(repr((network.input, network.classes)).encode()).hexdigest()[:16]
    return {"recipe": recipe.fingerprint, "network": network.fingerprint, "input": contract}


def check(recipe: Recipe, network: Network, *, calibrated: bool, device: str) -> None:
    """Refuses, before anything expensive, what is bound to fail later; `calibrated` tells whether there are real images."""
    _check_device(device)
    if recipe.images == 0 and not calibrated:
        raise ConfigError("images must be at least 1 without --calibration, got 0; give a folder of images or synthesize some")
    if recipe.quantization.placement == "literature" and recipe.export is not None:
        raise ConfigError(
            "the literature placement must not be exported, got export = "
            f"{type(recipe.export).__name__.lower()!r}; it is for comparison with papers: use --set export.method=none"
        )
    synthesizes = recipe.images > 0 or recipe.held_out > 0
    # Running statistics are buffers. With some, only the captured graph can tell whether a batch norm reads them.
    if synthesizes and recipe.synthesis.needs_batch_norm and not list(network.module.buffers()):
        raise lacks_batch_norm(network.name, _method(recipe))


def as_teacher(network: Network, device: str = "cpu") -> Teacher:
    """The captured full-precision network, on `device`."""
    here = next((tensor.device for tensor in network.module.state_dict().values()), torch.device("cpu"))
    # Moved before it is captured: a tensor that forward makes on the weights' device is a constant of the graph.
    module = network.module if here == torch.device(device) else copy.deepcopy(network.module).to(device)
    graph = capture(module, network.input.shape, name=network.name)
    return Teacher(graph, network.input, network.classes, network.name, network.fingerprint)


def synthesize(recipe: Recipe, teacher: Teacher, count: int, *, seed: Seed, folder: Path | None, progress: Progress) -> Images:
    """`count` images by the recipe's method, with the teacher's answers and their provenance."""
    checkpoints = Forgetful() if folder is None else Folder(folder)
    images = recipe.synthesis(teacher, count, seed=seed, checkpoints=checkpoints, progress=progress)
    provenance = {
        "method": _method(recipe),
        "recipe": recipe.fingerprint,
        "seed": str(recipe.seed),
        "network": f"{teacher.name} {teacher.fingerprint}",
    }
    return Images(
        inputs=images.inputs,
        labels=images.labels,
        logits=teacher.logits(images.inputs),
        sources=images.sources,
        provenance=provenance,
    )


def write_images(images: Images, teacher: Teacher, path: Path, *, limit: int | None) -> None:
    """The first `limit` images (None: all) as PNG and a contact sheet of the first 64, in the folder `images` below `path`."""
    (path / "images").mkdir(exist_ok=True)
    save_pngs(images, teacher.input, path / "images", limit=limit)
    contact_sheet(images, teacher.input, path / "images" / "contact_sheet.png", columns=8, limit=64)


def student_of(graph: fx.GraphModule, settings: Quantization) -> tuple[fx.GraphModule, Student]:
    """The full-precision graph that a student is compared with (folded and equalized if asked), and the student."""
    reference = fold_batch_norms(graph) if settings.placement == "integer" else graph
    if settings.equalize:
        reference = equalize(reference)
    return reference, place(
        reference,
        settings.placement,
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
        end_bits=settings.end_bits,
    )


def quantize(
    recipe: Recipe, teacher: Teacher, images: Images, directory: RunDirectory, progress: Progress
) -> tuple[fx.GraphModule, QuantizedNetwork, dict[str, tuple[float, float]]]:
    """The reference graph, the integer model, and what learned rounding did to each unit's error."""
    reference, student = student_of(teacher.graph, recipe.quantization)
    inputs = images.inputs.to(teacher.device)
    calibrate_activations(reference, student, inputs, recipe.activations, batch=64, progress=progress)
    calibrate_weights(student, recipe.weights)
    errors = round_weights(
        reference,
        student,
        inputs,
        recipe.rounding,
        recipe.reconstruction,
        seed=Seed(recipe.seed, ("round",)),
        checkpoints=Folder(directory.checkpoint("rounding")),
        progress=progress,
    )
    if recipe.quantization.bias_correction:
        correct_biases(reference, student, inputs, progress=progress)
    return reference, finish(student), errors


def _images(recipe: Recipe, teacher: Teacher, directory: RunDirectory, name: str, progress: Progress) -> Images | None:
    count = recipe.images if name == "images" else recipe.held_out
    if not count:
        return None
    file = directory.path / "images.safetensors" if name == "images" else directory.checkpoint("held-out.safetensors")
    if directory.done(name) and file.is_file():
        return load_images(file)
    began = time.perf_counter()
    folder = directory.checkpoint(name)
    seed = Seed(recipe.seed, (name,))
    images = synthesize(recipe, teacher, count, seed=seed, folder=folder, progress=progress)
    file.parent.mkdir(exist_ok=True)
    save_images(images, file)
    directory.finish(name, time.perf_counter() - began)
    return images


@contextmanager
def _timed(directory: RunDirectory, stage: str) -> Iterator[None]:
    """Records how long what happens inside takes."""
    began = time.perf_counter()
    yield
    directory.finish(stage, time.perf_counter() - began)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # An AssertionError where torch was built without CUDA.
        raise ConfigError(f"device must be one that PyTorch can use here, got {device!r}; use 'cpu'") from error


def _facts(network: Network) -> dict[str, Any]:
    return {"network": {"name": network.name, "fingerprint": network.fingerprint, "classes": network.classes}}


def _about(images: Images, teacher: Teacher, source: dict[str, int]) -> dict[str, Any]:
    return {"count": len(images), "source": source, "diversity": describe(teacher, images)}


def _cost(directory: RunDirectory, device: str) -> dict[str, Any]:
    """Seconds by stage, of all processes that worked on the run, and this one's peak memory."""
    # The two sets of images are parts of the stage that makes them.
    stages = {name: facts["seconds"] for name, facts in directory.record["stages"].items() if name not in _IMAGE_SETS}
    return {"seconds": stages, "peak_memory_bytes": peak_memory(device)}


def _method(recipe: Recipe) -> str:
    """The name of the recipe's synthesis method."""
    return type(recipe.synthesis).__module__.rpartition(".")[2]


def _digest(images: Images | None) -> str:
    """What tells two sets of images apart, labels included."""
    if images is None:
        return "none"
    digest = hashlib.sha256(images.inputs.contiguous().numpy().data)
    if images.labels is not None:
        digest.update(images.labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def peak_memory(device: str) -> int:
    """Bytes: the process's largest resident size, plus what a GPU held."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return own + (int(torch.cuda.max_memory_allocated()) if device.startswith("cuda") else 0)
