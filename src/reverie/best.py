"""`best`: the recipe that measured best for these bits, this network, the images there are and the minutes one has.

It chooses among the recipes that come with Reverie and says why; what it chose is a recipe like any other. The rules and
where they were measured (docs/log.md; ResNet-20 at 32 px unless said):

    weights, activations   rounding                                       because
    8, 8                   nearest, biases corrected (`zeroq`)            0.1 to 0.5 points lost, MobileNetV2 and Lite0 too
    3 to 7, 8              second order (`gptq`)                          as good as learned layer by layer, in a thirtieth of the time
    fewer, or under 8      blocks, half the values dropped (`qdrop`; a    ranges of activations have to be learned with the codes, and what
                           fifth above 64 px, none in 8 bits); to 64 px   blocks leave over is a third less when all is learned at once (and not,
                           then the whole network, distilled              in the few steps that 224 px allow, but where there are photographs)

Bits are the caller's: `best` gives every weight the same unless `effective_bits` says otherwise, and tells whom it would help: networks with
depthwise layers (MobileNetV2 W4A8 loses 1.9 points so, and 4.9 with 4 bits everywhere).

Images: 50 steps from natural noise are worth more than 200 from white noise; the class term harms rounding (ResNet-20, MobileNetV2). Of
large images, 256 of half the side are worth more than 64 whole ones, and a step costs as much (MobileNetV2). Where activations
have fewer than 8 bits there are 1,024, from which the student learns joined 2 x 2 to 512 mosaics, each twice: ranges and codes
are else fitted to borders that whole images do not have (MobileNetV2 W4A4, KL and agreement on photographs: 0.840, 64.5 % from small
images, 0.663, 71.5 % from mosaics), and to so few images. They begin as dead leaves, and half as long a descent leaves the first layers
nearer to those of photographs (0.667, 69.8 % from 512 in 100 steps from natural noise; 0.541, 74.7 %). Not with 8 bits, where 256 small
images are as good.

Ranges of 2-bit activations are those of the smallest error, of 3 to 7 bits those of 99.9 % of values; they are learned three times
as fast at 2 bits and above 64 px. There a step looks at 10 x 10 positions of 32 images, which costs what 12 whole ones do and less,
and leaves a fifth of the values unquantized: with half of them, so few steps fit the noise (MobileNetV2 W4A4, error behind the third block).

Real images: 1,024 stand alone, but where mosaics are learned from, 400 and more are kept apart. From mosaics blocks learn more than from 400
photographs (MobileNetV2 W4A4 on photographs: 0.464, 76.7 % against 0.537, 72.7 %), and what they leave over is taken back on photographs that no code
was fitted to: biases and scales alone, 150 steps, 0.363, 81.2 %. On mosaics the same steps harm (0.583, 72.8 %), on the
photographs that codes were fitted to they help less (0.472, 73.8 %), and 64 photographs are learned by heart (0.499, 76.8 %).

With a budget, the first recipe of the list whose steps fit it, or fit it by half, is taken; the last one is shortened however
much it takes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reverie import received
from reverie.budget import Schedule, check_budget, fit
from reverie.errors import BudgetError, at
from reverie.grid import MAX_BITS, MIN_BITS
from reverie.images import Images
from reverie.models import Network
from reverie.progress import Progress, Silent, duration_text
from reverie.reasons import has_batch_norm, reasons
from reverie.recipe import Recipe
from reverie.recipes import read
from reverie.records import PUT_BACK
from reverie.runs import read_record
from reverie.stages import as_teacher, check_device, takes, with_capsule
from reverie.synthesis import Streaming, Teacher
from reverie.synthesis._capsule import Capsule

# So many real images calibrate and round alone; fewer have synthetic ones beside them.
_ENOUGH_REAL = 1024
# So many are enough to distil on alone, where there are mosaics to round on.
_ENOUGH_TO_DISTIL = 400
# A schedule that is shorter than this share of its own is worse than a cheaper method's whole one.
_LEAST_SHARE = 0.5
# The longer side, in pixels, up to which images are cheap, and from which on smaller ones are made.
_SMALL, _LARGE = 64, 128
# Above 64 px: the side of what a step of reconstruction looks at, and the share of values it leaves unquantized.
_WINDOW, _DROP = 10, 0.2
# The pass of the whole network behind the blocks; changed images keep it from learning those it has by heart.
_DISTILLATION = {
    "distillation.after": "rounding",
    "distillation.steps": 600,
    "distillation.batch": 64,
    "distillation.learning_rate": 1e-3,
    "distillation.scale_rate": 3e-4,
    "distillation.smallest_crop": 0.6,
    "distillation.colour": 0.2,
    "distillation.cut_mix": 0.3,
}
# Above 64 px, behind blocks that learned from mosaics: on real images, few steps and few numbers.
_ON_REAL_IMAGES = {
    "real_apart": True,
    "distillation.after": "rounding",
    "distillation.steps": 150,
    "distillation.batch": 16,
    "distillation.learning_rate": 2e-3,
    "distillation.scale_rate": 1e-3,
    "distillation.learned_weights": False,
    "distillation.smallest_real_crop": 1.0,
}
# What asks for a class where one is wanted, as in the preset `zeroq`.
_CLASS_WEIGHT = 0.1
# The tables of a recipe that say how many bits there are.
_BITS = ("quantization.", "mixed_precision.", "bits.")


@dataclass(frozen=True)
class _Learned:
    """What the student learns from.

    Args:
        alone: Whether nothing else is learned from than real images.
        halved: Whether synthetic ones have half the side, and are whole again once `joined`.
        leaves: Whether they begin as dead leaves.
        apart: Whether codes are learned without the real ones, which are distilled on.
        labelled: Whether synthetic ones are of classes that were asked for, which harms unless labels are wanted.
    """

    alone: bool
    halved: bool
    joined: bool
    leaves: bool
    apart: bool
    labelled: bool


@dataclass(frozen=True)
class Choice:
    """What `best` chose.

    Args:
        preset: The recipe it starts from.
        settings: What it changes in it, by dotted key.
        reasons: Why, a line each.
    """

    preset: str
    settings: Mapping[str, Any]
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        """The preset, and distillation if there is some behind it."""
        return f"{self.preset} and distillation" if "distillation.steps" in self.settings else self.preset

    def recipe(self, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe, with what the user wants otherwise."""
        return read(self.preset, {**self.settings, **(overrides or {})})


def choose(
    network: Network,
    overrides: Mapping[str, Any] | None = None,
    *,
    calibration: Images | None = None,
    capsule: Capsule | None = None,
    minutes: float | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Choice:
    """The recipe for a network.

    Args:
        overrides: What the user wants in any case, by dotted key, such as `{"quantization.weight_bits": 4}`; bits are 8 unless given.
        calibration: Real images.
        capsule: What real images told; read where a wanted method needs it.
        minutes: What the stages that learn may take; candidates are timed against it.
        device: Where.

    Raises:
        ConfigError: An override is wrong, the device is none that PyTorch can use here, or the minutes are no number above 0.
    """
    check_device(device)
    if minutes is not None:
        check_budget(minutes)
    wanted = dict(overrides or {})
    # Biases are corrected in some of the recipes, and are not bits.
    bits_alone = {key: value for key, value in wanted.items() if key.startswith(_BITS)}
    asked = read("zeroq", {"quantization.bias_correction": False} | bits_alone)
    teacher = as_teacher(network, device) if minutes is not None or _side(network) >= _LARGE else None
    bits, real = _fewest_bits(asked), 0 if calibration is None else len(calibration)
    learned = _learned(network, teacher, bits[1], real, wanted)
    # Where bits are chosen, what is placed depends on about how many there will be.
    about = dict(zip(("quantization.weight_bits", "quantization.activation_bits"), bits, strict=True))
    shared = _images(network, learned) | about | _own_bits(asked)
    found = _candidates(*bits, _side(network) > _SMALL, learned.apart, wanted)
    candidates = [Choice(preset, _chosen_methods(shared | settings, wanted), ()) for preset, settings in found]
    choice, told = candidates[0], list[str]()
    if minutes is not None and teacher is not None and len(candidates) > 1:

        def schedule(recipe: Recipe) -> Schedule:
            known = with_capsule(teacher, recipe, calibration, capsule)
            return fit(recipe, known, calibration, minutes, progress=progress or Silent())

        choice, told = _within(minutes, candidates, wanted, schedule)
    why = reasons(choice.recipe(wanted), network, real=real, bits=bits)
    return replace(choice, reasons=(*why, *told))


def chosen_in(folder: Path) -> Choice | None:
    """What was chosen for the run in this folder, so that it goes on with the same; None if nothing was."""
    if not (folder / "run.json").is_file():
        return None
    noted = read_record(folder)["facts"].get("choice")
    if noted is not None:
        with at(f"{folder / 'run.json'}: facts.choice"):
            received.check_structure(noted, Choice, PUT_BACK)
    return None if noted is None else Choice(noted["preset"], noted["settings"], tuple(noted["reasons"]))


def _within(
    minutes: float, candidates: list[Choice], wanted: Mapping[str, Any], schedule: Callable[[Recipe], Schedule]
) -> tuple[Choice, list[str]]:
    """The first of them that fits, or the last, and how that came about.

    Args:
        schedule: What the minutes make of a recipe.
    """
    told: list[str] = []
    for candidate in candidates:
        name = candidate.name
        try:
            factor = schedule(candidate.recipe(wanted)).factor
        except BudgetError as error:
            short = f"{name}: {str(error).partition(';')[0]}"
        else:
            if factor >= _LEAST_SHARE:
                return candidate, [*told, f"budget: {name} {'fits' if name == candidate.preset else 'fit'} {minutes:g} min"]
            short = f"{name} would take about {duration_text(60 * minutes / factor)}"
        told.append(f"budget: {short}, {'and nothing is quicker' if candidate is candidates[-1] else 'so not that'}")
    return candidates[-1], told


def _fewest_bits(recipe: Recipe) -> tuple[int, int]:
    """The bits of weights and activations that a method must cope with: those of the tensors that have the fewest.

    Where bits are chosen, most tensors will have at least the mean rounded down.
    """
    weights, activations = recipe.mean_bits
    # Rounded down to bits that there are.
    return (
        min(max(int(weights), MIN_BITS), *recipe.bits.weights.values(), MAX_BITS),
        min(max(int(activations), MIN_BITS), *recipe.bits.activations.values(), MAX_BITS),
    )


def _own_bits(recipe: Recipe) -> dict[str, int]:
    """The bits of all tensors where nothing chooses them, which are not those that decided the method if single ones have fewer."""
    mixed, settings = recipe.mixed_precision, recipe.quantization
    weights = {} if mixed.chooses_weights else {"quantization.weight_bits": settings.weight_bits}
    return weights | ({} if mixed.chooses_activations else {"quantization.activation_bits": settings.activation_bits})


def _candidates(
    weights: int, activations: int, large: bool, apart: bool, wanted: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Presets and what is changed in them, better ones first.

    Args:
        apart: Whether real images are to be distilled on alone.
    """
    if weights == activations == MAX_BITS:
        return [("zeroq", {})]
    gptq: tuple[str, dict[str, Any]] = ("gptq", {})
    if activations == MAX_BITS and weights > 2:
        return [gptq]
    coarse = activations == 2
    blocks: dict[str, Any] = {"activations.method": "mse"} if coarse and "activations.percentile" not in wanted else {}
    blocks["reconstruction.range_rate"] = 1e-2 if coarse or large else 3e-3
    if large:
        blocks |= {"reconstruction.window": _WINDOW, "reconstruction.drop": _DROP}
    if activations == MAX_BITS:
        blocks |= {"activations.percentile": 99.99, "reconstruction.drop": 0.0}
    qdrop = ("qdrop", blocks)
    if large:
        tuned = ("qdrop", blocks | _ON_REAL_IMAGES)
        if apart and wanted.get("real_apart"):
            return [tuned]
        return [tuned, qdrop, gptq] if apart else [qdrop, gptq]
    if wanted.get("distillation.steps") == 0:
        return [qdrop, gptq]
    # An image with a patch of another has no one class.
    mixed = {"distillation.cut_mix": 0.0} if wanted.get("distillation.class_weight") else {}
    return [("qdrop", blocks | _DISTILLATION | mixed), qdrop, gptq]


def _chosen_methods(settings: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those of methods in whose place the user wants others."""
    kept = dict(settings)
    for table, usual in (("synthesis", "zeroq"), ("activations", "percentile")):
        ours = settings.get(f"{table}.method", usual)
        if wanted.get(f"{table}.method", ours) != ours:
            kept = {key: value for key, value in kept.items() if not key.startswith(f"{table}.")}
    return kept


def _side(network: Network) -> int:
    return max(network.input.height, network.input.width)


def _halves(teacher: Teacher, wanted: Mapping[str, Any]) -> bool:
    """Whether the student is to learn from images of half the side: the network takes them, and nothing that the user wants speaks against it."""
    method = read("zeroq", {"synthesis.method": wanted.get("synthesis.method", "zeroq")}).synthesis
    if "image_scale" in wanted or isinstance(method, Streaming):
        return False
    return max(teacher.input.shape[1:]) >= _LARGE and takes(replace(teacher, input=teacher.input.scaled(0.5)))


def _joins(network: Network, activations: int, wanted: Mapping[str, Any]) -> bool:
    """Whether images of half the side are to be joined to whole ones: bits are few and the sides even, unless the user says."""
    if "mosaic" in wanted:
        return bool(wanted["mosaic"])
    if wanted.get("distillation.class_weight"):
        # One that is joined of several has no one class.
        return False
    return activations < MAX_BITS and network.input.height % 2 == 0 and network.input.width % 2 == 0


def _keeps_apart(real: int, wanted: Mapping[str, Any]) -> bool:
    """Whether the real images are to be distilled on alone: they are many, or the user says so, and wants nothing that leaves no sense in it."""
    if wanted.get("real_share") or wanted.get("distillation.steps") == 0 or wanted.get("distillation.after") == "calibration":
        return False
    if wanted.get("quantization.bias_correction"):
        # It would correct on mosaics what was learned on real images.
        return False
    return bool(real and wanted.get("real_apart", real >= _ENOUGH_TO_DISTIL))


def _learned(network: Network, teacher: Teacher | None, activations: int, real: int, wanted: Mapping[str, Any]) -> _Learned:
    """What is learned from where there are `real` real images.

    Args:
        teacher: None where no other size than the network's is thought of.
        activations: Their bits.
    """
    halved = teacher is not None and _halves(teacher, wanted)
    joined = halved and _joins(network, activations, wanted)
    dreams = has_batch_norm(network) and wanted.get("images") != 0
    if joined and not dreams:
        # Real images are whole without being joined.
        halved = joined = False
    apart = joined and _keeps_apart(real, wanted)
    alone = real > 0 and not (dreams and (apart or real < _ENOUGH_REAL))
    leaves = joined and wanted.get("synthesis.method", "zeroq") == "zeroq"
    return _Learned(alone, halved, joined, leaves, apart, labelled=bool(wanted.get("distillation.class_weight")))


def _images(network: Network, learned: _Learned) -> dict[str, Any]:
    """How many images of which kind and size."""
    settings: dict[str, Any] = {"image_scale": 0.5} if learned.halved else {}
    if learned.alone:
        return settings | {"images": 0, "held_out": 0, "calibration_images": _ENOUGH_REAL}
    side = _side(network)
    if side <= _SMALL:
        count, steps, batch = 1024, 50, 128
    elif learned.halved:
        count, steps, batch = (1024, 50, 64) if learned.joined else (256, 100, 64)
        # Those that agreement is measured on have the network's own size.
        settings["held_out"] = 16
    else:
        count, steps, batch = 256 if side < _LARGE else 64, 50, 32
    settings |= {
        "images": count,
        "calibration_images": count,
        "synthesis.method": "zeroq",
        "synthesis.steps": steps,
        "synthesis.batch": batch,
        "synthesis.class_weight": _CLASS_WEIGHT if learned.labelled else 0.0,
    }
    if learned.leaves:
        settings |= {"synthesis.start": "leaves", "synthesis.learning_rate": 0.05}
    return settings | ({"mosaic": True} if learned.joined else {})
