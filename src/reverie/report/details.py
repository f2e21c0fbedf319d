"""What the report draws and no number stands for: curves, histograms, points, small pictures' answers.

`details.json` in the run directory, beside `metrics.json`, which holds what is to be read and compared. Each part is optional:
what is missing is left out of the report.
"""

import json
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, fx

from reverie import received
from reverie.errors import at
from reverie.files import atomic_text
from reverie.graph.quantized import QuantizedNetwork
from reverie.images import Images
from reverie.report import losses, tensors

FILE = "details.json"


def add(folder: Path, **parts: Any) -> None:
    """Puts `parts`, which JSON can hold, beside those that are in the run directory `folder` already.

    Raises:
        ConfigError: No space left, or the file cannot be written.
        ValueError: A part holds NaN or an infinity.
    """
    text = json.dumps(read(folder) | parts, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    atomic_text(folder / FILE, f"{text}\n")


def read(folder: Path) -> dict[str, Any]:
    """The parts that there are; none for a run of an older version.

    Raises:
        ConfigError: The file is no JSON object.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    with at(str(file)):
        found: dict[str, Any] = received.parse_json(received.read_bytes(file), dict[str, Any], "delete it")
    return found


def describe(folder: Path, reference: fx.GraphModule, quantized: QuantizedNetwork, sets: dict[str, Images]) -> None:
    """Adds the curves of the stages that learned, and what the grids do to each tensor.

    Args:
        folder: The run directory, with its checkpoints.
        reference: The full-precision graph whose nodes the student's are named after.
        sets: By what they are; tensors are looked at with a few images of the last.
    """
    kind, images = list(sets.items())[-1]
    add(
        folder,
        losses=losses.read(folder / "checkpoints" / "losses.json"),
        tensors=tensors.describe(reference, quantized, images.inputs),
        looked_at=kind,
    )


def rounded(values: Float[Tensor, "..."], digits: int = 4) -> list[Any]:
    """Nested lists of numbers with so many significant digits, for a small file."""
    return [rounded(part, digits) if part.dim() else float(f"{float(part):.{digits}g}") for part in values]
