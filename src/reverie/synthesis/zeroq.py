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

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from reverie.checkpoints import Checkpoints
from reverie.errors import check_range
from reverie.graph.batch_norm import Level, Observed
from reverie.images import Images
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.synthesis import Teacher, batches, lacks_batch_norm
from reverie.synthesis._losses import matching_loss, total_variation


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
        inputs, labels = [], []
        with progress.stage("synthesize", total=self.steps * -(-count // self.batch)) as step:
            for number, size in batches(count, self.batch):
                name = f"images-{number}"
                part = checkpoints.load(name)
                if part is None:
                    part = self._batch(teacher, observed, size, seed.at(number), step)
                    checkpoints.save(name, part)
                else:
                    step(self.steps)
                inputs.append(part["inputs"])
                labels.append(part["labels"])
        return Images(
            inputs=torch.cat(inputs),
            labels=torch.cat(labels) if self.class_weight else None,
            sources=("zeroq",) * count,
        )

    def _batch(
        self, teacher: Teacher, observed: Observed, size: int, seed: Seed, step: Callable[..., None]
    ) -> dict[str, Tensor]:
        generator = seed.generator()
        start = torch.randn(size, *teacher.input.shape, generator=generator)
        labels = torch.randint(teacher.classes, (size,), generator=generator)
        # Channels-last makes a step 1.3 (32 px) to 1.8 (224 px) times faster on a CPU.
        pixels = start.to(teacher.device).contiguous(memory_format=torch.channels_last).requires_grad_()
        low, high = teacher.input.bounds(pixels)
        targets = labels.to(teacher.device)
        norms = teacher.batch_norms
        optimizer = torch.optim.Adam([pixels], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            logits, statistics = observed(pixels)
            loss = matching_loss(statistics, norms) + self._priors(pixels, logits, targets)
            (pixels.grad,) = torch.autograd.grad(loss, pixels)
            optimizer.step()
            schedule.step()
            if self.clamp:
                with torch.no_grad():
                    torch.clamp(pixels, low, high, out=pixels)
            step()
        return {"inputs": pixels.detach().cpu().contiguous(), "labels": labels}

    def _priors(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        total = logits.new_zeros(())
        if self.input_weight:
            deviation, mean = torch.std_mean(pixels.flatten(2), dim=2, correction=0)
            total = total + self.input_weight * (mean.square() + (deviation - 1).square()).mean()
        if self.class_weight:
            total = total + self.class_weight * functional.cross_entropy(logits, labels)
        if self.variation_weight:
            total = total + self.variation_weight * total_variation(pixels)
        return total


METHOD = ZeroQ
