"""ZeroQ: images whose statistics at the batch norms are those of the training data.

    loss = (1/L) sum_l mean_c [ ((m_l - mu_l) / sigma_l)^2 + ((s_l - sigma_l) / sigma_l)^2 ]
         + input_weight * mean over images, channels [ m_0^2 + (s_0 - 1)^2 ]
         + class_weight * CE(teacher(x), y) + variation_weight * TV(x)

m_l, s_l are mean and standard deviation at the input of batch norm l, mu_l and sigma_l its running ones, m_0 and s_0
those of the normalized image itself, y a random label.

Reference: Cai et al. 2020, arXiv:2001.00281, section 3.1 (algorithms 4.1). What the released code does that we do not:

- It pairs convolution outputs with batch norms by their order of registration; we read the batch norms' own inputs.
- It sums squared differences, so wide layers and layers with large values rule the loss; we measure in units of sigma_l.
- It starts from almost black images with learning rate 0.5 and stops by a plateau of the loss; we start from noise with
  unit variance, and the rate falls by a half cosine over a known number of steps.
- Its statistics are those of each image; ours are those of the batch unless `level = "sample"`: training images differ
  from each other, and a set in which none may do so is too uniform (DSG's argument).

The class term and the total variation are options that the paper does not have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reverie.checkpoints import Checkpoints
from reverie.errors import check_range
from reverie.graph.batch_norm import Level, Observed
from reverie.images import Images
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.synthesis import Teacher, lacks_batch_norm
from reverie.synthesis._losses import matching_loss
from reverie.synthesis._pixels import Priors, descend, in_batches, start


@dataclass(frozen=True, kw_only=True)
class ZeroQ:
    """Batch-norm matching by gradient descent on pixels.

    Args:
        batch: Images optimised together.
        steps: Adam steps for each batch.
        learning_rate: Of the first step, in input units.
        level: Statistics of the "batch" or of each "sample".
        input_weight: Of the term on the image's own mean and standard deviation.
        class_weight: Of the cross-entropy to a random label; 0 leaves labels out.
        variation_weight: Of the total variation.
        clamp: Keep pixels valid (between black and white) after each step.
    """

    batch: int = 32
    steps: int = 200
    learning_rate: float = 0.1
    level: Level = "batch"
    input_weight: float = 0.1
    class_weight: float = 0.0
    variation_weight: float = 0.0
    clamp: bool = True

    needs_batch_norm: ClassVar[bool] = True
    needs_capsule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range(
            self,
            batch=(1, math.inf),
            steps=(1, math.inf),
            learning_rate=(1e-9, math.inf),
            input_weight=(0, math.inf),
            class_weight=(0, math.inf),
            variation_weight=(0, math.inf),
        )

    def __call__(self, teacher: Teacher, count: int, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` images, batch by batch; each finished batch is a checkpoint."""
        if not teacher.batch_norms:
            raise lacks_batch_norm(teacher.name, "zeroq")
        observed = Observed(teacher.graph, self.level)
        made = in_batches(
            lambda number, size, step: self._batch(teacher, observed, size, seed.at(number), step),
            count,
            batch=self.batch,
            steps=self.steps,
            checkpoints=checkpoints,
            progress=progress,
        )
        return Images(
            inputs=made["inputs"],
            labels=made["labels"] if self.class_weight else None,
            sources=("zeroq",) * count,
        )

    def _batch(
        self, teacher: Teacher, observed: Observed, size: int, seed: Seed, step: Callable[..., None]
    ) -> dict[str, Tensor]:
        noise, labels = start(teacher.input.shape, teacher.classes, size, seed.generator())
        noise, targets = noise.to(teacher.device), labels.to(teacher.device)
        norms = teacher.batch_norms
        priors = Priors(self.input_weight, self.class_weight, self.variation_weight)

        def loss(pixels: Tensor) -> Tensor:
            logits, statistics = observed(pixels)
            return matching_loss(statistics, norms) + priors(pixels, logits, targets)

        bounds = teacher.input.bounds(noise) if self.clamp else None
        pixels = descend(noise, loss, steps=self.steps, learning_rate=self.learning_rate, bounds=bounds, step=step)
        return {"inputs": pixels, "labels": labels}


METHOD = ZeroQ
