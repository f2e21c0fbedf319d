"""Where a training loop gets its images from: batch by batch, fixed or still improving.

A source is asked for its batches in order, 0, 1, 2, …, and draws everything random from its own seed and the number of
the batch. What it keeps between batches (a generator in training) is its state: restored, it goes on to the same batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.descent import below, under
from reverie.images import Images
from reverie.images.augment import Augmentation, augment
from reverie.randomness import Seed

Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """What one step of a training loop sees.

    Args:
        inputs: Network inputs.
        labels: The class of each image (its true one, or the one asked for); None if unknown.
        logits: The teacher's answers where they are known already; None asks for them.
    """

    inputs: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"] | None
    logits: Float[Tensor, "batch classes"] | None


@runtime_checkable
class Source(Protocol):
    """Gives batches, in order."""

    def draw(self, number: int, progress: float) -> Batch:
        """Batch `number` of a loop of which the share `progress` (0 to 1) is done."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs to go on from here."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to where `state` was taken."""
        ...


@torch.no_grad()
def _answer(teacher: Teacher | None, inputs: Tensor) -> Tensor | None:
    return None if teacher is None else teacher(inputs)


class Shuffled:
    """A fixed set in endless random order: every image once before any comes again.

    Args:
        images: At least one.
        batch: Images at a time.
        augmentation: Given to every image anew; None shows them as they are, with the logits that are known.
        teacher: Asked for the logits of augmented images; None leaves that to the reader.
    """

    def __init__(
        self,
        images: Images,
        batch: int,
        *,
        seed: Seed,
        device: torch.device,
        augmentation: Augmentation | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._inputs = images.inputs.to(device)
        self._labels = None if images.labels is None else images.labels.to(device)
        self._logits = None if images.logits is None else images.logits.to(device)
        self._batch, self._seed, self._augmentation, self._teacher = batch, seed, augmentation, teacher

    def draw(self, number: int, progress: float) -> Batch:
        """Batch `number`."""
        chosen = self._chosen(number).to(self._inputs.device)
        inputs, logits = self._inputs[chosen], None if self._logits is None else self._logits[chosen]
        if self._augmentation is not None:
            inputs = augment(inputs, self._augmentation, self._seed.at("augment", number).generator())
            logits = _answer(self._teacher, inputs)
        return Batch(inputs, None if self._labels is None else self._labels[chosen], logits)

    def _chosen(self, number: int) -> Int[Tensor, " batch"]:
        count = self._inputs.shape[0]
        first, last = number * self._batch, (number + 1) * self._batch
        rounds = range(first // count, (last - 1) // count + 1)
        orders = [torch.randperm(count, generator=self._seed.at("order", turn).generator()) for turn in rounds]
        start = first - rounds[0] * count
        return torch.cat(orders)[start : start + self._batch]

    def state(self) -> dict[str, Tensor]:
        """Nothing: a batch depends on its number alone."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing to do."""


class Augmented:
    """Another source's batches, every image cropped and flipped anew, with the teacher's answers to that if it is given."""

    def __init__(self, source: Source, augmentation: Augmentation, *, seed: Seed, teacher: Teacher | None = None) -> None:
        self._source, self._augmentation, self._seed, self._teacher = source, augmentation, seed, teacher

    def draw(self, number: int, progress: float) -> Batch:
        """The source's batch `number`, augmented."""
        batch = self._source.draw(number, progress)
        inputs = augment(batch.inputs, self._augmentation, self._seed.at(number).generator())
        return Batch(inputs, batch.labels, _answer(self._teacher, inputs))

    def state(self) -> dict[str, Tensor]:
        """The source's."""
        return self._source.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts the source back."""
        self._source.restore(state)


class Mixed:
    """Batches of two sources behind each other: some images real, some synthetic."""

    def __init__(self, first: Source, second: Source) -> None:
        self._parts = (first, second)

    def draw(self, number: int, progress: float) -> Batch:
        """Both sources' batch `number`; labels and logits are kept where both know them, else the teacher is asked."""
        first, second = (part.draw(number, progress) for part in self._parts)
        return Batch(
            torch.cat([first.inputs, second.inputs]),
            None if first.labels is None or second.labels is None else torch.cat([first.labels, second.labels]),
            None if first.logits is None or second.logits is None else torch.cat([first.logits, second.logits]),
        )

    def state(self) -> dict[str, Tensor]:
        """Both sources' states."""
        return {
            name: value for index, part in enumerate(self._parts) for name, value in below(str(index), part.state()).items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts both sources back."""
        for index, part in enumerate(self._parts):
            part.restore(under(str(index), state))
