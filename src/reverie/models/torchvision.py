"""`torchvision:NAME`: torchvision's classification networks with their newest ImageNet weights.

The input contract comes from the transforms that torchvision keeps beside the weights.

Not here: detection, segmentation, video and already quantized networks, and older weights of the same network.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from reverie.errors import ModelError, at
from reverie.models import InputContract, Network, _torchvision_import, _weights
from reverie.models._libraries import unknown_network

# Without weights these would start with training-only heads and a slow initialization that torchvision warns about.
_RANDOM: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def load(name: str, *, pretrained: bool = True) -> Network:
    """The network `name`, as `torchvision.models.list_models` spells it.

    Args:
        pretrained: Load (and on first use download) the trained weights; random ones otherwise.

    Raises:
        ConfigError: No such network; the message names close ones.
        ModelError: torchvision is not installed, or the weights cannot be fetched.
    """
    place = f"torchvision:{name}"
    with at(place):
        models = _torchvision_import.torchvision().models
    choices = models.list_models(module=models)
    if name not in choices:
        raise unknown_network("torchvision", name, choices, listing="torchvision.models.list_models()")
    weights = models.get_model_weights(name).DEFAULT
    try:
        with _weights.tensors_alone():
            module = models.get_model(name, weights=weights) if pretrained else models.get_model(name, **_RANDOM.get(name, {}))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{place}: weights must be tensors alone, got a pickle that needs more; delete {Path(weights.url).name} below "
            f"{torch.hub.get_dir()}, and run the same command again"
        ) from error
    except OSError as error:
        raise ModelError(f"{place}: weights must be at {weights.url}, got {error}; check the connection to it") from error
    return Network(
        name=place, module=module.eval(), input=_contract(weights.transforms()), classes=len(weights.meta["categories"])
    )


def names() -> list[str]:
    """All that the installed torchvision has; `ModelError` where it is not installed."""
    models = _torchvision_import.torchvision().models
    found: list[str] = models.list_models(module=models)
    return found


def _contract(transforms: Any) -> InputContract:
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return InputContract(
        channels=len(transforms.mean),
        height=crop,
        width=crop,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        resize=resize,
        interpolation=transforms.interpolation.value,
    )
