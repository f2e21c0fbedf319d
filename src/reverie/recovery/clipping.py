"""Accurate activation clipping (AAC): ranges from images that excite the network, whatever images the rest is made from.

    excite      minimise over x:  CE(teacher(x), y) + variation_weight * TV(x),    y = 0, 1, ..., classes - 1, 0, 1, ...
    clip        low, high = percentiles (100 - p), p of every tensor over those images

This is a reconstruction from the abstract of ACQ (He et al., arXiv:2204.04215); no body text or code was available
(algorithms section 6). The abstract says that ranges come from accurate activations of the full-precision network. Our
reading: images that match batch-norm statistics show each layer its mean and deviation and not its extremes, so the upper
ends found on them are too low in the last layers, where one class's features fire. An image that the network is sure of has
those extremes. Nothing but the label pulls at the pixels here: no statistics are matched, and the images are good for ranges
only, neither for rounding nor for adapting anything.

The cross-entropy stops pulling once the network is sure. Maximising the logit itself, the other reading, does not stop:
on a ResNet-20 (CIFAR-10) it ends at logits of 160, where photographs have 19 and these images 21.

When it hurts: wherever a step costs more than what is clipped. On that ResNet-20 these images reach 1.3 times as far as
photographs (ZeroQ's: 0.96 times). With nothing else in the recipe, W4A4 in the `integer` placement falls from 94 % on ZeroQ's
images to 85 % on these at the same percentile, and W3A3 from 57 % to 31 %. It is the paper's step, not a recommendation.

Not here: training, the third part of the paper; batch norms, which are in `recovery/batch_norm_adaptation.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx
from torch.nn import functional

from reverie.checkpoints import Checkpoints, Unfinished
from reverie.errors import check_range
from reverie.graph.placement import Student
from reverie.observers import Observer
from reverie.observers.minmax import MinMax
from reverie.observers.percentile import Percentile
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.recovery.ranges import calibrate_activations
from reverie.synthesis import Teacher, batches
from reverie.synthesis._losses import total_variation
from reverie.synthesis._photographs import to_inputs
from reverie.synthesis._pixels import descend, in_batches


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """How the images are made and what is read from them.

    Args:
        images: How many; 0 leaves the step out, a few for each class are enough.
        steps: Adam steps for each batch; the rate falls by a half cosine.
        batch: Images optimised together.
        learning_rate: Of the first step, where photographs deviate by 1.
        variation_weight: Of the total variation; it also decides how sure is sure enough.
        percentile: Upper end of a range, 75 to 100; the lower end leaves as large a share out, so it is 0 behind a ReLU.
            100 is the exact maximum (and minimum).
    """

    images: int = 0
    steps: int = 100
    batch: int = 32
    learning_rate: float = 0.1
    variation_weight: float = 1e-2
    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_range(
            self,
            images=(0, math.inf),
            steps=(1, math.inf),
            batch=(1, math.inf),
            learning_rate=(1e-9, math.inf),
            variation_weight=(0, math.inf),
            percentile=(75, 100),
        )

    @property
    def observer(self) -> Observer:
        """What gives the ranges. `Percentile` counts the share between both ends, and its extremes are of a sample."""
        return MinMax() if self.percentile == 100 else Percentile(percentile=2 * self.percentile - 100)


def excite(
    teacher: Teacher, settings: Clipping, *, seed: Seed, checkpoints: Checkpoints, progress: Progress
) -> Float[Tensor, "count *shape"]:
    """`settings.images` images, on the CPU, each of which the teacher is sure shows its class; image i is of class i mod classes.

    Finished batches are checkpoints.

    Raises:
        ConfigError: `settings.images` is 0.
    """
    check_range(settings, images=(1, math.inf))
    # Fewer images than classes: evenly from all of them.
    stride = max(teacher.classes // settings.images, 1)

    def make(number: int, size: int, step: Callable[..., None], unfinished: Unfinished) -> dict[str, Tensor]:
        labels = (number * settings.batch + torch.arange(size)) * stride % teacher.classes
        return {"inputs": _batch(teacher, settings, labels, seed.at(number), step, unfinished)}

    return in_batches(
        make,
        batches(settings.images, settings.batch),
        teacher.input,
        steps=settings.steps,
        checkpoints=checkpoints,
        progress=progress,
        stage="excite",
        part_name="excited",
    )["inputs"]


def clip_activations(
    reference: fx.GraphModule,
    student: Student,
    inputs: Float[Tensor, "count *shape"],
    settings: Clipping,
    *,
    progress: Progress,
) -> None:
    """Sets the grid of every quantized tensor of the student, in place; for excited `inputs`, in place of calibration.

    Comes before `calibrate_weights`, which keeps biases within int32 on the scales that are set here.

    Args:
        reference: The graph that `student` was placed on.

    Raises:
        ModelError: A tensor takes a value that is not finite.
    """
    calibrate_activations(reference, student, inputs, settings.observer, batch=64, progress=progress)


def _batch(
    teacher: Teacher, settings: Clipping, labels: Tensor, seed: Seed, step: Callable[..., None], unfinished: Unfinished
) -> Tensor:
    noise = torch.randn(len(labels), *teacher.input.shape, generator=seed.generator()).to(teacher.device)
    targets = labels.to(teacher.device)

    gain = to_inputs(teacher.input)[0].to(noise)

    def loss(inputs: Tensor) -> Tensor:
        likelihood = functional.cross_entropy(teacher.graph(inputs), targets)
        return likelihood + settings.variation_weight * total_variation(inputs / gain)

    return descend(
        noise,
        loss,
        teacher.input,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        step=step,
        unfinished=unfinished,
        setting="clipping.learning_rate",
    )
