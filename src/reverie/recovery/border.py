"""What crosses the borders of units: what each reads in the student and in the teacher, and what it should answer.

Teacher and student walk through the same images side by side (`graph/walk.py`), the student with the units before hardened.
Both hold the tensors at the borders of units once, in memory or on disk; where neither has room, they are computed anew
for the rows that are asked for.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, fx

from reverie.errors import ModelError
from reverie.graph.cache import Cache
from reverie.graph.extract import extract
from reverie.graph.operators import aten
from reverie.graph.placement import Student
from reverie.graph.taps import tap
from reverie.graph.units import Unit, UnitKind
from reverie.graph.walk import Walk
from reverie.recovery.window import Window

# Of units that cannot be isolated: larger ones.
_CURES: dict[UnitKind, str] = {
    "layer": "use --set reconstruction.unit=block, or network",
    "block": "use --set reconstruction.unit=network",
    "network": "use a rounding that needs none, such as --set rounding.method=gptq",
}


@dataclass(frozen=True)
class Rows:
    """Some rows of what a unit sees.

    Args:
        sources: What it reads in the student.
        clean: What it reads in the teacher; empty where nobody asks.
        target: What it should answer.
    """

    sources: list[Tensor]
    clean: list[Tensor]
    target: Tensor


class Borders:
    """Teacher and student walking from unit to unit.

    Args:
        with_entry: Whether the quantizers of a unit's inputs belong to it, and the teacher's inputs are wanted too.
        cache: Where tensors are held; None means memory without a limit.
    """

    def __init__(
        self,
        teacher: fx.GraphModule,
        student: fx.GraphModule,
        inputs: Tensor,
        units: list[Unit],
        *,
        with_entry: bool,
        cache: Cache | None = None,
    ) -> None:
        self._with_entry = with_entry
        self._sources = {unit.name: extract(student, unit, with_entry=with_entry)[1] for unit in units}
        clean = [source for sources in self._sources.values() for source in sources] if with_entry else []
        wanted = [*clean, *(unit.output for unit in units)]
        self._teacher = Walk(teacher, inputs, batch=64, keep=wanted, cache=cache)
        self._order = {node.name: index for index, node in enumerate(student.graph.nodes)}
        self._readers: dict[str, int] = {}
        for sources in self._sources.values():
            for source in sources:
                self._readers[source] = self._readers.get(source, 0) + 1
        self._student = Walk(student, inputs, batch=64, keep=self._readers, cache=cache)

    def reach(self, unit: Unit) -> None:
        """Goes on until all that the unit reads is there, and what it should answer."""
        self._student.to(max(self._sources[unit.name], key=self._order.__getitem__))
        self._teacher.to(unit.output)

    def count(self, unit: Unit) -> int:
        """How many rows the unit's output has: as many for each image as there are."""
        return self._teacher.count(unit.output)

    def rows(self, unit: Unit, picked: Int[Tensor, " rows"], window: Window | None = None) -> Rows:
        """These rows of a unit that was reached; of each, what the window shows."""
        names = self._sources[unit.name]
        wanted = [*names, unit.output] if self._with_entry else [unit.output]
        if window is None:
            *clean, target = self._teacher.rows(wanted, picked)
            return Rows(sources=self._student.rows(names, picked), clean=clean, target=target)
        cuts = [part.of for part in window.sources]
        *clean, target = self._teacher.rows(wanted, picked, [*(cuts if self._with_entry else []), window.target.of])
        return Rows(sources=self._student.rows(names, picked, cuts), clean=clean, target=target)

    def ranges(self, student: Student, units: list[Unit]) -> dict[str, list[str]]:
        """For each unit, the tensors whose scales it may learn: those it reads and those inside, if nothing was computed with them yet."""
        found: dict[str, list[str]] = {}
        taken: set[str] = set()
        reached = -1
        for unit in units:
            # The student has walked to the last of these tensors by then, and not through the quantizer behind it.
            reached = max(reached, *(self._order[source] for source in self._sources[unit.name]))
            names = [*unit.inputs, *(name for name in unit.nodes if name != unit.output)]
            fresh = [name for name in names if name in student.activations and self._order[name] >= reached]
            found[unit.name] = [name for name in fresh if name not in taken]
            taken.update(found[unit.name])
        return found

    def leave(self, unit: Unit) -> None:
        """The unit is hardened; what only it needed can go."""
        if not self._readers.get(unit.output):
            self._teacher.release(unit.output)
        for source in self._sources[unit.name]:
            self._readers[source] -= 1
            if not self._readers[source]:
                self._student.release(source)
                self._teacher.release(source)


def all_rows(count: int, batch: int = 64) -> list[Tensor]:
    """All row numbers, in batches."""
    return list(torch.split(torch.arange(count), batch))


@torch.no_grad()
def check_isolated(teacher: fx.GraphModule, student: fx.GraphModule, units: list[Unit], kind: UnitKind, images: Tensor) -> None:
    """Refuses a unit that cannot be executed on some rows of what it reads.

    Args:
        kind: Of the units.
        images: A few, more than one.

    Raises:
        ModelError: A unit reads tensors with different numbers of rows, or writes others than it reads; or it asks for the number of
            images where its rows are not images.
    """
    values = tap(teacher, {name for unit in units for name in (*unit.inputs, unit.output)})(images)
    cure = _CURES[kind]
    for unit in units:
        rows = {name: len(values[name]) for name in (*unit.inputs, unit.output)}
        if len(set(rows.values())) > 1:
            told = ", ".join(f"{number} in {name}" for name, number in rows.items())
            raise ModelError(
                f"{unit.name}: a unit must read and write as many rows, got {told} for {len(images)} images; {cure}"
            )
        module, _ = extract(student, unit)
        if rows[unit.output] != len(images) and any(node.target is aten.sym_size.int for node in module.graph.nodes):
            raise ModelError(
                f"{unit.name}: a unit whose rows are not images must not ask for their number, got {rows[unit.output]} rows for "
                f"{len(images)} images; {cure}"
            )
