"""DSG with a generator: GDFQ's, whose batch-norm statistics get slack, layerwise enhancement and less correlation.

    loss = class_weight * CE(T(x), y) + statistics_weight * mean over images i, layers l [ X_il SDA_il ] + SCI / L

SDA (slack), X (enhancement of layer i mod L in image i) and SCI (correlation) are `_slack`'s, as in `dsg.py`, on the
statistics of each image; x = G(z, y). Image i is counted over all batches, so every layer is enhanced in turn.

Reference: Qin et al. 2023, arXiv:2109.00212 (the journal's version for fine-tuning; algorithms 4.4). What the released code does
that we do not: the absolute value around its hinge pulls deviations towards the slack instead of letting them be below; its
enhancement weighs one channel, not one image; its correlation has no gradient; it uses variances with the slack of
deviations. The student's side is `recovery/distillation.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from reverie.errors import check_range
from reverie.graph.batch_norm import Level
from reverie.randomness import Seed
from reverie.synthesis import Teacher
from reverie.synthesis._photographs import to_inputs
from reverie.synthesis._slack import correlation, enhancement, measure_slack, slack_alignment
from reverie.synthesis._stream import GeneratorMethod, GeneratorStream


class DsgGeneratorStream(GeneratorStream):
    """DSG's loss, and the slack that a batch of noise shows."""

    settings: "DsgGenerator"
    level: ClassVar[Level] = "sample"

    def __init__(self, settings: "DsgGenerator", teacher: Teacher, seed: Seed) -> None:
        super().__init__(settings, teacher, seed)
        noise = torch.randn(settings.batch, *teacher.input.shape, generator=seed.at("slack").generator())
        with torch.no_grad():
            gain, offset = to_inputs(teacher.input)
            shown = self.observed((noise * gain + offset).to(self.device))[1]
        self.slack = measure_slack(shown, self.norms, settings.quantile, relative=settings.relative)

    def judge(self, inputs: Tensor, labels: Tensor, place: int, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Cross-entropy, enhanced slack alignment, and correlation."""
        settings, layers = self.settings, len(self.norms)
        logits, statistics = self.observed(inputs)
        aligned = slack_alignment(statistics, self.norms, self.slack, relative=settings.relative)
        weights = enhancement(len(inputs), layers, offset=place, factor=settings.enhancement)
        terms = {
            "class": settings.class_weight * functional.cross_entropy(logits, labels),
            "statistics": settings.statistics_weight * (weights.to(aligned) * aligned).mean(),
        }
        if settings.spectrum_weight or settings.direction_weight:
            fresh = torch.randn(inputs.shape, generator=random).to(inputs)
            parts = {"spectrum_weight": settings.spectrum_weight, "direction_weight": settings.direction_weight}
            terms["correlation"] = correlation(inputs, fresh, **parts) / layers
        return terms, logits


@dataclass(frozen=True, kw_only=True)
class DsgGenerator(GeneratorMethod):
    """A generator whose images' statistics have slack.

    Args:
        quantile: Share of the deviations of noise that is free; see `dsg`.
        enhancement: Weight of layer i mod L for image i, the others' being 1; 1 is none.
        spectrum_weight, direction_weight: Of the correlation's parts on eigenvalues and eigenvectors; see `dsg`.
    """

    statistics_weight: float = 1.0
    quantile: float = 0.5
    enhancement: float = 2.0
    spectrum_weight: float = 1e-4
    direction_weight: float = 0.0

    stream_type: ClassVar[type[GeneratorStream]] = DsgGeneratorStream

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("spectrum_weight", "direction_weight")
        check_range(self, quantile=(0, 1), enhancement=(1, math.inf), **dict.fromkeys(weights, (0, math.inf)))


METHOD = DsgGenerator
