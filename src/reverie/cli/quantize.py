"""`reverie quantize`: the main job, from a trained network to a verified integer model."""

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.cli import _forecast
from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions, Settings, as_overrides, check_trained, overrides
from reverie.cli._output import say, say_json, say_table, say_wrapped
from reverie.cli._request import request as asked_for
from reverie.errors import ConfigError, at
from reverie.progress import choose

if TYPE_CHECKING:
    from reverie.images import Images
    from reverie.models import Network
    from reverie.pipeline import Run
    from reverie.recipe import Recipe

HELD_OUT = "held-out"
# Not a file but a choice among them (`best.py`).
_BEST = "best"
# From here down nearest rounding costs accuracy that learned rounding keeps.
_ROUNDING_MATTERS_BELOW = 8
# A loss of accuracy that is surely above this share is worth a look for its cause.
_WORTH_A_DIAGNOSIS = 0.01


def quantize(
    network: str,
    /,
    *,
    recipe: str | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    effective_bits: float | None = None,
    effective_activation_bits: float | None = None,
    placement: str | None = None,
    images: int | None = None,
    calibration: Path | None = None,
    capsule: Path | None = None,
    evaluate: str | None = None,
    unlabelled: Path | None = None,
    output: Path | None = None,
    seed: int | None = None,
    device: str = "cpu",
    budget: float | None = None,
    memory_limit: float | None = None,
    accept_changes: bool = False,
    dry_run: bool = False,
    log: tuple[str, ...] | None = None,
    settings: Settings = None,
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Quantize a trained network without its training data, export it, and prove and measure the result.

    Writes a run directory with the images, the packed network, network.onnx, metrics.json and report.html. The same
    command again, or `reverie resume` with the directory alone, goes on where a killed run stopped.

    Example: reverie quantize embedded:digits

    Example: reverie quantize embedded:digits --weight-bits 4 --evaluate held-out

    Example: reverie quantize timm:resnet18 --weight-bits 4 --dry-run

    Example: reverie quantize timm:resnet18 --recipe best --weight-bits 4 --activation-bits 4 --budget 10

    Example: reverie quantize timm:resnet18 --effective-bits 3.5

    Example: reverie quantize timm:resnet18 --recipe fdda --calibration one_image_a_class/

    Example: reverie quantize nets.py:resnet20 --weights resnet20.safetensors --input-size 32 --classes 10
    --mean 0.491,0.482,0.447 --std 0.247,0.243,0.262 --set synthesis.steps=500

    Args:
        network: Such as embedded:digits, timm:resnet18, torchvision:resnet50, package:mobilenet_v2,
            path/to/file.py:factory or path/to/network.onnx.
        recipe: A preset or a .toml file, or best for the preset that measured best for these bits, this network and --budget;
            `reverie recipe` lists the presets. Default: zeroq for 8-bit weights, adaround for fewer bits.
        weight_bits: Bits of a weight, 2 to 8; first and last layer have 8 unless --set quantization.end_bits=N.
        activation_bits: Bits of an activation, 2 to 8.
        effective_bits: Mixed precision: bits of a weight on average over all weights, 2 to 8. Each layer gets 2 to 8 bits, those
            that change the answers least in sum (extra `mixed`).
        effective_activation_bits: Likewise of an activation, on average over the values of one image.
        placement: integer (default: what an integer runtime executes) or literature (batch norm kept, all layers at the
            same bits, nothing exported: for comparison with papers).
        images: How many images to synthesize for calibration; 0 with --calibration uses real ones only.
        calibration: Folder (or .npz, .safetensors) of real images to use beside the synthetic ones; fdda needs one
            labelled image a class.
        capsule: File that `reverie capsule` wrote, for fdda without the images themselves, or for a network whose batch norms
            were folded.
        evaluate: Folder (or .npz, .safetensors) of labelled images to measure accuracy on, or held-out for the set that
            the network brings along.
        unlabelled: Folder (or .npz, .safetensors) of images to measure agreement with full precision on.
        output: The run directory; default runs/NETWORK-w4a8, with the network's name and the bits.
        seed: Of everything random.
        device: Where synthesis and rounding happen, such as cpu or cuda.
        budget: Minutes for the stages that learn (images, clipping, distillation, rounding). A few steps of each are timed
            first; what does not fit is shortened: all numbers of steps times one factor, but 10 at least, schedules in the same shape,
            never more steps than the recipe's. Loading, calibration, export and measuring come on top. The run keeps its
            numbers: the same command resumes with them.
        memory_limit: GiB that the run is to stay below; what it takes is estimated in advance, what reconstruction holds goes to the
            disk as far as needed, and what cannot fit is refused at once. The result is the same.
        accept_changes: Go on with an interrupted run although versions of libraries, threads or the processor are others; its
            bytes may then be others too.
        dry_run: Only say what would be done, in which stages, and what it would take in time and memory: a few steps of each stage
            are timed. The request is checked as far as it can be, and nothing is written.
        log: tensorboard (event files in the run directory) or mlflow: losses while it runs, and what came out; repeatable.
        settings: KEY=VALUE overrides any recipe key, such as synthesis.steps=100; repeatable, and wins over the flags.
        json: Print the metrics as one JSON document, and progress as JSON lines on standard error.
    """
    _check_alone("weight_bits", weight_bits, "effective_bits", effective_bits)
    _check_alone("activation_bits", activation_bits, "effective_activation_bits", effective_activation_bits)
    _check_mean("effective_bits", effective_bits)
    _check_mean("effective_activation_bits", effective_activation_bits)
    name, why = recipe_name(recipe, weight_bits if effective_bits is None else effective_bits, settings)
    wanted = overrides(
        settings,
        seed=seed,
        images=images,
        quantization__weight_bits=weight_bits,
        quantization__activation_bits=activation_bits,
        mixed_precision__effective_bits=effective_bits,
        mixed_precision__effective_activation_bits=effective_activation_bits,
        quantization__placement=placement,
        # Nothing executes the literature's placement, so there is nothing to export.
        export__method="none" if placement == "literature" else None,
    )
    from reverie import loggers, recipes
    from reverie.runs import check_output, default_output

    # What `best` chooses depends on the network, but not its bits, nor how images are made where the user says.
    early = ("quantization.", "mixed_precision.", "synthesis.method")
    sure = {"quantization.bias_correction": False} | {key: value for key, value in wanted.items() if key.startswith(early)}
    resolved = recipes.read("zeroq", sure) if name == _BEST else recipes.read(name, wanted)
    folder = output or default_output(network, *resolved.mean_bits)
    check_output(folder)
    used = [loggers.load(one) for one in log or ()]
    loaded = options.load(network)
    # Takes half a second to import, which no wrong recipe or network should wait for.
    from reverie import best, interrupts, pipeline, request, stages
    from reverie.synthesis._capsule import load_capsule

    shown = choose(sys.stderr, json)
    choice = None
    if name == _BEST and (choice := best.chosen_in(folder)) is None:
        labels = stages.reads_capsule(replace(resolved, images=wanted.get("images", 1))) and capsule is None
        choice = best.choose(
            loaded,
            wanted,
            calibration=read_images(calibration, loaded, require_labels=labels, option="--calibration"),
            capsule=None if capsule is None else load_capsule(capsule),
            minutes=budget,
            device=device,
            progress=shown,
        )
    if choice is not None:
        resolved = choice.recipe(wanted)
    given = {"calibrated": calibration is not None, "capsule": capsule is not None}
    request.check(resolved, loaded, device=device, budget=budget, **given)
    check_output(folder, request.identity(resolved, loaded), partial(request.recipe_changes, folder, resolved))
    centres = None if capsule is None else load_capsule(capsule)
    labels = stages.reads_labels(resolved, capsule=capsule is not None)
    real = read_images(calibration, loaded, require_labels=labels, option="--calibration")
    unseen = read_images(unlabelled, loaded, require_labels=False, option="--unlabelled")
    known = None if evaluate is None else labelled(evaluate, loaded)
    check_trained(network, loaded, options)
    places: dict[str, Path | str | None] = {"calibration": calibration, "capsule": capsule, "unlabelled": unlabelled}
    places["evaluation"] = evaluate if evaluate in (None, HELD_OUT) else Path(evaluate)
    asked = asked_for(
        "quantize",
        network,
        options,
        resolved,
        choice,
        places=places,
        device=device,
        budget=budget,
        memory_limit=memory_limit,
        log=list(log or ()),
    )
    if not json:
        named = "" if output else " (named after network and bits; --output overrides it)"
        say_wrapped(f"recipe {name}{why if choice is None else f': {choice.preset}'}; output {folder}{named}")
        bits_asked = any(bits is not None for bits in (weight_bits, activation_bits, effective_bits, effective_activation_bits))
        # A run says so at its end, with all that it found.
        for reason in choice.reasons if choice is not None and dry_run else ():
            say_wrapped(f"best: {reason}")
        for line in _chosen(resolved, loaded, real, known, bits_asked=bits_asked):
            say_wrapped(line)
    what: dict[str, Any] = {
        "calibration": real,
        "capsule": centres,
        "evaluation": known,
        "unlabelled": unseen,
        "device": device,
        "memory_limit": memory_limit,
    }
    if dry_run:
        from reverie.forecast import forecast

        expected = forecast(resolved, loaded, budget=budget, progress=shown, **what)
        weights, activations = resolved.mean_bits
        facts: dict[str, Any] = {"network": loaded.name, "recipe": name, "weight_bits": weights, "activation_bits": activations}
        facts["choice"] = None if choice is None else {"preset": choice.preset, "reasons": list(choice.reasons)}
        _forecast.show(expected, folder, facts, json=json)
        return
    with interrupts.heeded(shown.say), loggers.logged(shown, used, folder, loaded.name) as progress:
        run = pipeline.run(
            resolved,
            loaded,
            output=folder,
            budget=budget,
            choice=choice,
            request=asked,
            accept_changes=accept_changes,
            progress=progress,
            **what,
        )
        progress.result(run.metrics, recipes.tables(resolved))
    if json:
        say_json(run.metrics)
    else:
        show(run)


def _chosen(
    recipe: "Recipe", network: "Network", real: "Images | None", labelled: "Images | None", *, bits_asked: bool
) -> list[str]:
    """What the recipe decides that was perhaps not asked for, and which option decides it otherwise."""
    from reverie.stages import method_name, synthesizes

    parts = [f"{recipe.images} by {method_name(recipe)}"] if recipe.images else []
    parts += [f"{len(real)} real ones" if real is not None else "no real ones (--calibration adds some)"]
    if labelled is not None and labelled.labels is not None:
        accuracy = f"measured on {len(labelled)} labelled images"
    else:
        place = HELD_OUT if network.held_out is not None else "FOLDER"
        told = "estimated" if recipe.estimate_images and synthesizes(recipe) else "unknown"
        accuracy = f"{told}, as no labelled images were given (--evaluate {place} measures it)"
    return [
        f"bits: {_bits(recipe, asked=bits_asked)}",
        f"images: {', '.join(parts)}",
        f"accuracy: {accuracy}",
    ]


def _bits(recipe: "Recipe", *, asked: bool) -> str:
    mixed, settings, (weights, activations) = recipe.mixed_precision, recipe.quantization, recipe.mean_bits
    chosen = {"weights": mixed.chooses_weights, "activations": mixed.chooses_activations}
    ends = f", {settings.end_bits} in the first and last layer" if settings.placement == "integer" else ""
    if mixed.chooses:
        mean = f"W{weights:g}A{activations:g} on average"
        if mixed.bit_operations:
            limits = {"weights": mixed.effective_bits, "activations": mixed.effective_activation_bits}
            means = "".join(f", {bits:g} bits for {kind}" for kind, bits in limits.items() if bits)
            mean = f"at most {mixed.bit_operations:g} bit operations for a multiplication{means}, on average"
        which = " and ".join(kind for kind, is_chosen in chosen.items() if is_chosen)
        return f"{mean}, chosen tensor by tensor for {which}{'' if mixed.chooses_weights else ends}"
    whose = "as asked" if asked else "the recipe's; --weight-bits and --activation-bits override them"
    return f"W{weights:g}A{activations:g}{ends} ({whose})"


def _check_mean(name: str, mean: float | None) -> None:
    if mean == 0:
        raise ConfigError(f"--{name.replace('_', '-')} must be 2 to 8, got 0; leave it out for bits that are not chosen")


def _check_alone(name: str, bits: int | None, effective_name: str, effective: float | None) -> None:
    if bits is not None and effective is not None:
        raise ConfigError(
            f"--{effective_name.replace('_', '-')} must be without --{name.replace('_', '-')}, got {effective:g} and {bits}; "
            "leave one of them out"
        )


def recipe_name(recipe: str | None, weight_bits: int | float | None, settings: Settings) -> tuple[str, str]:
    """The recipe's name, and what to say about how it was chosen."""
    if recipe is not None:
        return recipe, ""
    given = as_overrides(settings)
    bits = given.get("mixed_precision.effective_bits") or given.get("quantization.weight_bits", weight_bits)
    operations = given.get("mixed_precision.bit_operations")
    if bits is None and isinstance(operations, (int, float)) and operations > 0:
        # Weights and activations share them out.
        bits = operations**0.5
    if isinstance(bits, (int, float)) and bits < _ROUNDING_MATTERS_BELOW:
        return "adaround", f" (chosen for weights below {_ROUNDING_MATTERS_BELOW} bits; --recipe overrides it)"
    return "zeroq", f" (chosen for {_ROUNDING_MATTERS_BELOW}-bit weights; --recipe overrides it)"


def read_images(place: Path | None, network: "Network", *, require_labels: bool, option: str) -> "Images | None":
    """The images at `place`, if one was given with `option`."""
    from reverie.images.folder import read_folder

    if place is None:
        return None
    with at(option):
        return read_folder(place, network.input, network.classes, require_labels=require_labels)


def labelled(place: str, network: "Network") -> "Images | None":
    """The labelled images at `place`, which may be the word for those that the network brings along."""
    if place != HELD_OUT:
        return read_images(Path(place), network, require_labels=True, option="--evaluate")
    if network.held_out is None:
        raise ConfigError(
            f"--evaluate {HELD_OUT}: the network must bring a labelled set along, got none with {network.name}; "
            "give a folder of labelled images"
        )
    return network.held_out()


def show(run: "Run") -> None:
    """Prints what a complete run measured, and what it wrote."""
    from reverie.report import outcome

    head, rows = outcome.table(run.metrics)
    say()
    say_table(head, rows, numbers=range(1, len(head)))
    say()
    for line in [outcome.headline(run.metrics), *outcome.notes(run.metrics)]:
        say_wrapped(line)
    files = sorted(path.name for path in run.path.iterdir() if not path.name.startswith("."))
    say_wrapped(f"files: {run.path}: {', '.join(files)}")
    say_wrapped(f"read: {run.path / 'report.html'} in a browser; README.md there says how to load the file")
    say_wrapped(f"next: {_next(run)}")


def _next(run: "Run") -> str:
    """The command that a person would most likely type now."""
    change = run.metrics["difference"].get("exported", run.metrics["difference"].get("quantized"))
    lost = None if change is None else -change["high"]
    path = shlex.quote(str(run.path))
    if (lost is not None and lost > _WORTH_A_DIAGNOSIS) or (run.metrics["estimate"] or {"low": 0})["low"] > _WORTH_A_DIAGNOSIS:
        return f"reverie diagnose {path} (which tensors lose the accuracy, and what helps)"
    if change is None and run.metrics["exported"] and run.metrics["latency_ms"] is not None:
        return f"reverie evaluate {path} --data FOLDER (accuracy, on labelled images of yours)"
    if run.metrics["latency_ms"] is not None:
        return f"reverie benchmark {path} (time and memory in every installed runtime)"
    return f"reverie diagnose {path} (which tensors lose most)"
