"""`reverie capsule`: what real images tell about a network's batch norms, in one file that can be shipped instead."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from reverie import flags
from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions
from reverie.cli._output import say, say_json
from reverie.errors import ConfigError, at
from reverie.progress import choose

if TYPE_CHECKING:
    from reverie.images import Images


def capsule(
    network: str,
    /,
    *,
    calibration: Path,
    output: Path,
    device: str = "cpu",
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Read the per-class batch-norm statistics of labelled real images into one file, to be used instead of the images.

    The file is for this network alone. One image a class is enough; the statistics of several are averaged.

    Example: reverie capsule embedded:digits --calibration digits/one-each --output centres.safetensors

    Args:
        network: Such as embedded:digits, timm:resnet18, torchvision:resnet50, package:mobilenet_v2,
            path/to/file.py:factory or path/to/network.onnx.
        calibration: Folder (or .npz, .safetensors) of labelled real images, best at least one of each class.
        output: The file; an older capsule there is replaced.
        device: Where the network runs, such as cpu or cuda.
        json: Print what was found as one JSON document, and progress as JSON lines on standard error.
    """
    _check_place(output)
    from reverie.images.folder import read_folder
    from reverie.synthesis._capsule import capsule_of, load_capsule, save_capsule

    if output.exists():
        with at("--output"):
            load_capsule(output)
    loaded = options.load(network)
    # Takes half a second to import, which no wrong output or network should wait for.
    from reverie import stages
    from reverie.report.outcome import numbers_text, size_text

    stages.check_device(device)
    with at("--calibration"):
        images = read_folder(calibration, loaded.input, loaded.classes, require_labels=True)
    centres = capsule_of(stages.as_teacher(loaded, device), images, progress=choose(sys.stderr, json))
    save_capsule(centres, output)
    sizes = {"capsule": output.stat().st_size, "images": _bytes(images, calibration)}
    further = shlex.join(
        ["reverie", "quantize", network, *flags.words(options.given()), "--recipe", "fdda", "--capsule", str(output)]
    )
    if json:
        say_json(
            {
                "network": loaded.name,
                "fingerprint": centres.fingerprint,
                "images": len(images),
                "classes": centres.classes,
                "missing": centres.missing,
                "misclassified": centres.wrong,
                "file": str(output),
                "bytes": sizes,
                "next": further,
            }
        )
        return
    present = centres.classes - len(centres.missing)
    say(f"classes: {present} of {centres.classes} present, missing: {numbers_text(centres.missing)}")
    say(f"misclassified: {numbers_text(centres.wrong)}")
    say(
        f"file: {output}, {size_text(sizes['capsule'])}; the {len(images)} images it stands for have "
        f"{size_text(sizes['images'])} in {calibration}"
    )
    say(f"next: {further}")


def _check_place(output: Path) -> None:
    """Refuses a place that no file can be written to."""
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: must be in a folder that exists, got none; create it or choose another --output")
    if output.is_dir():
        raise ConfigError(f"{output}: must be a file, got a folder; choose another --output")


def _bytes(images: "Images", calibration: Path) -> int:
    """Size of the images as they lie on the disk."""
    files = [calibration] if calibration.is_file() else [calibration / source for source in images.sources]
    return sum(file.stat().st_size for file in files)
