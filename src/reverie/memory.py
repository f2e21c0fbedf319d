"""What memory a run will take at its peak, estimated before anything is made, and how it is kept below a limit.

With W the bytes of the weights, A the bytes that one image's forward pass computes (every tensor once, float32), L the largest of
these tensors, and n a stage's images at a time:

    always       the libraries, 6 W (the module, its graphs, exported files), every set of images once
    synthesize   1.4 n A      what the backward pass reads, and a few gradients; a generator adds its own layers
    calibrate    64 . 4 L     a walk through the network holds a few tensors at a time
    distil       3 n A + 16 W     fake quantization keeps twice as much, and Adam two moments
    round        4 L for every image, up to `reconstruction.cache_gib`: what one unit reads and answers, and 2 n A / 3 for a unit
    measure      2 n A        codes of every tensor, and what is computed from them, of as many images as `export/_verify.py` takes;
                              at least 64 . 4 L, a walk of so many

The estimate is the largest of the stages; how far it is off was measured (docs/benchmarks.md). `cache_gib` is what a limit lowers by
itself, since a cache on the disk gives the same bytes; what else would have to be lower changes the result, and is named.

Not here: a GPU's memory. On one, the weights and activations are there, and the estimate is about both together.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reverie.errors import ConfigError
from reverie.export import _verify as verify
from reverie.images import Images
from reverie.recipe import Recipe
from reverie.report.metrics import BATCH
from reverie.stages import synthesizes
from reverie.synthesis import Streaming, Teacher

_GIB = 2**30
# Python with torch, onnxruntime and what a report needs, with nothing loaded.
_LIBRARIES = int(0.7 * _GIB)
_WALK = 64


@dataclass(frozen=True)
class Estimate:
    """Bytes of each stage at its peak, all that is held anyway included.

    Args:
        stages: By name.
        lower: For each stage, what makes it smaller.
        cache: Of the stage "round", what may as well lie on the disk.
        mapped: What lies there for want of room, at most: the system keeps such files in memory while there is some, and takes it back from
            them first. No stage counts it, though a resident set shows it.
    """

    stages: dict[str, int]
    lower: dict[str, str]
    cache: int
    mapped: int = 0

    @property
    def stage(self) -> str:
        """The one that takes most."""
        return max(self.stages, key=self.stages.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.stages[self.stage]

    def told(self) -> str:
        """For the user."""
        files = f" and up to {self.mapped / _GIB:.1f} GiB of files while there is room" if self.mapped > _GIB / 10 else ""
        return f"memory: about {self.peak / _GIB:.1f} GiB at the peak ({self.stage}){files}, estimated"

    def cache_within(self, limit: float) -> float:
        """GiB that are left for the cache of reconstruction.

        Args:
            limit: GiB for the whole run.

        Raises:
            ConfigError: A stage does not fit without any cache; names it, and what to lower.
        """
        least = {name: size - self.cache * (name == "round") for name, size in self.stages.items()}
        stage = max(least, key=least.__getitem__)
        if least[stage] > limit * _GIB:
            # Rounded up: what is named has to be enough.
            named = math.ceil(10 * least[stage] / _GIB) / 10
            raise ConfigError(
                f"--memory-limit must be at least the {named:.1f} GiB that the stage {stage!r} is estimated to take, got "
                f"{limit:g}; lower {self.lower[stage]}"
            )
        return limit - least.get("round", 0) / _GIB


def estimate(recipe: Recipe, network: Teacher, sets: Mapping[str, Images | None]) -> Estimate:
    """The peak of a run; executes the network on one image.

    Args:
        sets: The real images.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.graph.state_dict().values())
    total, largest = _activations(network)
    area = recipe.image_scale**2
    small = 1.0 if recipe.mosaic else area
    image = 4 * network.input.channels * network.input.height * network.input.width
    # Mosaics show every image twice.
    copied = 2 if recipe.mosaic else int(recipe.real_share > 0)
    made = recipe.images * image * area * (1 + copied) + image * (recipe.held_out + recipe.estimate_images)
    read = sum(part.inputs.numel() * 4 for part in sets.values() if part is not None)
    real = len(sets.get("calibration") or ())
    seen = 0 if recipe.keeps_apart(recipe.images, real) else real
    learned = min(recipe.calibration_images, recipe.learned_images) + min(recipe.calibration_images, seen)
    held = _LIBRARIES + 6 * weights + made + read + learned * image * small
    stages: dict[str, float] = {
        "calibrate": held + min(_WALK, learned) * 4 * largest * small,
        "measure": held + max(2 * verify.images_together(network.input.shape) * total, BATCH * 4 * largest),
    }
    lower = dict.fromkeys(stages, "the number of real images (they are held as network inputs), or use a smaller network")
    own: Any = recipe.synthesis
    batch, whole = getattr(own, "batch", 1), max(recipe.held_out, recipe.estimate_images)
    labelled = (known := sets.get("evaluation")) is not None and known.labels is not None
    if synthesizes(recipe) or (recipe.estimate_images and not labelled):
        sizes = [min(batch, recipe.images) * area, min(batch, whole)]
        extra = 0.0
        if isinstance(own, Streaming) and synthesizes(recipe):
            # Its largest layers have `width` channels at the size of the image, several tensors of each.
            sizes, extra = [batch], batch * 8 * 4 * own.width * network.input.height * network.input.width  # type: ignore[attr-defined]
        stages["synthesize"] = held + 1.4 * max(sizes) * total + extra
        lower["synthesize"] = f"synthesis.batch (now {batch}) with --set, or image_scale"
    if recipe.distillation.steps:
        size = batch if isinstance(own, Streaming) and recipe.distillation.synthetic != "kept" else recipe.distillation.batch
        stages["distil"] = held + 3 * size * total * small + 16 * weights
        lower["distil"] = f"distillation.batch (now {recipe.distillation.batch}) with --set"
    cache = mapped = 0.0
    if recipe.rounding.needs == "reconstruction":
        settings = recipe.reconstruction
        # What the student's unit reads, what the teacher's unit reads and answers, and a shortcut that passes by; of what Fisher weighs, all
        # units' answers at once.
        rows = 4 * largest + (total / 3 if settings.fisher else 0)
        cache = min(settings.cache_gib * _GIB, learned * rows * small)
        mapped = learned * rows * small - cache
        stages["round"] = held + cache + 2 * min(settings.batch, max(learned, 1)) * total * small / 3 + 20 * largest
        lower["round"] = (
            f"reconstruction.batch (now {settings.batch}) or calibration_images (now {recipe.calibration_images}) with --set"
        )
    return Estimate({name: int(size) for name, size in stages.items()}, lower, int(cache), int(mapped))


def estimate_images_alone(recipe: Recipe, network: Teacher, sets: Mapping[str, Images | None]) -> Estimate:
    """As `estimate`, of a run that makes images and nothing of them."""
    found = estimate(replace(recipe, held_out=0, estimate_images=0), network, sets)
    # Images that nothing is optimised for are held, like those that are walked through the network.
    stage = "synthesize" if "synthesize" in found.stages else "calibrate"
    return Estimate({"synthesize": found.stages[stage]}, {"synthesize": found.lower[stage]}, 0)


def limited(recipe: Recipe, found: Estimate, limit: float | None) -> tuple[Recipe, Estimate]:
    """The recipe with a cache that fits, which makes the same bytes, and what it takes.

    Args:
        limit: GiB; None for none.

    Raises:
        ConfigError: No cache is small enough.
    """
    if limit is None:
        return recipe, found
    cache = min(recipe.reconstruction.cache_gib, found.cache_within(limit))
    lean = replace(recipe, reconstruction=replace(recipe.reconstruction, cache_gib=cache))
    moved = max(found.cache - int(cache * _GIB), 0)
    stages = {name: size - moved * (name == "round") for name, size in found.stages.items()}
    return lean, replace(found, stages=stages, cache=found.cache - moved, mapped=found.mapped + moved)


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the tensors that operators make; a view of another tensor, or of one that was there before, is none."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.largest = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in there}
        # Held, so that no address is given out twice.
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._seen:
                self._seen.add(tensor.untyped_storage().data_ptr())
                self._kept.append(tensor)
                size = tensor.numel() * tensor.element_size()
                self.total, self.largest = self.total + size, max(self.largest, size)
        return found


@torch.no_grad()
def _activations(network: Teacher) -> tuple[int, int]:
    """Bytes of all tensors of one image's forward pass, and of the largest."""
    image = torch.zeros(1, *network.input.shape, device=network.device)
    sizes = _Sizes([image, *network.graph.state_dict().values()])
    with sizes:
        network.graph(image)
    return sizes.total, sizes.largest
