"""`reverie synthesize`: images alone, for Reverie or any other tool."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.cli import _forecast
from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions, Settings, Target, check_trained, read_recipe
from reverie.cli._output import listing, say, say_json, say_wrapped
from reverie.cli._request import request as asked_for
from reverie.errors import at
from reverie.progress import choose

if TYPE_CHECKING:
    from reverie.formats import Format
    from reverie.models import Network
    from reverie.pipeline import Run


def synthesize(
    network: str,
    /,
    *,
    output: Path,
    images: int | None = None,
    recipe: str = "zeroq",
    calibration: Path | None = None,
    capsule: Path | None = None,
    seed: int | None = None,
    device: str = "cpu",
    memory_limit: float | None = None,
    accept_changes: bool = False,
    settings: Settings = None,
    target: Target | None = None,
    dry_run: bool = False,
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Make images out of a trained network, in a folder that any tool can use.

    Writes images.safetensors (network inputs; labels and logits where known), images/*.png, a contact sheet, and
    metrics.json and report.html with fidelity and diversity; with --for also OUTPUT/TARGET, what that tool reads. The same command again goes on
    where a killed run stopped.

    Example: reverie synthesize embedded:digits --images 128 --output dreams --for onnxruntime

    Example: reverie synthesize timm:resnet18 --images 256 --output dreams --dry-run

    Args:
        network: Such as embedded:digits, timm:resnet18, torchvision:resnet50, package:mobilenet_v2,
            path/to/file.py:factory or path/to/network.onnx.
        output: A new or empty folder.
        images: How many.
        recipe: A preset or a .toml file; its [synthesis] table counts, and image_scale.
        calibration: Folder (or .npz, .safetensors) of real images: what fdda needs, labelled, and what the synthetic ones
            are compared with.
        capsule: File that `reverie capsule` wrote, for fdda without the images themselves, or for a network whose batch norms
            were folded.
        seed: Of everything random.
        device: Where it happens, such as cpu or cuda.
        memory_limit: GiB to stay below; what is needed is estimated in advance, and what cannot fit is refused at once.
        accept_changes: Go on with interrupted images although versions of libraries, threads or the processor are others; their
            bytes may then be others too.
        settings: KEY=VALUE overrides any recipe key, such as synthesis.steps=100; repeatable, and wins over the flags.
        target: A tool to be calibrated, or a kind of folder, such as onnxruntime, nncf or imagefolder; `reverie methods` lists them,
            `reverie images` does it later and with settings.
        dry_run: Only say what would be done and what it would take in time and memory: a few steps are timed. The request is checked
            as far as it can be, and nothing is written.
        json: Print the metrics as one JSON document, and progress as JSON lines on standard error.
    """
    resolved = read_recipe(recipe, settings, seed=seed, images=images)
    from reverie import formats, plugins
    from reverie.files import check_new_folder
    from reverie.runs import check_output

    form = None if target is None else plugins.load(formats, target)()
    check_output(output)
    if form is not None:
        check_new_folder(output / plugins.name_of(form))
    loaded = options.load(network)
    if form is not None:
        form.check(loaded.input)
    # Takes half a second to import, which no wrong recipe or network should wait for.
    from reverie import interrupts, pipeline, request, stages
    from reverie.images.folder import read_folder
    from reverie.synthesis._capsule import load_capsule

    request.check(resolved, loaded, calibrated=calibration is not None, capsule=capsule is not None, device=device)
    centres = None if capsule is None else load_capsule(capsule)
    real = None
    if calibration is not None:
        labels = stages.reads_capsule(resolved) and capsule is None
        with at("--calibration"):
            real = read_folder(calibration, loaded.input, loaded.classes, require_labels=labels)
    places: dict[str, Path | str | None] = {"calibration": calibration, "capsule": capsule}
    shown = choose(sys.stderr, json)
    what: dict[str, Any] = {
        "calibration": real,
        "capsule": centres,
        "device": device,
        "memory_limit": memory_limit,
        "progress": shown,
    }
    check_output(output, request.identity(resolved, loaded), partial(request.recipe_changes, output, resolved))
    check_trained(network, loaded, options)
    if dry_run:
        from reverie.forecast import forecast

        expected = forecast(resolved, loaded, only_images=True, **what)
        _forecast.show(expected, output, {"network": loaded.name, "recipe": recipe}, json=json)
        return
    with interrupts.heeded(shown.say):
        run = pipeline.run_synthesis(
            resolved,
            loaded,
            output=output,
            request=asked_for(
                "synthesize", network, options, resolved, places=places, device=device, memory_limit=memory_limit, target=target
            ),
            accept_changes=accept_changes,
            **what,
        )
        if form is not None:
            write_form(form, run, loaded)
    if json:
        say_json(run.metrics)
    else:
        show(run, target)


def write_form(form: "Format", run: "Run", network: "Network") -> None:
    """Writes the run's images as a tool takes them, beside them."""
    from reverie import formats, plugins
    from reverie.images.store import load_images

    images = load_images(run.path / "images.safetensors")
    formats.write(form, images, network.input, network.classes, run.path / plugins.name_of(form))


def show(run: "Run", target: str | None) -> None:
    """Prints what is known of the images, and what was written."""
    from reverie.report import outcome

    say_wrapped(f"images: {outcome.images_text(run.metrics['images'])}")
    for line in outcome.learning_notes(run.metrics):
        say_wrapped(line)
    say(f"seconds: {outcome.seconds_text(run.metrics['seconds'])}")
    say(f"files: {run.path}: images.safetensors, images/*.png, images/contact_sheet.png, metrics.json, report.html")
    if target is not None:
        say(f"for {target}: {listing(run.path / target)}")
    else:
        say(f"next: {shlex.join(['reverie', 'images', str(run.path), '--for', 'onnxruntime'])} (or for another tool)")
