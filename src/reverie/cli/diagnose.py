"""`reverie diagnose`: which tensors lose the accuracy, why, and what helps."""

import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie import flags
from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions, Settings, read_recipe
from reverie.cli._output import say, say_json, say_table
from reverie.cli._runs import load_network, packed_file
from reverie.cli.quantize import recipe_name
from reverie.errors import ConfigError, at
from reverie.progress import Progress, choose

if TYPE_CHECKING:
    from reverie.images import Images
    from reverie.models import Network
    from reverie.recipe import Recipe
    from reverie.remedies import Treatment
    from reverie.report.diagnosis import Finding
    from reverie.report.tensor_errors import Errors
    from reverie.synthesis import Teacher

_WIDTH = 100
_WORST = 10
# At most so many images are looked at, and of large ones so many that a batch has as many pixels as this many of 64 x 64.
_IMAGES, _FEWEST = 64, 8
# Of fewer, the noise of their mean would hide what helps.
_FEWEST_JUDGES = 16


def diagnose(
    target: str,
    /,
    *,
    recipe: str | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    images: int | None = None,
    calibration: Path | None = None,
    fix: bool = False,
    output: Path | None = None,
    all: bool = False,
    network: str | None = None,
    device: str = "cpu",
    settings: Settings = None,
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Find the tensors that lose the accuracy, say why and what helps; with --fix, try what helps and write it as a recipe.

    Of a run, the very network that was quantized is looked at. Of a network, a student is calibrated as a recipe says, without
    the learning. Every tensor is put on its grid alone, and taken off it alone.

    Example: reverie diagnose runs/embedded-digits-w4a8

    Example: reverie diagnose embedded:digits --weight-bits 4 --activation-bits 4 --fix --output fixed.toml

    Args:
        target: A run directory that `reverie quantize` completed; or a network, such as embedded:digits, timm:resnet18,
            package:mobilenet_v2 or path/to/file.py:factory.
        recipe: Of a network: a preset or a .toml file. Default: as `reverie quantize` chooses.
        weight_bits: Of a network: bits of a weight, 2 to 8.
        activation_bits: Of a network: bits of an activation, 2 to 8.
        images: On how many images to look; a network's are synthesized. Default: a network's recipe says how many are made, and
            64 are looked at, or, of images larger than 64 x 64, fewer, but at least 8.
        calibration: Folder (or .npz, .safetensors) of real images to look at instead of synthetic ones; with --fix every second
            one judges the remedies.
        fix: Try remedies, each judged by the divergence from full precision on synthetic images that nothing was calibrated
            on, and keep what helps by more than noise; more bits for the costliest tensors, which cost bytes, come last. Nothing
            is learned meanwhile, so it takes a minute, not many.
        output: With --fix: where the improved recipe goes; default fixed.toml.
        all: Show every tensor, not only the ten worst.
        network: Of a run: the full-precision network; default: the one that the run names.
        device: Where it happens, such as cpu or cuda.
        settings: Of a network: KEY=VALUE overrides any recipe key, such as activations.method=minmax; repeatable.
        json: Print what was found as one JSON document, and progress as JSON lines on standard error.
    """
    _check(target, output=output, fix=fix, images=images)
    run = Path(target) if Path(target).is_dir() else None
    given = {"recipe": recipe, "weight_bits": weight_bits, "activation_bits": activation_bits, "set": settings}
    if run is not None:
        packed, resolved = _of_run(run, {key: value for key, value in given.items() if value is not None})
        _check_images(run, calibration)
        loaded = load_network(run, network, options)
    else:
        name, why = recipe_name(recipe, weight_bits, settings)
        flags = {"quantization__weight_bits": weight_bits, "quantization__activation_bits": activation_bits}
        resolved = read_recipe(name, settings, **flags)
        loaded = options.load(target)
    # Takes half a second to import, which no wrong recipe or network should wait for.
    from reverie import remedies, request, stages
    from reverie.export._packed import restore, stored_bits
    from reverie.images.store import load_images
    from reverie.report import diagnosis, tensor_errors

    if run is None:
        # Nothing is exported, and what images need is checked below.
        request.check(replace(resolved, images=0, held_out=0, export=None), loaded, calibrated=True, device=device)
    else:
        stages.check_device(device)
    real = None if calibration is None else _read(calibration, loaded)
    teacher = stages.as_teacher(loaded, device)
    small, learning = stages.views(resolved, teacher)
    if real is None and (run is None or fix):
        _check_synthesis(resolved, teacher, whole=run is None)
    if run is None:
        stages.check_bits(resolved, teacher)
    progress = choose(sys.stderr, json)
    if run is None and not json:
        say(f"recipe {name}{why}")
        if remedies.learns(resolved):
            say("the student is calibrated only: bias correction stands in for what the recipe learns")
    more_images = False
    if real is not None:
        seen, held_out = _halves(real) if fix else (real, None)
        seen = seen.resized(*learning.input.shape[1:])
    else:
        held_out = None
        made = load_images(run / "images.safetensors") if run else _dreamt(resolved, small, images, progress)
        more_images = len(made) == resolved.images
        seen = stages.learned_from(resolved, teacher, made)
    if run is not None:
        bits = stored_bits(packed)
        reference, student = stages.student_of(teacher.graph, resolved.quantization, bits)
        quantized = restore(student, packed)
    else:
        bits = remedies.bits_of(resolved, teacher, seen, progress)
        reference, quantized = remedies.calibrated(resolved, teacher, seen, progress, bits=bits)
    few = seen.evenly(images or _enough(learning))
    errors = tensor_errors.measure(reference, quantized, few.inputs.to(device), progress=progress)
    findings = diagnosis.find(errors, reference, resolved)
    document: dict[str, Any] = {"network": loaded.name, "run": None if run is None else str(run), **asdict(errors)}
    document["findings"] = [asdict(finding) for finding in findings]
    if not json:
        _show(errors, findings, everything=all)
    if fix:
        file = output or Path("fixed.toml")
        if held_out is None:
            held_out = remedies.dream(resolved, teacher, max(_FEWEST_JUDGES, _enough(teacher)), "held-out", progress)
        found = remedies.treat(
            resolved,
            teacher,
            seen,
            held_out.inputs,
            remedies.remedies(resolved, teacher, errors, findings, more_images=more_images),
            bits=bits,
            more=lambda count: stages.learned_from(
                resolved, teacher, remedies.dream(resolved, small, count, "more", progress), "diagnose", "more"
            ),
            progress=progress,
        )
        command = _write(found, file, loaded, run)
        document["fix"] = _as_document(found, command)
        if not json:
            _show_treatment(found, file, command)
    elif findings and not json:
        say("--fix tries these and other remedies, and keeps what helps")
    if json:
        say_json(document)


def _check(target: str, *, output: Path | None, fix: bool, images: int | None) -> None:
    """Refuses what can be told from the command line alone."""
    if not Path(target).is_dir() and ":" not in target:
        raise ConfigError(
            f"{target}: must be a run directory or a network (SOURCE:NAME, or path/to/file.py:FACTORY), got neither; "
            "`reverie quantize` makes a run"
        )
    if images is not None and images < 2:
        raise ConfigError(f"--images must be at least 2, got {images}")
    if output is not None and not fix:
        raise ConfigError(f"--output must come with --fix, got {str(output)!r} alone; add --fix, or leave it out")
    file = output or Path("fixed.toml")
    if fix and file.suffix != ".toml":
        raise ConfigError(f"{file}: must end in .toml, got {file.suffix!r}; choose another --output")
    if fix and file.exists():
        raise ConfigError(f"{file}: must not exist yet, got a {'folder' if file.is_dir() else 'file'}; choose another --output")
    if fix and not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: must be in a folder that exists, got none; create it or choose another --output")


def _of_run(run: Path, given: dict[str, Any]) -> tuple[Path, "Recipe"]:
    """The packed network and the recipe of a run."""
    from reverie import recipes

    packed = packed_file(run)
    if given:
        flag = next(iter(given)).replace("_", "-")
        raise ConfigError(f"{run}: --{flag} must be left out for a run, whose own recipe counts; give the network instead")
    return packed, recipes.read(str(run / "recipe.toml"))


def _check_images(run: Path, calibration: Path | None) -> None:
    if calibration is None and not (run / "images.safetensors").is_file():
        raise ConfigError(f"{run}: must hold images.safetensors, got none; give --calibration with a folder of images")


def _check_synthesis(recipe: "Recipe", teacher: "Teacher", *, whole: bool) -> None:
    """Refuses a network that no images can be made of.

    Args:
        whole: Whether they are to be the recipe's own, and not only some to judge remedies on.
    """
    from reverie.stages import method_name

    cure = "give --calibration with a folder of images"
    if whole and not recipe.images:
        raise ConfigError(f"images must be at least 1 without --calibration, got 0; {cure}")
    if whole and recipe.synthesis.needs_capsule:
        raise ConfigError(f"{teacher.name}: {method_name(recipe)} needs real images, got none; {cure}")
    if recipe.synthesis.needs_batch_norm and not teacher.batch_norms:
        raise ConfigError(f"{teacher.name}: {method_name(recipe)} needs a batch norm, got none in the network; {cure}")


def _read(place: Path, network: "Network") -> "Images":
    from reverie.images.folder import read_folder

    with at("--calibration"):
        return read_folder(place, network.input, network.classes, require_labels=False)


def _halves(images: "Images") -> tuple["Images", "Images"]:
    """Every second image, and the others."""
    from reverie.images import Images

    if len(images) < 4:
        raise ConfigError(f"--calibration: must hold at least 4 images for --fix, got {len(images)}; give more")
    first, second = (Images(inputs=images.inputs[start::2]) for start in (0, 1))
    return first, second


def _dreamt(recipe: "Recipe", teacher: "Teacher", count: int | None, progress: Progress) -> "Images":
    """The images that a run of the recipe would make, or fewer."""
    from reverie import stages
    from reverie.checkpoints import Forgetful

    return stages.synthesize(recipe, teacher, count or recipe.images, "images", Forgetful(), progress)


def _enough(teacher: "Teacher") -> int:
    """How many images tell enough within a minute or two."""
    return max(_FEWEST, min(_IMAGES, _IMAGES * 64 * 64 // (teacher.input.height * teacher.input.width)))


def _show(errors: "Errors", findings: Sequence["Finding"], *, everything: bool) -> None:
    total = sum(tensor.alone for tensor in errors.tensors)
    say(f"KL from full precision {errors.divergence:.3g} nats, same class on {errors.agreement:.1%} of {errors.images} images")
    say(f"{len(errors.tensors)} tensors on grids; each alone, they sum to {total:.3g} nats")
    say()
    faults: dict[tuple[str, str], str] = {}
    for finding in findings:
        faults.setdefault((finding.kind, finding.tensor), finding.fault)
    worst = sorted(errors.tensors, key=lambda tensor: -tensor.alone)
    shown = worst if everything else worst[:_WORST]
    say_table(
        ("tensor", "grid", "KL alone", "KL without", "SQNR dB", "clipped", "finding"),
        [
            (
                _short(tensor.name),
                f"{'W' if tensor.kind == 'weight' else 'A'}{tensor.bits}",
                f"{tensor.alone:.2g}",
                f"{tensor.without:.3g}",
                f"{tensor.sqnr:.1f}",
                f"{tensor.clipped:.2%}",
                faults.get((tensor.kind, tensor.name), ""),
            )
            for tensor in shown
        ],
        numbers=range(2, 6),
    )
    if len(shown) < len(worst):
        say(f"... and {len(worst) - len(shown)} more, shown with --all")
    say()
    if not findings:
        say("no tensor stands out: no faults found")
    for finding in findings if everything else findings[:_WORST]:
        flags = "".join(f" --set {shlex.quote(setting)}" for setting in finding.settings)
        text = f"{finding.tensor} ({finding.kind}), {finding.fault}: {finding.cause}. Costs {finding.cost:.2g} nats."
        for line in textwrap.wrap(text, _WIDTH, break_long_words=False):
            say(line)
        say(f"    {finding.cure}{':' if flags else ''}{flags}")


def _short(name: str, width: int = 28) -> str:
    """A long name without its middle."""
    half = (width - 3) // 2
    return name if len(name) <= width else f"{name[:half]}...{name[half + 3 - width :]}"


def _write(found: "Treatment", file: Path, network: "Network", run: Path | None) -> str | None:
    """Writes the recipe, if something helped; the command that makes a run of it."""
    from reverie.files import atomic_text
    from reverie.recipes import to_toml

    if not any(trial.kept for trial in found.trials):
        return None
    atomic_text(file, to_toml(found.recipe))
    place = [] if run is None else ["--output", f"{run}-fixed"]
    return shlex.join(["reverie", "quantize", network.name, *flags.words(network.options), "--recipe", str(file), *place])


def _as_document(found: "Treatment", command: str | None) -> dict[str, Any]:
    trials = [asdict(trial) for trial in found.trials]
    for trial in trials:
        trial["settings"] = trial["remedy"]["settings"]
        trial["remedy"] = trial["remedy"]["name"]
    return {"before": found.before, "after": found.after, "images": found.held_out, "trials": trials, "next": command}


def _show_treatment(found: "Treatment", file: Path, command: str | None) -> None:
    say()
    say_table(
        ("remedy", "KL before", "KL after", "noise", "seconds", "bytes", "kept"),
        [
            (
                _short(trial.remedy.name, 40),
                f"{trial.before:.3g}",
                f"{trial.after:.3g}",
                f"{trial.noise:.1g}",
                f"{trial.seconds:.1f}",
                f"{trial.bytes:+,}",
                "yes" if trial.kept else "no",
            )
            for trial in found.trials
        ],
        numbers=range(1, 6),
    )
    say()
    if command is None:
        say(f"no remedy helped on {found.held_out} held-out images; no recipe was written")
        return
    say(f"KL on {found.held_out} held-out images: {found.before:.3g}, now {found.after:.3g} nats")
    say(f"wrote {file}")
    say(f"next: {command}")
