"""TensorBoard event files, in the folder `tensorboard` of the run directory: `tensorboard --logdir runs` shows them all.

Written by `torch.utils.tensorboard`, which needs the package tensorboard. A resumed run adds a file; TensorBoard joins them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Has no settings."""

    library: ClassVar[str] = "tensorboard"

    def open(self, run: Path, name: str) -> "Events":
        """Event files in `run`/tensorboard."""
        return Events(run / "tensorboard")


class Events:
    """One event file, growing."""

    def __init__(self, folder: Path) -> None:
        # Takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def loss(self, name: str, step: int, value: float) -> None:
        """A point of a curve."""
        self._writer.add_scalar(name, value, step)

    def result(self, figures: Mapping[str, float], settings: Mapping[str, str], run: Path) -> None:
        """The figures as scalars at step 0, the contact sheet as an image, the recipe as text."""
        for name, value in figures.items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, 0)
        sheet = run / "images" / "contact_sheet.png"
        if sheet.is_file():
            with Image.open(sheet) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image("images", pixels, 0, dataformats="HWC")
        lines = "\n".join(f"    {name} = {value}" for name, value in settings.items())
        self._writer.add_text("recipe", lines, 0)

    def close(self, *, failed: bool) -> None:
        """Everything is on the disk."""
        self._writer.close()


METHOD = TensorBoard
