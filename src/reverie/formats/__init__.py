"""Images in the form in which other tools take them, one file per target: whoever calibrates needs images, whatever tool he has.

    reverie synthesize NETWORK --for TARGET --output DIR     DIR/TARGET beside the run's own files
    reverie images RUN --for TARGET                          of a run that is there
    reverie.calibration(TARGET, images)                      the Python object itself, such as an `nncf.Dataset`

Two kinds. Targets of arrays (`_arrays.py`) get `inputs.npy`, float32 in the units that the network takes unless asked otherwise,
and `calibration.py`, which makes of it what the tool wants and needs neither Reverie nor its environment. Targets of pictures
(`_pictures.py`) get PNG files, pixels of 0 to 255, rounded and clamped, as tools that read folders normalize by themselves.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from reverie import plugins
from reverie.errors import ConfigError
from reverie.files import atomic_folder
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import load_images
from reverie.models import _libraries


@runtime_checkable
class Format(Protocol):
    """Writes a set of images for one target. The object is its own configuration."""

    def check(self, contract: InputContract) -> None:
        """Refuses images that the target cannot hold, before there are any.

        Raises:
            ConfigError: Says what it can hold.
        """
        ...

    def __call__(self, images: Images, contract: InputContract, classes: int, folder: Path) -> None:
        """Fills the empty `folder`; the same arguments give the same bytes.

        Args:
            contract: Of the network that the images are inputs of, in whose size they are.
            classes: How many the network tells apart.

        Raises:
            ConfigError: The target needs what the images do not have, such as classes.
        """
        ...


def write(form: Format, images: Images, contract: InputContract, classes: int, folder: Path) -> None:
    """Makes `folder`, which is new or empty, what the target reads; whole or not at all.

    Images in another size than the network's (`image_scale`) are resized, since other tools know one size only.

    Raises:
        ConfigError: The target cannot hold these images, or `folder` holds something or cannot be written.
    """
    form.check(contract)
    # Resizing drops the logits, but what an image shows stays what it shows.
    sized = replace(images.resized(contract.height, contract.width), logits=images.logits)
    atomic_folder(folder, lambda aside: form(sized, contract, classes, aside))


def calibration(target: str, images: Images | Path | str, **options: Any) -> Any:
    """What a tool's calibration takes, in this process, made of images in the units that the network takes.

    Images that were made smaller than the network's (`image_scale`) are resized, as their provenance says.

    Args:
        target: Such as "onnxruntime" (a `CalibrationDataReader`), "nncf" (an `nncf.Dataset`), "mct" and "tflite" (functions that
            yield lists of arrays), "aimet" and "torchao" (callbacks that show a model every image).
        images: The set, or the path of an `images.safetensors`.
        options: Those of the target's adapter, such as `batch`, or `input_name` for ONNX Runtime.

    Raises:
        ConfigError: No such target, or one that takes files only; no such file of images.
        ModelError: The tool is not installed; the message names the extra.
    """
    method = plugins.load(sys.modules[__name__], target)
    adapter = getattr(method, "adapter", None)
    if adapter is None:
        raise ConfigError(
            f"{target} must be given files, got a call for a Python object; use `reverie images RUN --for {target}`"
        )
    if method.library is not None:
        _libraries.require(method.library, extra=target, distribution=method.library)
    given = images if isinstance(images, Images) else load_images(Path(images))
    if "input_size" in given.provenance:
        height, width = map(int, given.provenance["input_size"].split(" x "))
        given = given.resized(height, width)
    return adapter(method().array(given.inputs), **options)
