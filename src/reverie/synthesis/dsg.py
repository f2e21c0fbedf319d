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
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.errors import check_range
from reverie.graph.batch_norm import Level, Observed, Statistics
from reverie.synthesis import Teacher
from reverie.synthesis._pixels import Alignment, PixelMethod, Start
from reverie.synthesis._slack import correlation, enhancement, measure_slack, slack_alignment


@dataclass(frozen=True, kw_only=True)
class Dsg(PixelMethod):
    """Batch-norm matching of each image, with slack.

    The paper's batch is as large as there are layers, the released code's is 40; the layers go on from batch to batch here.
    The released code makes 500 steps and starts further away. Its class weight of 2 is against a sum over channels; what the slack
    leaves of our averages is small, and more than 0.01 drowns it. Its images start as white noise, since slack is what noise may keep:
    natural noise leaves little of the diversity that slack buys. Nor do its convolutions swing, unless told to.

    Args:
        quantile: Share of the deviations of noise that is free, epsilon; 0 leaves (almost) no slack. The paper's 0.9 keeps
            small networks' images so near to noise that ResNet-20 at W4A4 lost four points by it.
        relative: Deviations in units of the running standard deviation; else absolute, as in the paper.
        enhancement: Weight of layer i mod L for image i, the others' being 1 (the paper's 2); 1 is none.
        spectrum_weight: Of SCI's part on eigenvalues (the released code's 1e-4).
        direction_weight: Of SCI's part on eigenvectors; 1 in the released code. All that it adds is noise (`_slack`); hence 0.
    """

    steps: int = 200
    swing: bool = False
    start: Start = "white"
    input_weight: float = 0.01
    class_weight: float = 0.01
    quantile: float = 0.5
    relative: bool = True
    enhancement: float = 2.0
    spectrum_weight: float = 1e-4
    direction_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("spectrum_weight", "direction_weight")
        check_range(self, quantile=(0, 1), enhancement=(1, math.inf), **dict.fromkeys(weights, (0, math.inf)))

    def statistics_level(self) -> Level:
        """Each sample's."""
        return "sample"

    def alignment(
        self, teacher: Teacher, observed: Observed, noise: Tensor, offset: int, generator: torch.Generator
    ) -> Alignment:
        """Enhanced slack alignment, and correlation."""
        norms = teacher.batch_norms
        with torch.no_grad():
            slack = measure_slack(observed(noise)[1], norms, self.quantile, relative=self.relative)
        weights = enhancement(len(noise), len(norms), offset=offset, factor=self.enhancement).to(teacher.device)

        def loss(pixels: Tensor, statistics: Statistics) -> Tensor:
            total = (weights * slack_alignment(statistics, norms, slack, relative=self.relative)).mean()
            if self.spectrum_weight or self.direction_weight:
                fresh = torch.randn(pixels.shape, generator=generator).to(pixels.device)
                parts = {"spectrum_weight": self.spectrum_weight, "direction_weight": self.direction_weight}
                total = total + correlation(pixels, fresh, **parts) / len(norms)
            return total

        return loss


METHOD = Dsg
