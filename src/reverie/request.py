"""A request to quantize or to synthesize: what is refused early, and what tells one from another.

Not here: what only the captured graph can tell, which the stages themselves refuse.
"""

import hashlib
from pathlib import Path
from typing import Any

from reverie import runtimes
from reverie.budget import check_budget
from reverie.errors import ConfigError
from reverie.graph.unfold import count_folded
from reverie.images import Images
from reverie.models import Network
from reverie.plugins import name_of
from reverie.recipe import Recipe
from reverie.recipes import fingerprint, read, tables
from reverie.recovery.allocation import require_solver
from reverie.runs import read_record
from reverie.stages import check_device, composition, method_name, reads_capsule, synthesizes
from reverie.synthesis import Streaming, lacks_batch_norm, lacks_capsule
from reverie.synthesis._capsule import Capsule

# Of the settings that differ.
_NAMED = 3


def check(
    recipe: Recipe,
    network: Network,
    *,
    calibrated: bool,
    device: str,
    capsule: bool = False,
    budget: float | None = None,
) -> None:
    """Refuses, before anything expensive, what is bound to fail later.

    Args:
        calibrated, capsule: Whether there are real images, and a capsule.
        budget: Minutes, if there is one.
    """
    check_device(device)
    if budget is not None:
        check_budget(budget)
    if recipe.images == 0 and not calibrated:
        raise ConfigError("images must be at least 1 without --calibration, got 0; give a folder of images or synthesize some")
    if recipe.quantization.placement == "literature" and recipe.export is not None:
        raise ConfigError(
            "the literature placement must not be exported, got export = "
            f"{type(recipe.export).__name__.lower()!r}; it is for comparison with papers: use --set export.method=none"
        )
    if recipe.export is not None:
        runtimes.load(recipe.export.runtime)
    if recipe.export is not None and recipe.export.device is not None:
        name = name_of(recipe.export)
        raise ConfigError(
            f"export.method must be a target that is executed here, got {name!r}, made for {recipe.export.device}; leave it out, and "
            f"then use `reverie export RUN --target {name}`"
        )
    if recipe.image_scale != 1 and synthesizes(recipe) and isinstance(recipe.synthesis, Streaming):
        raise ConfigError(
            f"image_scale must be 1 with {method_name(recipe)}, whose generator makes all sets of images, got "
            f"{recipe.image_scale:g}; use --set image_scale=1"
        )
    whole, small = network.input, network.input.scaled(recipe.image_scale)
    if recipe.mosaic and (small.height * recipe.tiles, small.width * recipe.tiles) != (whole.height, whole.width):
        raise ConfigError(
            f"mosaic must be false for {network.name}, whose images of {whole.height} x {whole.width} are not {recipe.tiles} x "
            f"{recipe.tiles} of {small.height} x {small.width}, got true; use --set mosaic=false"
        )
    if recipe.mixed_precision.chooses:
        require_solver()
    if reads_capsule(recipe) and not (calibrated or capsule):
        raise lacks_capsule(network.name, method_name(recipe))
    # Running statistics are buffers. With some, only the captured graph can tell whether a batch norm reads them.
    remembers, folded = bool(list(network.module.buffers())), count_folded(network.module)
    if capsule and remembers and not folded and not recipe.synthesis.needs_capsule:
        raise ConfigError(f"{method_name(recipe)} reads no capsule, got one; leave it out, or use --recipe fdda")
    of_classes = getattr(recipe.synthesis, "class_weight", None)
    wanted = recipe.distillation.class_weight if recipe.distillation.steps and synthesizes(recipe) else 0
    if wanted and not of_classes and not isinstance(recipe.synthesis, Streaming):
        cure = "--recipe gdfq" if of_classes is None else "--set synthesis.class_weight=0.1"
        raise ConfigError(
            f"distillation.class_weight must be 0 for images that {method_name(recipe)} made without labels, got {wanted:g}; leave it "
            f"out, or use {cure}"
        )
    asked = recipe.distillation.synthetic
    if recipe.distillation.steps and asked != "kept" and "fresh" not in composition(recipe, share=0.0):
        raise ConfigError(
            f"distillation.synthetic must be 'kept' with {method_name(recipe)}, which has no generator, got "
            f"{asked!r}; leave it out, or use --recipe gdfq"
        )
    # Real images tell what folded batch norms remembered.
    told = capsule or (reads_capsule(recipe) and calibrated)
    if synthesizes(recipe) and recipe.synthesis.needs_batch_norm and not remembers and not (told and folded):
        raise lacks_batch_norm(network.name, method_name(recipe), folded)


def identity(recipe: Recipe, network: Network) -> dict[str, str]:
    """What, besides the user's images, tells one run from another."""
    contract = hashlib.sha256(repr((network.input, network.classes)).encode()).hexdigest()[:16]
    return {"recipe": fingerprint(recipe), "network": network.fingerprint, "input": contract}


def recipe_changes(run: Path, recipe: Recipe, changed: list[str]) -> list[str]:
    """How `recipe`, if it is among what `changed`, differs from that of the run in this folder; none where that is not known."""
    if "recipe" not in changed:
        return []
    try:
        # That of a run with a budget is what was made of the one that was asked for.
        before = None if "budget" in read_record(run)["facts"] else _settings(read(str(run / "recipe.toml")))
    except ConfigError:
        return []
    if before is None:
        return []
    now = _settings(recipe)
    found = [
        f"{key} {before.get(key, 'none')} instead of {now.get(key, 'none')}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    return [*found[:_NAMED], f"{len(found) - _NAMED} settings more"] if len(found) > _NAMED else found


def _settings(recipe: Recipe) -> dict[str, Any]:
    """By dotted name."""
    found: dict[str, Any] = {}
    for key, value in tables(recipe).items():
        found |= {f"{key}.{name}": setting for name, setting in value.items()} if isinstance(value, dict) else {key: value}
    return found


def images_digest(images: Images | None) -> str:
    """What tells two sets of images apart, labels included."""
    if images is None:
        return "none"
    digest = hashlib.sha256(images.inputs.contiguous().numpy().data)
    if images.labels is not None:
        digest.update(images.labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def capsule_digest(capsule: Capsule | None) -> str:
    """What tells two capsules apart."""
    if capsule is None:
        return "none"
    digest = hashlib.sha256(capsule.fingerprint.encode())
    for part in (capsule.count, capsule.correct, *capsule.mean, *capsule.variance):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()[:16]
