"""`reverie images`: the images of a run, in the form in which another tool takes them."""

from pathlib import Path

from reverie.cli._options import NO_OPTIONS, NetworkOptions, Settings, Target, as_overrides
from reverie.cli._output import listing, say
from reverie.cli._runs import load_network
from reverie.errors import at


def images(
    run: Path,
    /,
    *,
    target: Target,
    output: Path | None = None,
    settings: Settings = None,
    network: str | None = None,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Write the images of a run for another tool.

    Targets of arrays, such as onnxruntime, nncf, torchao and tflite, get inputs.npy and calibration.py, which needs no Reverie; targets of
    pictures, such as imagefolder, ultralytics and webdataset, get PNG files.

    Example: reverie images dreams --for tflite --set units=levels --output tflite

    Args:
        run: A run directory of `reverie synthesize` or `reverie quantize`, or the images.safetensors in it.
        target: Whom they are for; `reverie methods` lists them with their settings.
        output: A new or empty folder; default RUN/TARGET.
        settings: KEY=VALUE, a setting of the target, such as units=pixels; repeatable.
        network: The full-precision network, whose normalization is needed; default: the one that the run names.
    """
    from reverie import formats, plugins, recipes
    from reverie.files import check_new_folder
    from reverie.images.store import load_images

    kind = plugins.load(formats, target)
    with at(f"--for {target}"):
        form = recipes.configure(kind, as_overrides(settings))
    run = run.parent if run.is_file() else run
    folder = output or run / target
    check_new_folder(folder)
    loaded = load_network(run, network, options)
    form.check(loaded.input)
    made = load_images(run / "images.safetensors")
    formats.write(form, made, loaded.input, loaded.classes, folder)
    say(f"wrote {len(made)} images to {listing(folder)}")
