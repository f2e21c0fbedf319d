"""What the targets of arrays share: `inputs.npy`, and `calibration.py`, the adapter as a script of its own.

The script is the source text of the adapter that `reverie.calibration` calls. So it works where the other tool is, which is
seldom an environment that Reverie could be installed into, and there is no second version of it. An adapter therefore uses nothing
but NumPy, its tool and itself.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from reverie.images import Images
from reverie.images.contract import InputContract

Units = Literal["inputs", "pixels", "levels"]

_SCRIPT = '''"""{title}

{about}

inputs.npy: float32 of shape {shape}, {axes}; {units}.
{provenance}"""

from __future__ import annotations

from pathlib import Path

import numpy as np

inputs = np.load(Path(__file__).with_name("inputs.npy"))


{adapter}'''


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Writes arrays and the adapter of the target.

    Args:
        units: "inputs": what the network takes, which is normalized. For a deployed network that normalizes by itself: "pixels", 0 to 1,
            or "levels", 0 to 255, neither rounded nor clamped.
    """

    # Makes of an array of inputs what the tool takes; None where the tool reads the file itself.
    adapter: ClassVar[Callable[..., Any] | None] = None
    # What the adapter imports besides NumPy and torch.
    library: ClassVar[str | None] = None
    channels_last: ClassVar[bool] = False

    units: Units = "inputs"

    def check(self, contract: InputContract) -> None:
        """Arrays hold any number of channels."""

    def __call__(self, images: Images, contract: InputContract, classes: int, folder: Path) -> None:
        """Writes `inputs.npy`, and `calibration.py` if the target has an adapter."""
        factor = 255 if self.units == "levels" else 1
        values = images.inputs if self.units == "inputs" else contract.denormalize(images.inputs) * factor
        array = self.array(values)
        np.save(folder / "inputs.npy", array)
        if self.adapter is not None:
            (folder / "calibration.py").write_text(self._script(array.shape, images, contract), encoding="utf-8")

    def array(self, values: Float[Tensor, "count channels height width"]) -> Float[np.ndarray, "count _ _ _"]:
        """The values as the tool indexes them."""
        ordered = values.permute(0, 2, 3, 1) if self.channels_last else values
        return np.ascontiguousarray(ordered.detach().cpu().float().numpy())

    def _script(self, shape: tuple[int, ...], images: Images, contract: InputContract) -> str:
        meaning = {
            "inputs": f"network inputs, that is (pixel - mean) / std of pixels in 0..1, mean {contract.mean}, std {contract.std}",
            "pixels": "pixels, 0 to 1 where the image is a valid one",
            "levels": "pixels, 0 to 255 where the image is a valid one",
        }
        # In a docstring of a script that people run: words from a file of images must not end it.
        words = ", ".join(f"{key} {value}" for key, value in sorted(images.provenance.items()))
        made = words.encode("unicode_escape").decode().replace('"', "'")
        assert self.adapter is not None
        return _SCRIPT.format(
            about=(sys.modules[type(self).__module__].__doc__ or "").strip(),
            title=f"{len(images)} images that Reverie made, for calibration; needs NumPy and the tool, not Reverie.",
            shape=shape,
            axes="(count, height, width, channels)" if self.channels_last else "(count, channels, height, width)",
            units=meaning[self.units],
            provenance=f"Made by: {made}.\n" if made else "",
            adapter=inspect.getsource(self.adapter),
        )
