"""What the methods that optimise pixels share: batch after batch with checkpoints, Adam on one of them, and its priors.

A batch starts as Gaussian noise in input units. The rate falls by a half cosine from `learning_rate` to zero, so a run ends
after a known number of steps, and not when a plateau is noticed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from reverie.checkpoints import Checkpoints
from reverie.errors import DivergenceError
from reverie.progress import Progress
from reverie.synthesis import batches
from reverie.synthesis._losses import total_variation


def in_batches(
    make: Callable[[int, int, Callable[..., None]], dict[str, Tensor]],
    count: int,
    *,
    batch: int,
    steps: int,
    checkpoints: Checkpoints,
    progress: Progress,
) -> dict[str, Tensor]:
    """The parts of all batches, joined; each finished batch is a checkpoint.

    Args:
        make: Makes a batch, given its number, its size and what to call after each of its `steps`.
    """
    parts = []
    with progress.stage("synthesize", total=steps * -(-count // batch)) as step:
        for number, size in batches(count, batch):
            name = f"images-{number}"
            part = checkpoints.load(name)
            if part is None:
                part = make(number, size, step)
                checkpoints.save(name, part)
            else:
                step(steps, skipped=True)
            parts.append(part)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def start(
    shape: tuple[int, int, int], classes: int, size: int, generator: torch.Generator
) -> tuple[Float[Tensor, "size channels height width"], Int[Tensor, " size"]]:
    """Noise with unit variance, and a random label for each image."""
    return torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator)


def descend(
    pixels: Float[Tensor, "size channels height width"],
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int,
    learning_rate: float,
    bounds: tuple[Tensor, Tensor] | None,
    step: Callable[..., None],
) -> Float[Tensor, "size channels height width"]:
    """The pixels, on the CPU, after `steps` of Adam on `loss` from `pixels`.

    Args:
        loss: Of the pixels; called once each step.
        bounds: Smallest and largest valid value, enforced after each step; None leaves pixels free.
        step: Called after each step.

    Raises:
        DivergenceError: A pixel is infinite or undefined at the end.
    """
    # Channels-last makes a step 1.3 (32 px) to 1.8 (224 px) times faster on a CPU.
    pixels = pixels.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        (pixels.grad,) = torch.autograd.grad(loss(pixels), pixels)
        optimizer.step()
        schedule.step()
        if bounds is not None:
            with torch.no_grad():
                torch.clamp(pixels, *bounds, out=pixels)
        step()
    if not bool(torch.isfinite(pixels).all()):
        raise DivergenceError(
            f"synthesis: pixels must stay finite, got others after {steps} steps; "
            f"try --set synthesis.learning_rate={learning_rate / 4:g} with another --output"
        )
    return pixels.detach().cpu().contiguous()


@dataclass(frozen=True)
class Priors:
    """Weights of the terms that look at the pixels and at the answers; a weight of 0 leaves its term out.

    Args:
        input: Of the squared deviation of each image's channels from mean 0 and standard deviation 1.
        label: Of the cross-entropy to the label.
        variation: Of the total variation.
    """

    input: float
    label: float
    variation: float

    def __call__(
        self,
        pixels: Float[Tensor, "size channels height width"],
        logits: Float[Tensor, "size classes"],
        labels: Int[Tensor, " size"],
    ) -> Float[Tensor, ""]:
        """The weighted sum of the terms."""
        total = logits.new_zeros(())
        if self.input:
            deviation, mean = torch.std_mean(pixels.flatten(2), dim=2, correction=0)
            total = total + self.input * (mean.square() + (deviation - 1).square()).mean()
        if self.label:
            total = total + self.label * functional.cross_entropy(logits, labels)
        if self.variation:
            total = total + self.variation * total_variation(pixels)
        return total
