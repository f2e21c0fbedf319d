"""The table of how much each tensor's bits cost, for the report of a mixed-precision run."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A number in a table: `shade` says how large, 0 to 1; whether it was `chosen`."""

    text: str
    shade: float
    chosen: bool


def sensitivity_table(mixed: dict[str, Any] | None) -> list[tuple[str, list[str], list[tuple[str, str, list[Cell]]]]]:
    """For weights and for activations: what they are, the widths, and a row for each tensor (name, elements, a cell for each width)."""
    if mixed is None:
        return []
    largest = max(max(tensor["divergence"].values()) for tensor in mixed["tensors"])
    found = []
    for kind in ("weight", "activation"):
        tensors = [tensor for tensor in mixed["tensors"] if tensor["kind"] == kind]
        widths = sorted({int(bits) for tensor in tensors for bits in tensor["divergence"]})
        rows = [
            (
                tensor["name"],
                f"{tensor['elements']:,}",
                [
                    Cell(f"{value:.1e}", _shade(value, largest), int(bits) == tensor["bits"])
                    for bits, value in sorted(tensor["divergence"].items(), key=lambda item: int(item[0]))
                ],
            )
            for tensor in tensors
        ]
        found.append((f"{kind}s", [f"{bits} bits" for bits in widths], rows))
    return found


def _shade(value: float, largest: float) -> float:
    """0 for what is a hundred-thousandth of the largest or less, 1 for the largest, in proportion to the logarithm."""
    return max(0.0, 1 + math.log10(value / largest) / 5) if value > 0 else 0.0
