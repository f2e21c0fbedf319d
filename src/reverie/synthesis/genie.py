"""Genie: for each batch of images a fresh generator, and the latent vectors that it makes them of, learned together.

    x = G(z);   minimise over G and z
    loss = (1/L) sum_l mean_c [ ((m_l - mu_l) / sigma_l)^2 + ((s_l - sigma_l) / sigma_l)^2 ]
         + input_weight * mean over images, channels [ m_0^2 + (s_0 - 1)^2 ]
         + class_weight * CE(teacher(x), y) + variation_weight * TV(x)

m_l, s_l are mean and standard deviation of the batch at the input of batch norm l, mu_l and sigma_l its running ones, m_0 and s_0
those of an image itself, y a random label. The teacher's convolutions with a stride are swing convolutions (`graph/swing.py`). What is
common to images the generator learns; what makes one of them the latent vector keeps. Nothing is generated afterwards.

Reference: Jeon et al. 2023, arXiv:2212.04780 (GENIE-D; algorithms 9.2). What the released code does that we do not:

- It sums squared differences over layers in the network's own units, so layers with large values rule the loss; that is
  `relative = false`. We measure in units of sigma_l, and average.
- It takes 4,000 steps; the rate of the latent vectors falls at plateaus of the loss, that of the generator by 0.95 every 100 steps.
  Both fall by a half cosine here, over a known number of steps.
- Its generator has a convolution less, and is 128 channels wide: for 224 px a linear layer of 103 million weights, and three
  times ResNet-18's arithmetic. Ours is that of `_generator`, narrower: its size follows the images', its norms have no classes here, and
  pixels are kept valid.

The class term and the total variation are options that the paper does not have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.checkpoints import Unfinished
from reverie.descent import Descent, below, under
from reverie.errors import check_range
from reverie.graph.batch_norm import Level, Observed, Statistics
from reverie.progress import loss_note
from reverie.randomness import Seed
from reverie.synthesis import Teacher
from reverie.synthesis._generator import Generator
from reverie.synthesis._losses import matching_loss, standard_distance
from reverie.synthesis._pixels import Alignment, BatchMethod, restore_scheduled, scheduled


@dataclass(frozen=True, kw_only=True)
class Genie(BatchMethod):
    """Batch-norm matching by a generator and its latent vectors.

    Args:
        relative: Deviations in units of the running standard deviation, averaged over layers; else absolute and summed over layers, as in
            the paper.
        latent: Length of a latent vector.
        width: Channels of the generator's widest layers; the released code's 128.
        latent_rate: Learning rate of the latent vectors at the first step.
        generator_rate: Learning rate of the generator at the first step.
    """

    batch: int = 128
    steps: int = 200
    relative: bool = True
    latent: int = 256
    width: int = 16
    latent_rate: float = 0.1
    generator_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes, rates = ("latent", "width"), ("latent_rate", "generator_rate")
        check_range(self, **dict.fromkeys(sizes, (1, math.inf)), **dict.fromkeys(rates, (1e-9, math.inf)))

    def statistics_level(self) -> Level:
        """The batch's."""
        return "batch"

    def alignment(
        self, teacher: Teacher, observed: Observed, noise: Tensor, offset: int, generator: torch.Generator
    ) -> Alignment:
        """The distance of the statistics from the running ones."""
        norms = teacher.batch_norms

        def distance(pixels: Tensor, statistics: Statistics) -> Tensor:
            return matching_loss(statistics, norms) if self.relative else standard_distance(statistics, norms)

        return distance

    def optimise(
        self,
        teacher: Teacher,
        noise: Tensor,
        loss: Callable[[Tensor], Tensor],
        seed: Seed,
        step: Callable[..., None],
        unfinished: Unfinished,
    ) -> Float[Tensor, "size channels height width"]:
        """By a generator that is thrown away afterwards."""
        # Norms that know one class are plain ones.
        generator = Generator(
            teacher.input,
            1,
            latent=self.latent,
            width=self.width,
            conditioning="norms",
            epsilon=1e-5,
            seed=seed.at("weights"),
        ).to(noise.device)
        generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        labels = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
        latents = (
            torch.randn(len(noise), self.latent, generator=seed.at("latents").generator()).to(noise.device).requires_grad_()
        )
        rates = (self.latent_rate, self.generator_rate)
        optimizer = torch.optim.Adam(
            [{"params": [latents], "lr": rates[0]}, {"params": list(generator.parameters()), "lr": rates[1]}]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        descent = Descent(
            optimizer,
            place="genie",
            cure=f"try --set synthesis.generator_rate={self.generator_rate / 4:g} with another --output",
        )
        learned = {"latents": latents, **below("generator", generator.state_dict(keep_vars=True))}

        def state() -> dict[str, Tensor]:
            values = {name: value.detach().clone() for name, value in learned.items()}
            return {**scheduled(optimizer, number + 1), **values, **below("descent", descent.state())}

        done, saved = 0, unfinished.load()
        if saved is not None:
            done = restore_scheduled(optimizer, schedule, saved)
            descent.restore(under("descent", saved))
            with torch.no_grad():
                for name, value in learned.items():
                    value.copy_(saved[name])
            step(done, skipped=True)
        for number in range(done, self.steps):
            distance = descent.step(number, {"statistics and priors": loss(generator(latents, labels))})
            schedule.step()
            unfinished.keep(state)
            step(note=loss_note(distance))
        with torch.no_grad():
            images: Tensor = generator(latents, labels)
        return images.cpu().contiguous()


METHOD = Genie
