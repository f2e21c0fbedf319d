"""A recipe decides a result completely: which images, which grids, which rounding, with every number.

A method is its own configuration, so defaults stand once, in its class. As a file a recipe is TOML (`recipes/`).
"""

import math
from dataclasses import dataclass, field

from reverie.errors import ConfigError, check_range
from reverie.export import Exporter
from reverie.graph.placement import Bits, PlacementKind
from reverie.grid import MAX_BITS, MIN_BITS
from reverie.images.mosaic import mosaic_count
from reverie.observers import Observer
from reverie.observers.mse import Mse
from reverie.observers.percentile import Percentile
from reverie.recovery.clipping import Clipping
from reverie.recovery.distillation import After, Distillation
from reverie.recovery.mixed_precision import MixedPrecision
from reverie.recovery.reconstruction import Reconstruction
from reverie.rounding import Rounding
from reverie.rounding.nearest import Nearest
from reverie.synthesis import Synthesis
from reverie.synthesis.zeroq import ZeroQ

# Fewer images do not tell how much they differ.
_LEAST_TO_ESTIMATE_ON = 8


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What is put on which grid.

    Args:
        placement: "integer" (what an integer runtime executes) or "literature" (for comparison with papers).
        weight_bits, activation_bits: 2 to 8; not read where `mixed_precision` chooses.
        end_bits: Bits of the first and last layer and of what they read; ignored by the literature placement.
        stem_bits: Bits of what the first layer writes; likewise. BRECQ, QDrop and Genie count it among the ends.
        sum_bits: Bits of what sums and averages read, such as the stream of a residual network; likewise. Layers that read the same tensor read
            it through a grid of `activation_bits`, if those are fewer.
        symmetric: Activations on signed grids whose zero point is 0, for targets without zero points (`tensorrt`); what follows a ReLU
            then has half of the codes.
        equalize: Cross-layer equalization before anything else.
        bias_correction: Give every channel its mean back after rounding.
        batch_norm_adaptation: Give every channel its mean and deviation back, after rounding, or before distillation, which
            then starts from there (ACQ's, reconstructed).
    """

    placement: PlacementKind = "integer"
    weight_bits: int = 8
    activation_bits: int = 8
    end_bits: int = 8
    stem_bits: int = 8
    sum_bits: int = 8
    symmetric: bool = False
    equalize: bool = False
    bias_correction: bool = True
    batch_norm_adaptation: bool = False

    def __post_init__(self) -> None:
        if self.bias_correction and self.batch_norm_adaptation:
            raise ConfigError(
                "bias_correction must be false with batch_norm_adaptation, got both; adaptation corrects biases too: use "
                "--set quantization.bias_correction=false"
            )
        if self.symmetric and self.placement == "literature":
            raise ConfigError(
                "symmetric must be false with the literature placement, got true; it is for targets without zero points: use "
                "--placement integer"
            )
        bits = (MIN_BITS, MAX_BITS)
        check_range(self, weight_bits=bits, activation_bits=bits, end_bits=bits, stem_bits=bits, sum_bits=bits)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a result but the network and the user's own images.

    Args:
        seed: Of everything random.
        images: Synthetic images; 0 means only the real ones given.
        image_scale: Their height and width, in shares of what the network expects, up to 1. A network that takes any size learns as
            much from images of half the side, four of which cost what one does; real images beside them are scaled down, too.
        mosaic: With an `image_scale` of 1/n, whether the student learns from the synthetic images joined n x n to whole ones, each of
            them twice, and from real images whole; few bits of activations are else fitted to borders that whole images do not have.
        calibration_images: At most so many of the synthetic and of the real images, evenly from all, decide ranges, adaptation, rounding and
            bias correction, which hold in memory what the network computes of them; distillation sees all.
        held_out: Synthetic images, from another seed, on which agreement is measured.
        estimate_images: Synthetic images, made otherwise and from another seed, on which the drop of accuracy is estimated where there
            are no labels; 0 for no estimate.
        real_share: Share of real images in what is learned from, where there are real and synthetic ones, up to 0.9, or 1; 0 means
            in proportion to their numbers, but at most half of a batch of distillation.
        real_apart: Whether ranges and codes are learned from the synthetic images alone, and the whole network distilled on the real ones
            alone, where there are both: images that codes were fitted to have little to say about what is left over.
        synthesis, activations, weights, rounding, export: The methods.
        quantization, mixed_precision, clipping, reconstruction, distillation: The numbers of the stages.
        bits: Of single tensors by name, such as `weights = {fc = 8}`; they win over all else.
    """

    seed: int = 0
    images: int = 64
    image_scale: float = 1.0
    mosaic: bool = False
    calibration_images: int = 256
    held_out: int = 32
    estimate_images: int = 32
    real_share: float = 0.0
    real_apart: bool = False
    synthesis: Synthesis = field(default_factory=ZeroQ)
    quantization: Quantization = field(default_factory=Quantization)
    bits: Bits = field(default_factory=Bits)
    mixed_precision: MixedPrecision = field(default_factory=MixedPrecision)
    activations: Observer = field(default_factory=Percentile)
    weights: Observer = field(default_factory=Mse)
    rounding: Rounding = field(default_factory=Nearest)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    clipping: Clipping = field(default_factory=Clipping)
    distillation: Distillation = field(default_factory=Distillation)
    export: Exporter | None = None

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("images", "held_out", "estimate_images"), (0, math.inf))
        check_range(self, **counts, calibration_images=(1, math.inf), image_scale=(1e-2, 1), real_share=(0, 1))
        if 0 < self.estimate_images < _LEAST_TO_ESTIMATE_ON:
            raise ConfigError(
                f"estimate_images must be at least {_LEAST_TO_ESTIMATE_ON}, or 0, got {self.estimate_images}; fewer do not tell how much they differ"
            )
        if self.mosaic and (self.tiles == 1 or not math.isclose(self.tiles * self.image_scale, 1, abs_tol=5e-3)):
            raise ConfigError(
                f"mosaic must be false with image_scale = {self.image_scale:g}, which is not 1/n of a whole n above 1, got true; use "
                "--set image_scale=0.5, or --set mosaic=false"
            )
        if self.mosaic and self.distillation.class_weight:
            raise ConfigError(
                f"distillation.class_weight must be 0 with mosaic, got {self.distillation.class_weight:g}; an image joined of several "
                "has no one label: use --set mosaic=false"
            )
        if self.real_apart and (self.real_share or not self.distillation.steps):
            raise ConfigError(
                f"real_apart must be false with real_share = {self.real_share:g} and distillation.steps = {self.distillation.steps}, got true; "
                "it distils on real images alone: use --set real_share=0 and at least one step, or --set real_apart=false"
            )
        if self.real_apart and self.quantization.bias_correction:
            raise ConfigError(
                "quantization.bias_correction must be false with real_apart, got true; it would correct on synthetic images what was learned "
                "on real ones: use --set quantization.bias_correction=false"
            )
        if 0.9 < self.real_share < 1:
            raise ConfigError(
                f"real_share must be at most 0.9, or 1, got {self.real_share}; beside a fixed number of synthetic images a batch "
                "would grow without bound"
            )

    @property
    def tiles(self) -> int:
        """How many synthetic images are side by side in what the student learns from; 1 where they are not joined."""
        return round(1 / self.image_scale) if self.mosaic else 1

    @property
    def learned_images(self) -> int:
        """How many images the student learns from that are synthetic, or joined of synthetic ones."""
        return mosaic_count(self.images, self.tiles) if self.mosaic else self.images

    def share_of_real(self, synthetic: int, real: int) -> float:
        """The share of real images in a batch of distillation, where there are `synthetic` and `real` images in all."""
        if not synthetic or not real:
            return float(not synthetic)
        if self.keeps_apart(synthetic, real):
            return 1.0
        # In proportion, a thousand photographs beside 64 synthetic images would be a batch of a thousand.
        return self.real_share or min(real / (real + synthetic), 0.5)

    def keeps_apart(self, synthetic: int, real: int) -> bool:
        """Whether ranges and codes are learned without the real images, where there are `synthetic` and `real` ones in all."""
        return self.real_apart and bool(synthetic and real)

    def distils_after(self, stage: After) -> bool:
        """Whether there is a distillation, and it follows that stage."""
        return self.distillation.steps > 0 and self.distillation.after == stage

    @property
    def mean_bits(self) -> tuple[float, float]:
        """Bits of weights and of activations; where they are chosen, their mean, or what a limit of bit operations leaves for it."""
        settings, mixed = self.quantization, self.mixed_precision
        weights, activations = mixed.effective_bits, mixed.effective_activation_bits
        if product := mixed.bit_operations:
            # A mean of products: shared out evenly where nothing else is said.
            weights = weights or min(product / activations if activations else math.sqrt(product), MAX_BITS)
            activations = activations or min(product / weights, MAX_BITS)
        return round(float(weights or settings.weight_bits), 2), round(float(activations or settings.activation_bits), 2)
