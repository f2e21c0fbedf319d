"""Why `best` chose a recipe, in words: read off the recipe that runs, so that what the user wants otherwise is told as it is."""

from torch import nn

from reverie.grid import MAX_BITS
from reverie.models import Network
from reverie.plugins import name_of
from reverie.recipe import Recipe

_SHARES = {0.5: "half", 0.2: "a fifth"}
_STARTS = {"natural": "natural noise", "leaves": "dead leaves", "white": "white noise"}


def reasons(recipe: Recipe, network: Network, *, real: int, bits: tuple[int, int]) -> tuple[str, ...]:
    """A line for each decision.

    Args:
        recipe: With what the user wants otherwise.
        real: How many real images there are.
        bits: The fewest of weights and of activations, which decided the method.
    """
    found = [_rounding(recipe, bits), *_distillation(recipe, real), _images(recipe, network, real)]
    if recipe.mosaic:
        tiles = f"{recipe.tiles} x {recipe.tiles}"
        found.append(
            f"mosaics: learned from joined {tiles}, each twice, as few bits would be fitted to borders that whole images do not have"
        )
    return (*found, *_advice(recipe, network))


def has_batch_norm(network: Network) -> bool:
    """Whether there is any batch norm to make images from."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.module.modules())


def _rounding(recipe: Recipe, bits: tuple[int, int]) -> str:
    settings, method = recipe.reconstruction, name_of(recipe.rounding)
    if recipe.rounding.needs == "reconstruction":
        learned = "codes and ranges are learned together" if settings.learned_ranges else "codes are learned"
        share = _SHARES.get(settings.drop, f"{settings.drop:.0%}")
        dropped = f", {share} of all values unquantized" if settings.drop else ""
        name = "qdrop" if settings.drop or settings.learned_ranges else method
        return f"{name}: at W{bits[0]}A{bits[1]} {learned}, {settings.unit} by {settings.unit}{dropped}"
    if method == "gptq":
        return "gptq: weights rounded by second moments, as good as learned layer by layer and much faster"
    if method == "nearest" and bits == (MAX_BITS, MAX_BITS):
        lose = " and corrected biases lose" if recipe.quantization.bias_correction else " loses"
        return f"8 bits: nearest rounding{lose} next to nothing"
    return f"{method}: as asked"


def _distillation(recipe: Recipe, real: int) -> tuple[str, ...]:
    settings = recipe.distillation
    if not settings.steps:
        return ()
    what = "the whole network" if settings.learned_weights else "biases and scales of the whole network"
    if recipe.keeps_apart(recipe.images, real):
        return (f"distillation: {what}, on the real images alone",)
    changes = {
        "cropped": settings.smallest_crop < 1,
        "mirrored": settings.flip,
        "recoloured": settings.colour > 0,
        "mixed": settings.cut_mix > 0,
    }
    told = ""
    if settings.augmentation(real=False) is not None:
        *first, last = [change for change, is_made in changes.items() if is_made]
        told = f", on images that are {', '.join(first)}{' and ' if first else ''}{last} anew"
    return (f"distillation: {'then' if settings.after == 'rounding' else 'first'} {what} at once{told}",)


def _images(recipe: Recipe, network: Network, real: int) -> str:
    scaled, method = network.input.scaled(recipe.image_scale), recipe.synthesis
    size = "" if recipe.image_scale == 1 else f"{scaled.height} x {scaled.width}"
    if not recipe.images:
        without = "" if has_batch_norm(network) else ", as the network has no batch norm to make any from"
        return f"images: the {real} real ones alone{size and f', scaled down to {size}'}{without}"
    made = f"images: {recipe.images}{size and f' of {size}'} by {name_of(method)}"
    # What other methods do not have.
    if steps := getattr(method, "steps", 0):
        made += f" in {steps} steps"
    if start := getattr(method, "start", ""):
        made += f" from {_STARTS.get(start, start)}"
    if not getattr(method, "class_weight", True):
        made += ", no class asked for"
    if recipe.image_scale == 0.5:
        made += ", four of which cost what a whole one does"
    return made + (f", beside {real} real ones" if real else "")


def _advice(recipe: Recipe, network: Network) -> tuple[str, ...]:
    """What the user could ask for instead: bits are theirs to say."""
    bits = recipe.quantization.weight_bits
    depthwise = any(
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 for module in network.module.modules()
    )
    if recipe.mixed_precision.chooses_weights or bits == MAX_BITS or not depthwise:
        return ()
    return (
        f"bits: as asked, {bits} for every weight; its depthwise layers want more: --effective-bits {bits} loses less in as many bytes",
    )
