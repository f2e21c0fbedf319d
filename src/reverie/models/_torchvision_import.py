"""Imports torchvision, and timm which needs it, also where torchvision's compiled operators cannot be loaded.

Beside a CPU-only torch, torchvision's usual wheel fails to import with `operator torchvision::nms does not exist`: it
describes two operators that its compiled library should have defined. No classification network uses them, so defining
their schemas, without any implementation, is enough. Detection networks stay broken, as they are without this.
"""

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

from reverie.models._libraries import require

_SYMPTOM = "operator torchvision::nms does not exist"
_SCHEMAS = ("nms", "qnms")


@cache
def torchvision() -> ModuleType:
    """The imported torchvision.

    Raises:
        ModelError: It is not installed; the message names the extra.
    """
    try:
        return require("torchvision", extra="models", distribution="torchvision")
    except RuntimeError as error:
        if str(error) != _SYMPTOM:
            raise
    _define_schemas()
    _purge("torchvision")
    return importlib.import_module("torchvision")


def timm() -> ModuleType:
    """The imported timm.

    Raises:
        ModelError: It or torchvision is not installed; the message names the extra.
    """
    torchvision()
    return require("timm", extra="models", distribution="timm")


@cache
def _define_schemas() -> torch.library.Library:
    """The two operators; the cache keeps the library alive, and with it the definitions."""
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in _SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library


def _purge(package: str) -> None:
    """Forgets the half-imported package: Python would hand out its submodules as if they were whole."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
