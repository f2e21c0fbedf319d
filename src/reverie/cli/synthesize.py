"""`reverie synthesize`: images alone, for Reverie or any other tool."""

import sys
from pathlib import Path

from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions, Settings, read_recipe
from reverie.cli._output import say, say_json
from reverie.errors import at
from reverie.progress import choose


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
    settings: Settings = None,
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Make images out of a trained network, in a folder that any tool can use.

    Writes images.safetensors (network inputs; labels and logits where known), images/*.png, a contact sheet, and
    metrics.json with fidelity and diversity. The same command again goes on where a killed run stopped.

    Example: reverie synthesize embedded:digits --images 128 --output dreams --set synthesis.class_weight=0.1

    Args:
        network: Such as embedded:digits, timm:resnet18, torchvision:resnet50, package:mobilenet_v2 or
            path/to/file.py:factory.
        output: A new or empty folder.
        images: How many.
        recipe: A preset or a .toml file; its [synthesis] table counts, and image_scale.
        calibration: Folder (or .npz, .safetensors) of real images: what fdda needs, labelled, and what the synthetic ones
            are compared with.
        capsule: File that `reverie capsule` wrote, for fdda without the images themselves.
        seed: Of everything random.
        device: Where it happens, such as cpu or cuda.
        settings: KEY=VALUE overrides any recipe key, such as synthesis.steps=100; repeatable, and wins over the flags.
        json: Print the metrics as one JSON document, and progress as JSON lines on standard error.
    """
    resolved = read_recipe(recipe, settings, seed=seed, images=images)
    from reverie.runs import check_output

    check_output(output)
    loaded = options.load(network)
    # Takes half a second to import, which no wrong recipe or network should wait for.
    from reverie import pipeline, request, stages
    from reverie.images.folder import read_folder
    from reverie.report import outcome
    from reverie.synthesis._capsule import load_capsule

    request.check(resolved, loaded, calibrated=calibration is not None, capsule=capsule is not None, device=device)
    centres = None if capsule is None else load_capsule(capsule)
    real = None
    if calibration is not None:
        labels = stages.reads_capsule(resolved) and capsule is None
        with at("--calibration"):
            real = read_folder(calibration, loaded.input, loaded.classes, require_labels=labels)
    run = pipeline.run_synthesis(
        resolved,
        loaded,
        output=output,
        calibration=real,
        capsule=centres,
        device=device,
        progress=choose(sys.stderr, json),
    )
    if json:
        say_json(run.metrics)
        return
    say(f"images: {outcome.images_text(run.metrics['images'])}")
    for line in outcome.learning_notes(run.metrics):
        say(line)
    say(f"seconds: {outcome.seconds_text(run.metrics['seconds'])}")
    say(f"files: {run.path}: images.safetensors, images/*.png, images/contact_sheet.png, metrics.json")
