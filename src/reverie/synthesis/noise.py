"""Gaussian noise, one standard deviation around the input contract's mean: the baseline every method must beat.

It knows nothing of the network, and ranges calibrated with it are wrong: it is made only when asked for by name, and the
report says what it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from reverie.checkpoints import Checkpoints
from reverie.images import Images
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.synthesis import Teacher


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Has no settings."""

    needs_batch_norm: ClassVar[bool] = False
    needs_capsule: ClassVar[bool] = False

    def __call__(self, teacher: Teacher, count: int, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` draws, clamped to valid pixels."""
        with progress.stage("synthesize", total=1) as step:
            inputs = torch.randn(count, *teacher.input.shape, generator=seed.generator())
            low, high = teacher.input.bounds(inputs)
            step()
        return Images(inputs=inputs.clamp(low, high), sources=("noise",) * count)


METHOD = Noise
