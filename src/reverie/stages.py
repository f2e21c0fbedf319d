"""What a recipe makes of a network and of images before anything is learned: teacher, images, student, batches.

The table of contents (`pipeline.py`) and the budget's trials (`budget.py`) begin with the same.
"""

import copy
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, fx

from reverie.checkpoints import Checkpoints
from reverie.errors import ConfigError, at
from reverie.graph.capture import capture
from reverie.graph.equalize import equalize
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import Bits, Student, place
from reverie.graph.sums import separate_sums
from reverie.graph.unfold import unfold
from reverie.graph.units import find_units
from reverie.images import Images
from reverie.images.augment import Augmentation
from reverie.images.mosaic import join
from reverie.images.source import Augmented, Mixed, Shuffled, Source
from reverie.models import Network
from reverie.plugins import name_of
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.recipe import Quantization, Recipe
from reverie.recipes import fingerprint
from reverie.recovery.border import check_isolated
from reverie.recovery.distillation import check_learns
from reverie.recovery.mixed_precision import Decision, check_budgets, choose_bits
from reverie.synthesis import ImageStream, Streaming, Teacher, lacks_capsule
from reverie.synthesis._capsule import Capsule, capsule_of, check_capsule
from reverie.synthesis.zeroq import ZeroQ


def check_device(device: str) -> None:
    """Refuses a device that PyTorch cannot use here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # An AssertionError where torch was built without CUDA.
        usable = ["cpu", *([accelerator.type] if (accelerator := torch.accelerator.current_accelerator()) else [])]
        cure = f"use {' or '.join(map(repr, usable))}"
        raise ConfigError(f"device must be one that PyTorch can use here, got {device!r}; {cure}") from error


def as_teacher(network: Network, device: str = "cpu") -> Teacher:
    """The captured full-precision network, on `device`."""
    here = next((tensor.device for tensor in network.module.state_dict().values()), torch.device("cpu"))
    # Moved before it is captured: a tensor that forward makes on the weights' device is a constant of the graph.
    module = network.module if here == torch.device(device) else copy.deepcopy(network.module).to(device)
    graph = capture(module, network.input.shape, name=network.name)
    return Teacher(graph, network.input, network.classes, network.name, network.fingerprint)


def views(recipe: Recipe, teacher: Teacher) -> tuple[Teacher, Teacher]:
    """The teacher as it sees the synthetic images, and as it sees what the student learns from.

    Both may be smaller than what it was made for; mosaics of such images are not.

    Raises:
        ConfigError: It does not take that size.
    """
    # Without images to join there are no small ones: real ones beside mosaics are whole.
    if recipe.image_scale == 1 or (recipe.mosaic and not recipe.images):
        return teacher, teacher
    small = replace(teacher, input=teacher.input.scaled(recipe.image_scale), whole=teacher.input)
    if not takes(small):
        _, height, width = small.input.shape
        raise ConfigError(
            f"image_scale must be 1 for {teacher.name}, which does not take images of {height} x {width}, got "
            f"{recipe.image_scale:g}; use --set image_scale=1"
        )
    return small, teacher if recipe.mosaic else small


@torch.no_grad()
def takes(teacher: Teacher) -> bool:
    """Whether the network answers images of its contract's size, whatever size it was made for."""
    noise = torch.randn(2, *teacher.input.shape, generator=Seed(0).generator()).to(teacher.device)
    try:
        return bool(teacher.graph(noise).shape == (2, teacher.classes))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        # What PyTorch's operators and checks in a network's own code raise for shapes.
        return False


def synthesizes(recipe: Recipe) -> bool:
    """Whether the recipe makes images."""
    return recipe.images > 0 or recipe.held_out > 0


TITLES: dict[str, dict[str, str]] = {
    "held-out": {"synthesize": "held-out images", "refine": "refine held-out"},
    "estimate": {"synthesize": "estimate images"},
}
"""What progress calls the stages that make a set of images other than those to learn from."""


def plan(recipe: Recipe, *, labelled: bool, batch_norms: bool = True) -> dict[str, float]:
    """The stages that take time, in their order, with relative costs as seen on small networks.

    Args:
        labelled: Whether there are labelled images, so that the drop is not estimated.
        batch_norms: Whether the network has any, without which it cannot be.
    """
    streams, found = isinstance(recipe.synthesis, Streaming), dict[str, float]()
    # Held-out images have the network's own size.
    whole = recipe.held_out / (recipe.images * recipe.image_scale**2) if recipe.images else float(recipe.held_out > 0)
    for name, cost in (("images", float(recipe.images > 0)), ("held-out", whole)):
        titles = TITLES.get(name, {})
        # A generator is trained once, for both sets.
        if cost and not (streams and found):
            found[titles.get("synthesize", "synthesize")] = 6.0 if streams else 6.0 * cost
        if cost and getattr(recipe.synthesis, "refine_steps", 0):
            found[titles.get("refine", "refine")] = 5.0 * cost
    if recipe.estimate_images and not labelled and batch_norms:
        found[TITLES["estimate"]["synthesize"]] = 1.0
    first, last = recipe.distils_after("calibration"), recipe.distils_after("rounding")
    adapts = {"adapt batch norms": 0.5} if recipe.quantization.batch_norm_adaptation else {}
    found |= {"sensitivity": 0.5} if recipe.mixed_precision.chooses else {}
    found |= {"excite": 2.0} if recipe.clipping.images else {}
    found["calibrate"] = 0.5
    if first:
        found |= adapts | {"distil": 8.0}
    if recipe.rounding.needs == "reconstruction":
        found["round"] = 5.0
    elif recipe.rounding.needs == "moments":
        found["round"] = 0.5
    found |= {} if first else adapts
    found |= {"distil": 8.0} if last else {}
    found |= {"correct biases": 0.5} if recipe.quantization.bias_correction else {}
    found |= {"export": 0.3, "verify": 0.5} if recipe.export is not None else {}
    found["evaluate"] = 2.0
    found |= {"time": 0.3} if recipe.export is not None else {}
    return found | {"report": 0.3}


def method_name(recipe: Recipe) -> str:
    """The name of the recipe's synthesis method."""
    return name_of(recipe.synthesis)


def reads_capsule(recipe: Recipe) -> bool:
    """Whether the recipe makes images, by a method that reads what real images tell about each class."""
    return synthesizes(recipe) and recipe.synthesis.needs_capsule


def reads_labels(recipe: Recipe, *, capsule: bool) -> bool:
    """Whether real images must have labels: for what the recipe reads about each class, unless a capsule tells, or for a class term."""
    taught = recipe.distillation.steps > 0 and recipe.distillation.class_weight > 0
    return taught or (reads_capsule(recipe) and not capsule)


def with_capsule(teacher: Teacher, recipe: Recipe, calibration: Images | None, capsule: Capsule | None) -> Teacher:
    """The teacher with what real images tell: about its classes, if the recipe reads that, and in place of folded batch norms.

    Raises:
        ConfigError: The recipe reads it, and there are neither real images nor a capsule; or they are not what is needed.
    """
    if not reads_capsule(recipe) and (capsule is None or teacher.batch_norms):
        return teacher
    if capsule is None:
        if calibration is None:
            raise lacks_capsule(teacher.name, method_name(recipe))
        with at("calibration images"):
            capsule = capsule_of(teacher, calibration)
    else:
        with at("capsule"):
            check_capsule(capsule, teacher)
    graph = teacher.graph if teacher.batch_norms else unfold(teacher.graph, capsule.overall())
    return replace(teacher, graph=graph, capsule=capsule)


def synthesize(recipe: Recipe, teacher: Teacher, count: int, name: str, checkpoints: Checkpoints, progress: Progress) -> Images:
    """`count` images of the set `name` by the recipe's method, with the teacher's answers and their provenance."""
    seed, method = Seed(recipe.seed, (name,)), recipe.synthesis
    if isinstance(method, Streaming):
        # One generator makes both sets: a second one would cost as much again.
        stream = stream_of(recipe, method, teacher, checkpoints, progress)
        images = stream.sample(count, seed, checkpoints=checkpoints.at(name), progress=progress)
    else:
        images = method(teacher, count, seed=seed, checkpoints=checkpoints.at(name), progress=progress)
    provenance = {
        "method": method_name(recipe),
        "recipe": fingerprint(recipe),
        "seed": str(recipe.seed),
        "network": f"{teacher.name} {teacher.fingerprint}",
    }
    if teacher.whole is not None:
        provenance["input_size"] = f"{teacher.whole.height} x {teacher.whole.width}"
    return Images(
        inputs=images.inputs,
        labels=images.labels,
        logits=teacher.logits(images.inputs),
        sources=images.sources,
        provenance=provenance,
    )


def answered(images: Images | None, teacher: Teacher) -> Images | None:
    """The user's images in the size that the student learns from, with the teacher's answers."""
    if images is None:
        return None
    images = images.resized(*teacher.input.shape[1:])
    return replace(images, logits=teacher.logits(images.inputs))


def learned_from(recipe: Recipe, teacher: Teacher, images: Images, *places: str) -> Images:
    """What the student learns from: the synthetic images, or mosaics of them with the teacher's answers.

    Args:
        teacher: As it sees whole images.
        places: Where else than in a run mosaics are drawn.
    """
    if not recipe.mosaic:
        return images
    mosaics = join(images, recipe.tiles, Seed(recipe.seed, (*places, "mosaic")))
    return replace(mosaics, logits=teacher.logits(mosaics.inputs))


def estimating(recipe: Recipe) -> Recipe:
    """The recipe with the method whose images the drop is estimated on (`report/estimate.py`), whatever its own is.

    Batch norms matched from white noise, no classes asked for: images that no preset learns from. What a student learned from, or
    is alike, flatters it; images of classes are so clear that it answers them right until it is ruined (docs/log.md).
    """
    return replace(recipe, synthesis=ZeroQ(start="white", swing=False, input_weight=0.0, steps=40))


def stream_of(recipe: Recipe, method: Streaming, teacher: Teacher, checkpoints: Checkpoints, progress: Progress) -> ImageStream:
    """The recipe's generator after its warm-up, whose end is a checkpoint."""
    seed = Seed(recipe.seed, ("images",))
    return method.stream(teacher, seed=seed, checkpoints=checkpoints.at("images"), progress=progress)


def student_of(graph: fx.GraphModule, settings: Quantization, bits: Bits | None = None) -> tuple[fx.GraphModule, Student]:
    """The full-precision graph that a student is compared with (folded, equalized if asked, sums apart), and the student.

    Args:
        bits: Of single tensors, where they are others than `settings` says.
    """
    reference = fold_batch_norms(graph) if settings.placement == "integer" else graph
    if settings.equalize:
        reference = equalize(reference)
    if settings.placement == "integer" and settings.activation_bits < settings.sum_bits:
        reference = separate_sums(reference)
    return reference, place(
        reference,
        settings.placement,
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
        end_bits=settings.end_bits,
        stem_bits=settings.stem_bits,
        sum_bits=settings.sum_bits,
        symmetric=settings.symmetric,
        bits=bits,
    )


def check_bits(recipe: Recipe, teacher: Teacher) -> None:
    """Refuses bits of tensors that are not there, and a mean of bits that cannot be reached.

    Raises:
        ConfigError: Names the tensor, or the least that can be reached.
    """
    if recipe.mixed_precision.chooses or recipe.bits != Bits():
        reference, student = student_of(teacher.graph, replace(recipe.quantization, equalize=False), recipe.bits)
        check_budgets(reference, student, teacher.input.shape, recipe.mixed_precision, recipe.bits)


def check_captured(recipe: Recipe, teacher: Teacher) -> None:
    """Refuses what only the captured graph can tell, before anything is made.

    Raises:
        ConfigError: As `check_bits`; or distillation has nothing to learn.
        ModelError: A unit of reconstruction cannot be executed by itself; names it, with the reason.
    """
    check_bits(recipe, teacher)
    _check_units(recipe, teacher)
    if recipe.distillation.steps and not recipe.distillation.learned_weights:
        _, student = student_of(teacher.graph, replace(recipe.quantization, equalize=False))
        check_learns(student, recipe.distillation)


def _check_units(recipe: Recipe, teacher: Teacher) -> None:
    if recipe.rounding.needs != "reconstruction":
        return
    reference, student = student_of(teacher.graph, replace(recipe.quantization, equalize=False))
    kind = recipe.reconstruction.unit
    # Only rows are counted, so noise will do.
    noise = torch.randn(2, *teacher.input.shape, generator=Seed(0).generator()).to(teacher.device)
    check_isolated(reference, student.graph, find_units(reference, kind), kind, noise)


def decide_bits(
    recipe: Recipe, teacher: Teacher, reference: fx.GraphModule, student: Student, inputs: Tensor, progress: Progress
) -> Decision:
    """The bits of every tensor, where the recipe leaves them to be chosen.

    Args:
        teacher: Budgets are about the images that it expects.
        reference, student: As `student_of` gives them for the recipe's own bits.
        inputs: Calibration images, on the student's device.
    """
    return choose_bits(
        reference,
        student,
        inputs,
        recipe.mixed_precision,
        shape=teacher.input.shape,
        fixed=recipe.bits,
        activations=recipe.activations,
        weights=recipe.weights,
        seed=Seed(recipe.seed, ("sensitivity",)),
        progress=progress,
    )


def rounded_on(recipe: Recipe, images: dict[str, Images]) -> dict[str, Images]:
    """Of the sets by name, those that ranges and codes are learned from."""
    apart = recipe.keeps_apart(len(images) - ("real" in images), "real" in images)
    return {name: part for name, part in images.items() if not (apart and name == "real")}


def share_weights(recipe: Recipe, images: dict[str, Images]) -> Tensor | None:
    """How often each image is to be drawn; None for all alike."""
    if not recipe.real_share or len(images) == 1:
        return None
    share = recipe.real_share
    shares = ((share if name == "real" else 1 - share) for name in images)
    return torch.cat([torch.full((len(part),), each / len(part)) for part, each in zip(images.values(), shares, strict=True)])


def composition(recipe: Recipe, share: float) -> dict[str, int]:
    """How many images of which kind a step of the student sees, where `share` of them are real.

    "fresh" ones come from a generator that goes on training, "kept" and "real" ones from sets that are given.
    """
    settings, method = recipe.distillation, recipe.synthesis
    if share == 1:
        return {"real": settings.batch}
    sizes: dict[str, int] = {}
    if isinstance(method, Streaming) and settings.synthetic != "kept":
        sizes["fresh"] = method.batch
    if not sizes or settings.synthetic == "both":
        sizes["kept"] = settings.batch
    real = round(sum(sizes.values()) * share / (1 - share))
    return sizes | ({"real": real} if real else {})


def source_of(
    recipe: Recipe, teacher: Teacher, images: dict[str, Images], checkpoints: Checkpoints, progress: Progress
) -> tuple[Source, dict[str, int]]:
    """Where distillation gets its batches from, and how many images of which kind each holds."""
    settings, method, name = recipe.distillation, recipe.synthesis, method_name(recipe)
    sizes = composition(recipe, recipe.share_of_real(*(len(images.get(part, ())) for part in (name, "real"))))
    seed = Seed(recipe.seed, ("distillation",))
    crops, real_crops = (settings.augmentation(real=real) for real in (False, True))

    def drawn(kind: str, count: int, augmentation: Augmentation | None) -> Source:
        """Batches of a set that is given."""
        place = seed.at("real" if kind == "real" else "synthetic")
        return Shuffled(
            images[kind], count, seed=place, device=teacher.device, augmentation=augmentation, teacher=teacher.graph
        )

    parts: dict[str, Source] = {}
    if isinstance(method, Streaming) and "fresh" in sizes:
        parts["fresh"] = stream_of(recipe, method, teacher, checkpoints, progress)
        if crops is not None:
            parts["fresh"] = Augmented(parts["fresh"], crops, seed=seed.at("crops"), teacher=teacher.graph)
    if "kept" in sizes:
        parts["kept"] = drawn(name, sizes["kept"], crops)
    if "real" in sizes:
        parts["real"] = drawn("real", sizes["real"], real_crops)
    told = {"fresh": f"fresh {name}", "kept": name, "real": "real"}
    return reduce(Mixed, parts.values()), {told[kind]: size for kind, size in sizes.items()}
