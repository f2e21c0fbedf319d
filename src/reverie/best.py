"""`best`: the recipe that measured best for these bits, this network, the images there are and the minutes one has.

It chooses among the recipes that come with Reverie and says why; what it chose is a recipe like any other. The rules and
where they were measured (docs/log.md; ResNet-20 at 32 px unless said):

    weights, activations   rounding                                       because
    8, 8                   nearest, biases corrected (`zeroq`)            0.1 to 0.5 points lost, MobileNetV2 and Lite0 too
    3 to 7, 8              second order (`gptq`)                          as good as learned layer by layer, in a thirtieth of the time
    fewer, or under 8      blocks, half the values dropped (`qdrop`),     ranges of activations have to be learned with the codes, and what
                           then the whole network, distilled              blocks leave over is a third less when all is learned at once

Images: 50 steps from natural noise are worth more than 200 from white noise; the class term helps where there are fewer images than
classes (MobileNetV2) and harms where there are many (ResNet-20). Ranges of 2-bit activations are those of the smallest error and are
learned three times as fast; of 3 to 7 bits those of 99.9 % of values.

With a budget, the first recipe of the list whose steps fit it, or fit it by half, is taken; the last one is shortened however
much it takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from reverie.budget import fit
from reverie.errors import ConfigError
from reverie.images import Images
from reverie.models import Network
from reverie.progress import Progress, Silent, duration_text
from reverie.recipe import Recipe, read
from reverie.runs import read_record
from reverie.stages import as_teacher
from reverie.synthesis import Teacher

# So many real images calibrate and round alone; fewer have synthetic ones beside them.
_ENOUGH_REAL = 1024
# A schedule that is shorter than this share of its own is worse than a cheaper method's whole one.
_LEAST_SHARE = 0.5


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
    minutes: float | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Choice:
    """The recipe for a network.

    Args:
        overrides: What the user wants in any case, by dotted key, such as `{"quantization.weight_bits": 4}`; bits are 8 unless given.
        calibration: Real images.
        minutes: What the stages that learn may take; candidates are timed against it.
        device: Where.

    Raises:
        ConfigError: An override is wrong, or too few minutes for any recipe.
    """
    wanted = dict(overrides or {})
    own = {key: value for key, value in wanted.items() if key.startswith(("quantization.", "mixed_precision."))}
    # Where bits are means, the methods are those for the bits that most tensors will have at least.
    weights, activations = map(int, read("zeroq", own).mean_bits)
    candidates = _candidates(weights, activations, network, 0 if calibration is None else len(calibration))
    if minutes is None or len(candidates) == 1:
        return candidates[0]
    teacher = as_teacher(network, device)
    passed: list[str] = []
    for candidate in candidates:
        told = _verdict(candidate, wanted, teacher, calibration, minutes, progress or Silent())
        if told is None or candidate is candidates[-1]:
            fits = (
                f"budget: {candidate.name} {'fits' if candidate.name == candidate.preset else 'fit'} {minutes:g} min"
                if told is None
                else f"budget: {told}, and nothing is quicker"
            )
            return Choice(candidate.preset, candidate.settings, (*candidate.reasons, *passed, fits))
        passed.append(f"budget: {told}, so not that")
    raise AssertionError("there is a last candidate")


def chosen_in(folder: Path) -> Choice | None:
    """What was chosen for the run in this folder, so that it goes on with the same; None if nothing was."""
    if not (folder / "run.json").is_file():
        return None
    noted = read_record(folder)["facts"].get("choice")
    return None if noted is None else Choice(noted["preset"], noted["settings"], tuple(noted["reasons"]))


def _verdict(
    choice: Choice, wanted: Mapping[str, Any], teacher: Teacher, real: Images | None, minutes: float, progress: Progress
) -> str | None:
    """Why the recipe does not fit; None if it does."""
    try:
        schedule = fit(choice.recipe(wanted), teacher, real, minutes, progress=progress)
    except ConfigError as error:
        return f"{choice.name}: {str(error).partition(';')[0]}"
    if schedule.factor >= _LEAST_SHARE:
        return None
    return f"{choice.name} would take about {duration_text(60 * minutes / schedule.factor)}"


def _candidates(weights: int, activations: int, network: Network, real: int) -> list[Choice]:
    """Better ones first."""
    images, why = _images(network, real)
    if weights == activations == 8:
        return [
            Choice(
                "zeroq",
                images | _bits(weights, activations),
                ("8 bits: nearest rounding and corrected biases lose next to nothing", *why),
            )
        ]
    gptq = Choice(
        "gptq",
        images | _bits(weights, activations),
        ("gptq: weights rounded by second moments, as good as learned layer by layer and in seconds", *why),
    )
    if activations == 8 and weights > 2:
        return [gptq]
    coarse = activations == 2
    blocks: dict[str, Any] = {"activations.method": "mse"} if coarse else {}
    if activations == 8:
        blocks["activations.percentile"] = 99.99
    blocks["reconstruction.range_rate"] = 1e-2 if coarse else 3e-3
    named = f"W{weights}A{activations}"
    learned = f"qdrop: at {named} codes and ranges are learned together, block by block, half of all values unquantized"
    qdrop = Choice("qdrop", images | _bits(weights, activations) | blocks, (learned, *why))
    whole = Choice(
        "qdrop",
        {**qdrop.settings, **_distillation(network)},
        (
            learned,
            "distillation: then the whole network at once, on images that are cropped, mirrored, recoloured and mixed anew",
            *why,
        ),
    )
    return [whole, qdrop, gptq]


def _distillation(network: Network) -> dict[str, Any]:
    """The pass of the whole network behind the blocks; changed images keep it from learning those it has by heart."""
    small = _side(network) <= 64
    return {
        "distillation.after": "rounding",
        "distillation.steps": 600 if small else 100,
        "distillation.batch": 64 if small else 32,
        "distillation.learning_rate": 1e-3,
        "distillation.scale_rate": 3e-4,
        "distillation.smallest_crop": 0.6,
        "distillation.colour": 0.2,
        "distillation.cut_mix": 0.3,
    }


def _side(network: Network) -> int:
    return max(network.input.height, network.input.width)


def _bits(weights: int, activations: int) -> dict[str, Any]:
    """Recipes come with bits of their own."""
    return {"quantization.weight_bits": weights, "quantization.activation_bits": activations}


def _images(network: Network, real: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How many images of which kind, and why."""
    dreams = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.module.modules())
    if real >= _ENOUGH_REAL or (real and not dreams):
        settings: dict[str, Any] = {"images": 0, "held_out": 0, "calibration_images": _ENOUGH_REAL}
        without = "" if dreams else ", as the network has no batch norm to make any from"
        return settings, (f"images: the {real} real ones alone{without}",)
    side = _side(network)
    count = 1024 if side <= 64 else 256 if side <= 128 else 64
    labelled = count < network.classes
    settings = {
        "images": count,
        "calibration_images": count,
        "synthesis.method": "zeroq",
        "synthesis.steps": 50,
        "synthesis.batch": 128 if side <= 64 else 32,
        "synthesis.class_weight": 0.1 if labelled else 0.0,
    }
    beside = f", beside {real} real ones" if real else ""
    asked = (
        "each asked for a class, as there are more classes"
        if labelled
        else "no class asked for, as there are more images than classes"
    )
    return settings, (f"images: {count} by zeroq in 50 steps from natural noise{beside}; {asked}",)
