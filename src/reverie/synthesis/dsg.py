"""DSG: diverse images: their statistics may deviate a little, and each image minds one layer more than the others do.

    loss = mean over images i, layers l [ X_il SDA_il ] + SCI / L
         + input_weight * mean over images, channels [ m_0^2 + (s_0 - 1)^2 ]
         + class_weight * CE(teacher(x), y) + variation_weight * TV(x)

The first three terms are `_slack`'s: deviations below what Gaussian noise shows are free (SDA), image i minds layer i mod L
more than others (LSE, X), and images are not to share directions with each other (SCI). m_0 and s_0 are those of the
normalized image, y a random label.

Reference: Zhang et al. 2021, arXiv:2103.01049, section 3; Qin et al. 2023, arXiv:2109.00212 (algorithms 4). Beside what
`_slack` lists, what the released code does that we do not:

- It sums over channels, so wide layers and layers with large values rule the loss; we average, in units of sigma_l.
- It counts the class term twice, and adds the images' mean L2 norm and total variation on a shifted copy.
- It starts from uniform noise in [0, 1) with learning rate 0.9 and stops by a plateau of the loss; we start from noise with
  unit variance, and the rate falls by a half cosine over a known number of steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reverie.checkpoints import Checkpoints
from reverie.errors import check_range
from reverie.graph.batch_norm import Observed
from reverie.images import Images
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.synthesis import Teacher, lacks_batch_norm
from reverie.synthesis._pixels import Priors, descend, in_batches, start
from reverie.synthesis._slack import correlation, enhancement, measure_slack, slack_alignment


@dataclass(frozen=True, kw_only=True)
class Dsg:
    """Batch-norm matching of each image, with slack.

    Args:
        batch: Images optimised together. The paper takes L, the released code 40; the layers go on from batch to batch here.
        steps: Adam steps for each batch (500 in the released code, which starts further away).
        learning_rate: Of the first step, in input units; ZeroQ's here.
        quantile: Share of the deviations of noise that is free, epsilon; 0 leaves (almost) no slack. The paper's 0.9 keeps
            small networks' images so near to noise that ResNet-20 at W4A4 lost four points by it.
        relative: Deviations in units of the running standard deviation; else absolute, as in the paper.
        enhancement: Weight of layer i mod L for image i, the others' being 1 (the paper's 2); 1 is none.
        spectrum_weight: Of SCI's part on eigenvalues (the released code's 1e-4).
        direction_weight: Of SCI's part on eigenvectors; 1 in the released code. All that it adds is noise (`_slack`); hence 0.
        input_weight: Of the term on the image's own mean and standard deviation.
        class_weight: Of the cross-entropy to a random label; 0 leaves labels out. The released code's 2 is against a sum
            over channels; what the slack leaves of our averages is small, and more than 0.01 drowns it.
        variation_weight: Of the total variation.
        clamp: Keep pixels valid (between black and white) after each step.
    """

    batch: int = 32
    steps: int = 200
    learning_rate: float = 0.1
    quantile: float = 0.5
    relative: bool = True
    enhancement: float = 2.0
    spectrum_weight: float = 1e-4
    direction_weight: float = 0.0
    input_weight: float = 0.01
    class_weight: float = 0.01
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
            quantile=(0, 1),
            enhancement=(1, math.inf),
            spectrum_weight=(0, math.inf),
            direction_weight=(0, math.inf),
            input_weight=(0, math.inf),
            class_weight=(0, math.inf),
            variation_weight=(0, math.inf),
        )

    def __call__(self, teacher: Teacher, count: int, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` images, batch by batch; each finished batch is a checkpoint."""
        if not teacher.batch_norms:
            raise lacks_batch_norm(teacher.name, "dsg")
        observed = Observed(teacher.graph, "sample")
        made = in_batches(
            lambda number, size, step: self._batch(teacher, observed, number * self.batch, size, seed.at(number), step),
            count,
            batch=self.batch,
            steps=self.steps,
            checkpoints=checkpoints,
            progress=progress,
        )
        return Images(
            inputs=made["inputs"],
            labels=made["labels"] if self.class_weight else None,
            sources=("dsg",) * count,
        )

    def _batch(
        self, teacher: Teacher, observed: Observed, offset: int, size: int, seed: Seed, step: Callable[..., None]
    ) -> dict[str, Tensor]:
        generator = seed.generator()
        noise, labels = start(teacher.input.shape, teacher.classes, size, generator)
        noise, targets = noise.to(teacher.device), labels.to(teacher.device)
        norms = teacher.batch_norms
        with torch.no_grad():
            slack = measure_slack(observed(noise)[1], norms, self.quantile, relative=self.relative)
        weights = enhancement(size, len(norms), offset=offset, factor=self.enhancement).to(teacher.device)
        priors = Priors(self.input_weight, self.class_weight, self.variation_weight)

        def loss(pixels: Tensor) -> Tensor:
            logits, statistics = observed(pixels)
            aligned = slack_alignment(statistics, norms, slack, relative=self.relative)
            total = (weights * aligned).mean() + priors(pixels, logits, targets)
            if self.spectrum_weight or self.direction_weight:
                fresh = torch.randn(pixels.shape, generator=generator).to(pixels.device)
                inhibition = correlation(
                    pixels, fresh, spectrum_weight=self.spectrum_weight, direction_weight=self.direction_weight
                )
                total = total + inhibition / len(norms)
            return total

        bounds = teacher.input.bounds(noise) if self.clamp else None
        pixels = descend(noise, loss, steps=self.steps, learning_rate=self.learning_rate, bounds=bounds, step=step)
        return {"inputs": pixels, "labels": labels}


METHOD = Dsg
