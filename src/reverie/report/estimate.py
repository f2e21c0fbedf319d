"""How much accuracy a quantized network has lost, estimated without a label.

What is looked at is how far the student's answer p' is from the teacher's p on synthetic images that are made otherwise, and from
another seed, than those it learned from: the mean total variation distance over the images,

    f = mean_i 1/2 sum_c |p_ic - p'_ic|,                                  0 to 1

What f says about the drop d of top-1 accuracy, in percent points, was measured on networks whose labels are known:

    log(d + OFFSET) = intercept + slope log f + e,                        e ~ N(0, spread^2)

The 90 % interval is that of e and, for few images, of f itself (delta method: its relative standard error times the slope). Beyond the
largest f measured all that is known is that the drop is at least as large as there.

Not here: the images (`stages.estimating`), for which alone the relation holds.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

# Points: drops below it are as good as none, and a logarithm without it would look at nothing else.
OFFSET = 0.5
_NORMAL_95 = 1.6448536269514722


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A drop of top-1 accuracy, as fractions of 1, that nobody measured.

    Args:
        images: It was read from so many.
        distance: Mean total variation distance between both answers to them.
        drop: The estimate; None beyond what was calibrated.
        low, high: Its 90 % interval; `high` is None beyond what was calibrated.
    """

    images: int
    distance: float
    drop: float | None
    low: float
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What a distance says about the drop.

    Args:
        intercept, slope, spread: As above.
        smallest, largest: The distances it was measured between.
    """

    intercept: float
    slope: float
    spread: float
    smallest: float
    largest: float

    def __call__(self, distances: Float[Tensor, " n"]) -> Estimate:
        """The drop, from the distances on at least two images."""
        distance = float(distances.mean())
        # Below the smallest one measured the drop is taken for what it is there: rather too large than too small.
        read = min(max(distance, self.smallest), self.largest)
        error = float(distances.std()) / math.sqrt(len(distances)) / read
        reach = _NORMAL_95 * math.hypot(self.spread, self.slope * error)
        low, drop, high = (self.drop(read, shift) for shift in (-reach, 0.0, reach))
        known = distance <= self.largest
        return Estimate(
            images=len(distances), distance=distance, drop=drop if known else None, low=low, high=high if known else None
        )

    def drop(self, distance: float, shift: float = 0.0) -> float:
        """The drop at `distance`, 0 to 1, where e is `shift`."""
        points = math.exp(self.intercept + self.slope * math.log(distance) + shift) - OFFSET
        return min(max(points / 100, 0.0), 1.0)


# Fitted by `benchmarks/estimate.py` (docs/benchmarks.md has its table); the spread is the root mean square of what is left of a network
# that was left out of the fit.
CALIBRATED = Relation(intercept=2.777, slope=1.055, spread=0.704, smallest=0.0065, largest=0.746)


def distances(teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """The total variation distance between two answers to the same images, given as logits: 0 to 1."""
    return (teacher.double().softmax(dim=1) - student.double().softmax(dim=1)).abs().sum(dim=1) / 2
