"""The table of contents: a network in, a verified integer model out.

    load -> capture -> synthesize -> place, calibrate, distil, round, correct -> export -> verify -> measure -> report

Each stage is a function of what came before; what takes long keeps checkpoints, so that the same call again goes on
where a killed run stopped and ends with the same bytes.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from reverie import memory, runtimes
from reverie.attempt import checkpoints_of, complete, finished, free_if_refused, timed, within, working_in
from reverie.best import Choice
from reverie.errors import ConfigError
from reverie.export._packed import write_packed
from reverie.files import atomic_json
from reverie.graph.placement import Student
from reverie.graph.quantized import QuantizedNetwork, finish
from reverie.images import Images
from reverie.images.store import load_images, save_images, show_images
from reverie.models import Network
from reverie.progress import Progress, Renamed, Silent
from reverie.randomness import Seed
from reverie.recipe import Recipe
from reverie.recipes import fingerprint
from reverie.recovery.batch_norm_adaptation import adapt_batch_norms
from reverie.recovery.bias_correction import correct_biases
from reverie.recovery.clipping import clip_activations, excite
from reverie.recovery.distillation import distil
from reverie.recovery.mixed_precision import Decision
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.recovery.reconstruction import round_weights
from reverie.report import card, details, gallery, losses
from reverie.report.measure import peak_memory
from reverie.report.metrics import collect
from reverie.report.render import render
from reverie.request import check
from reverie.runs import RunDirectory, default_output
from reverie.stages import (
    TITLES,
    answered,
    as_teacher,
    check_captured,
    decide_bits,
    estimating,
    learned_from,
    method_name,
    plan,
    rounded_on,
    share_weights,
    source_of,
    student_of,
    synthesize,
    views,
    with_capsule,
)
from reverie.synthesis import Teacher
from reverie.synthesis._capsule import Capsule, save_capsule

_IMAGE_SETS = ("images", "held-out", "estimate")


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
        """The exported model, where the recipe's target is `onnx`."""
        return self.path / "network.onnx"


def run(
    recipe: Recipe,
    network: Network,
    *,
    output: Path | str | None = None,
    calibration: Images | None = None,
    capsule: Capsule | None = None,
    evaluation: Images | None = None,
    unlabelled: Images | None = None,
    device: str = "cpu",
    budget: float | None = None,
    choice: Choice | None = None,
    request: dict[str, Any] | None = None,
    accept_changes: bool = False,
    memory_limit: float | None = None,
    progress: Progress | None = None,
) -> Run:
    """Quantizes `network` as `recipe` says, exports it, proves it, measures it, and writes the run directory.

    Args:
        output: The run directory; None means `runs/NETWORK-wNaN`. An interrupted run in it goes on, a complete one is answered.
        calibration: Real images in network input units, used beside the synthetic ones.
        capsule: What real images told about each class, for the methods that need it; None makes it of `calibration`.
        evaluation: Labelled images for accuracy; nothing is tuned on them.
        unlabelled: Images for agreement.
        device: Where synthesis and rounding happen.
        budget: Minutes that the stages that learn may take (`budget.py`); None for the recipe's own steps.
        choice: How the recipe was chosen (`best.py`), for the report.
        request: The command line that asks for this run, by which `reverie resume` can repeat it.
        accept_changes: Go on with other versions or threads than the run began with; its bytes are then those of no other run.
        memory_limit: GiB that the run is to stay below, as far as that is known in advance; the result is the same.

    Raises:
        ConfigError: The request is wrong, the output folder is not ours, no space is left.
        ModelError: The network cannot be captured, or lacks what the synthesis method reads.
        ExportError: The file could not be made, or ONNX Runtime does not compute what the student does.
        DivergenceError: Training went out of hand; what was learned before is kept.
    """
    progress = Silent() if progress is None else progress
    check(recipe, network, calibrated=calibration is not None, capsule=capsule is not None, device=device, budget=budget)
    sets = {"calibration": calibration, "evaluation": evaluation, "unlabelled": unlabelled}
    labelled = evaluation is not None and evaluation.labels is not None and len(evaluation) > 0
    minutes = {"budget": "none" if budget is None else f"{budget:g} min"}
    folder = Path(output or default_output(network.name, *recipe.mean_bits))
    asked: dict[str, Any] = {"request": request, "accept_changes": accept_changes}
    asked["facts"] = {} if choice is None else {"choice": asdict(choice)}
    with working_in(folder, recipe, network, device, sets, capsule, minutes, **asked) as directory:
        if directory.is_complete:
            progress.say(f"{directory.path}: complete already, nothing was done; its figures are those of then")
            return Run(directory.path, finished(directory))
        recorded = losses.Recorder(directory.checkpoint("losses.json"), progress)
        with timed(directory, "capture"):
            with free_if_refused(directory):
                teacher = with_capsule(as_teacher(network, device), recipe, calibration, capsule)
                small, learning = views(recipe, teacher)
                check_captured(recipe, teacher)
                needed = memory.estimate(recipe, teacher, sets)
                lean, needed = memory.limited(recipe, needed, memory_limit)
            progress.say(needed.told())
            if teacher.capsule is not None:
                save_capsule(teacher.capsule, directory.path / "capsule.safetensors")
        if budget is not None:
            recipe = within(budget, recipe, teacher, calibration, directory, progress)
            lean = replace(recipe, reconstruction=replace(recipe.reconstruction, cache_gib=lean.reconstruction.cache_gib))
        progress.plan(plan(recipe, labelled=labelled, batch_norms=bool(teacher.batch_norms)))
        with timed(directory, "synthesize"):
            images = _images(recipe, small, directory, "images", recipe.images, recorded)
            held_out = _images(recipe, teacher, directory, "held-out", recipe.held_out, progress)
            foreign = None
            if teacher.batch_norms and not labelled:
                foreign = _images(estimating(recipe), teacher, directory, "estimate", recipe.estimate_images, progress)
            if images is not None:
                network.check_reference(images, "synthesized images")
                show_images(images, small.input, directory.path, limit=32)
            shown = None if images is None else learned_from(recipe, teacher, images)
        parts = {method_name(recipe): shown, "real": answered(calibration, learning)}
        used = {name: part for name, part in parts.items() if part is not None}

        with timed(directory, "quantize"):
            reference, quantized, learned = quantize(lean, teacher, used, directory, recorded)
        with timed(directory, "export"):
            facts = {"reverie.network": network.name, "reverie.recipe": fingerprint(recipe)}
            packed = directory.path / "network.safetensors"
            write_packed(quantized, packed, facts=facts)
            unproven = None if recipe.export is None else directory.checkpoint(recipe.export.filename)
            if recipe.export is not None and unproven is not None:
                with progress.stage("export", total=1) as step:
                    recipe.export(quantized, network.input.shape, unproven, facts=facts)
                    step()
        with timed(directory, "measure"):
            known = {"synthetic": held_out, "unlabelled": unlabelled, "evaluation": evaluation}
            seen = {name: part for name, part in known.items() if part is not None and len(part)}
            if not seen:
                seen = {"calibration": calibration or Images.concatenate(list(used.values())).resized(*network.input.shape[1:])}
            measured = collect(
                teacher.graph,
                reference,
                quantized,
                network.input.shape,
                seen,
                foreign=foreign,
                exported=unproven,
                exporter=recipe.export,
                packed=packed,
                float_file=directory.checkpoint("float.onnx"),
                progress=progress,
            )
            # It gets its name now that it is proven.
            for part in () if unproven is None else reversed(runtimes.parts(unproven)):
                part.replace(directory.path / part.name)
            made = {} if images is None else {method_name(recipe): images}
            with progress.stage("report", total=1):
                about = gallery.about(used | made, small, evaluation or calibration, directory.path)
                about |= {"mosaics": {name: len(used[name]) for name in made}} if recipe.mosaic else {}
                details.describe(directory.path, reference, quantized, seen)
                # Whoever asks to stop now is answered by the end: the proven file has its name, and would be made again.
                progress.advance()
        metrics = {
            **_facts(network),
            "quantization": asdict(recipe.quantization),
            **({} if choice is None else {"choice": list(choice.reasons)}),
            **({} if budget is None else {"budget": directory.record["facts"]["budget"]}),
            **learned,
            **measured,
            "images": about,
            "real_images": directory.record["facts"]["real_images"],
            "estimated_memory_bytes": needed.peak,
            **_cost(directory, device),
        }
        pages = {
            "report.html": render(metrics, recipe, directory.record, directory.path),
            "README.md": card.render(network, metrics, recipe, directory.record),
        }
        complete(directory, metrics, pages)
        return Run(directory.path, metrics)


def run_synthesis(
    recipe: Recipe,
    network: Network,
    *,
    output: Path | str,
    calibration: Images | None = None,
    capsule: Capsule | None = None,
    device: str = "cpu",
    request: dict[str, Any] | None = None,
    accept_changes: bool = False,
    memory_limit: float | None = None,
    progress: Progress | None = None,
) -> Run:
    """The recipe's images alone, with what is measured about them, in the folder `output`; arguments and errors as for `run`.

    Real images given as `calibration` are what a capsule is made of, and what the synthetic ones are compared with.
    """
    progress = Silent() if progress is None else progress
    if recipe.images == 0:
        raise ConfigError("images must be at least 1, got 0")
    check(recipe, network, calibrated=calibration is not None, capsule=capsule is not None, device=device)
    only = {"only": "images"}
    asked: dict[str, Any] = {"request": request, "accept_changes": accept_changes, "facts": {}}
    with working_in(Path(output), recipe, network, device, {"calibration": calibration}, capsule, only, **asked) as directory:
        if directory.is_complete:
            progress.say(f"{directory.path}: complete already, nothing was done; its figures are those of then")
            return Run(directory.path, finished(directory))
        with timed(directory, "capture"), free_if_refused(directory):
            teacher = with_capsule(as_teacher(network, device), recipe, calibration, capsule)
            small, _ = views(recipe, teacher)
            needed = memory.estimate_images_alone(recipe, teacher, {"calibration": calibration})
            memory.limited(recipe, needed, memory_limit)
        progress.say(needed.told())
        with timed(directory, "synthesize"):
            recorded = losses.Recorder(directory.checkpoint("losses.json"), progress)
            images = _images(recipe, small, directory, "images", recipe.images, recorded)
            assert images is not None
            network.check_reference(images, "synthesized images")
            show_images(images, small.input, directory.path, limit=None)
        about = gallery.about({method_name(recipe): images}, small, calibration, directory.path)
        read = directory.record["facts"]["real_images"]
        metrics = {**_facts(network), "images": about, "real_images": read, **_cost(directory, device)}
        details.add(directory.path, losses=losses.read(directory.checkpoint("losses.json")))
        complete(directory, metrics, {"report.html": render(metrics, recipe, directory.record, directory.path)})
        return Run(directory.path, metrics)


def quantize(
    recipe: Recipe, teacher: Teacher, images: dict[str, Images], directory: RunDirectory, progress: Progress
) -> tuple[fx.GraphModule, QuantizedNetwork, dict[str, Any]]:
    """The reference graph, the integer model, and what is to be told about how it was learned.

    Args:
        images: The sets by name; "real" are the user's own.
    """
    settings = recipe.quantization
    reference, student = student_of(teacher.graph, settings, recipe.bits)
    few = {name: part.evenly(recipe.calibration_images) for name, part in rounded_on(recipe, images).items()}
    inputs = torch.cat([part.inputs for part in few.values()]).to(teacher.device)
    checkpoints, seed = checkpoints_of(directory), Seed(recipe.seed)
    learned: dict[str, Any] = {"calibration": {name: len(part) for name, part in few.items()}}
    if recipe.mixed_precision.chooses:
        decision = _decision(recipe, teacher, reference, student, inputs, directory, progress)
        reference, student = student_of(teacher.graph, settings, decision.bits)
        learned["mixed_precision"] = decision.as_dict()
    if recipe.clipping.images:
        parts = checkpoints.at("excited")
        excited = excite(teacher, recipe.clipping, seed=seed.at("excite"), checkpoints=parts, progress=progress)
        clip_activations(reference, student, excited.to(teacher.device), recipe.clipping, progress=progress)
    else:
        calibrate_activations(reference, student, inputs, recipe.activations, batch=64, progress=progress)
    calibrate_weights(student, recipe.weights)
    if recipe.distils_after("calibration"):
        if settings.batch_norm_adaptation:
            adapt_batch_norms(reference, student, inputs, fix_codes=False, progress=progress)
        learned["distillation"] = _distilled(recipe, teacher, student, images, directory, progress)
    errors = round_weights(
        reference,
        student,
        inputs,
        recipe.rounding,
        recipe.reconstruction,
        weights=share_weights(recipe, few),
        seed=seed.at("round"),
        checkpoints=checkpoints.at("rounding"),
        progress=progress,
    )
    learned["rounding_errors"] = {name: {"before": before, "after": after} for name, (before, after) in errors.items()}
    if settings.batch_norm_adaptation and not recipe.distils_after("calibration"):
        adapt_batch_norms(reference, student, inputs, progress=progress)
    if recipe.distils_after("rounding"):
        learned["distillation"] = _distilled(recipe, teacher, student, images, directory, progress)
    if settings.bias_correction:
        correct_biases(reference, student, inputs, progress=progress)
    return reference, finish(student), learned


def _distilled(
    recipe: Recipe,
    teacher: Teacher,
    student: Student,
    images: dict[str, Images],
    directory: RunDirectory,
    progress: Progress,
) -> dict[str, Any]:
    """Distils, and gives what is to be told about it."""
    checkpoints = checkpoints_of(directory)
    source, composition = source_of(recipe, teacher, images, checkpoints, progress)
    parts = checkpoints.at("distillation")
    distil(teacher.graph, student, source, recipe.distillation, checkpoints=parts, progress=progress)
    return asdict(recipe.distillation) | {"images_of_a_step": composition}


def _decision(
    recipe: Recipe,
    teacher: Teacher,
    reference: fx.GraphModule,
    student: Student,
    inputs: Tensor,
    directory: RunDirectory,
    progress: Progress,
) -> Decision:
    """The bits of every tensor, as the first process of the run that came so far chose them."""
    file = directory.checkpoint("bits.json")
    if directory.sealed(file):
        return Decision.from_dict(json.loads(file.read_text()))
    decision = decide_bits(recipe, teacher, reference, student, inputs, progress)
    atomic_json(file, decision.as_dict())
    directory.seal(file)
    return decision


def _images(
    recipe: Recipe, teacher: Teacher, directory: RunDirectory, name: str, count: int, progress: Progress
) -> Images | None:
    if not count:
        return None
    file = directory.path / "images.safetensors" if name == "images" else directory.checkpoint(f"{name}.safetensors")
    if directory.done(name) and directory.sealed(file):
        return load_images(file)
    began, shown = time.perf_counter(), Renamed(progress, TITLES.get(name, {}))
    images = synthesize(recipe, teacher, count, name, checkpoints_of(directory), shown)
    save_images(images, file)
    directory.finish(name, time.perf_counter() - began, file)
    return images


def _facts(network: Network) -> dict[str, Any]:
    return {"network": {"name": network.name, "fingerprint": network.fingerprint, "classes": network.classes}}


def _cost(directory: RunDirectory, device: str) -> dict[str, Any]:
    """Seconds by stage, of all processes that worked on the run, and this one's peak memory."""
    # The sets of images are parts of the stage that makes them.
    stages = {name: facts["seconds"] for name, facts in directory.record["stages"].items() if name not in _IMAGE_SETS}
    return {"seconds": stages, "peak_memory_bytes": peak_memory(device)}
