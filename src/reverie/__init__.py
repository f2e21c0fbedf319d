"""Quantize trained vision networks without their training data, and prove the result in a real runtime.

    import reverie

    network = reverie.load_network("embedded:digits")
    run = reverie.run(reverie.read_recipe("adaround"), network, output="runs/digits-w4a8")
    print(run.metrics["agreement"], run.onnx)

Importing this imports nothing else: each name is fetched when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reverie.best import choose as choose_recipe
    from reverie.errors import ConfigError, DivergenceError, ExportError, ModelError, ReverieError
    from reverie.formats import calibration
    from reverie.images import Images
    from reverie.images.store import load_images, save_images
    from reverie.models import InputContract, Network
    from reverie.models import load as load_network
    from reverie.pipeline import Run, run
    from reverie.recipe import Recipe
    from reverie.recipes import read as read_recipe
    from reverie.stages import synthesize
    from reverie.synthesis._capsule import Capsule, capsule_of, load_capsule, save_capsule

    __version__: str

__all__ = [
    "Capsule",
    "ConfigError",
    "DivergenceError",
    "ExportError",
    "Images",
    "InputContract",
    "ModelError",
    "Network",
    "Recipe",
    "ReverieError",
    "Run",
    "__version__",
    "calibration",
    "capsule_of",
    "choose_recipe",
    "load_capsule",
    "load_images",
    "load_network",
    "read_recipe",
    "run",
    "save_capsule",
    "save_images",
    "synthesize",
]

_HOMES = {
    "Capsule": "synthesis._capsule",
    "ConfigError": "errors",
    "DivergenceError": "errors",
    "ExportError": "errors",
    "Images": "images",
    "InputContract": "models",
    "ModelError": "errors",
    "Network": "models",
    "Recipe": "recipe",
    "ReverieError": "errors",
    "Run": "pipeline",
    "calibration": "formats",
    "capsule_of": "synthesis._capsule",
    "choose_recipe": "best:choose",
    "load_capsule": "synthesis._capsule",
    "load_images": "images.store",
    "load_network": "models:load",
    "read_recipe": "recipes:read",
    "run": "pipeline",
    "save_capsule": "synthesis._capsule",
    "save_images": "images.store",
    "synthesize": "stages",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("reverie")
    if name not in _HOMES:
        raise AttributeError(f"module 'reverie' has no attribute {name!r}")
    home, _, own = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"reverie.{home}"), own or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
