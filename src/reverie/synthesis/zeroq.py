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
  the spectrum of photographs (`start = "white"`: with none), and the rate falls by a half cosine over a known number of steps.
- Its convolutions with a stride see one lattice; ours are swing convolutions (Genie's) unless `swing = false`.
- Its statistics are those of each image; ours are those of the batch unless `level = "sample"`: training images differ
  from each other, and a set in which none may do so is too uniform (DSG's argument).

The class term and the total variation are options that the paper does not have.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.graph.batch_norm import Level, Observed
from reverie.synthesis import Teacher
from reverie.synthesis._losses import matching_loss
from reverie.synthesis._pixels import Alignment, PixelMethod


@dataclass(frozen=True, kw_only=True)
class ZeroQ(PixelMethod):
    """Batch-norm matching by gradient descent on pixels.

    Args:
        level: Statistics of the "batch" or of each "sample".
    """

    level: Level = "batch"

    def statistics_level(self) -> Level:
        """As set."""
        return self.level

    def alignment(
        self, teacher: Teacher, observed: Observed, noise: Tensor, offset: int, generator: torch.Generator
    ) -> Alignment:
        """The distance of the statistics from the running ones."""
        norms = teacher.batch_norms
        return lambda pixels, statistics: matching_loss(statistics, norms)


METHOD = ZeroQ
