"""`timm:NAME` or `timm:NAME.TAG`: the networks of PyTorch Image Models with their pretrained weights.

The input contract (size, mean, std, interpolation, crop) comes from timm's `pretrained_cfg`, at its evaluation size.

Not here: `crop_mode` "squash" and "border". Images are resized by their shorter side and centre-cropped for every network.
"""

import math

from reverie.errors import ModelError, at
from reverie.models import InputContract, Network, _torchvision_import
from reverie.models._libraries import unknown_network


def load(name: str, *, pretrained: bool = True) -> Network:
    """The network `name`, as `timm.list_models` spells it, with or without the tag of its weights.

    Args:
        pretrained: Load (and on first use download) the trained weights; random ones otherwise.

    Raises:
        ConfigError: No such network; the message names close ones.
        ModelError: timm is not installed, has no weights for this network, or cannot fetch them.
    """
    place = f"timm:{name}"
    with at(place):
        timm = _torchvision_import.timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown_network("timm", architecture, timm.list_models(), listing="timm.list_models()")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise unknown_network("timm", name, tagged or [architecture], listing=f"timm.list_pretrained('{architecture}.*')")
    if pretrained and not timm.is_model_pretrained(architecture):
        raise ModelError(
            f"{place}: trained weights must exist, got an architecture for which timm has none; choose another one"
        )
    try:
        module = timm.create_model(name, pretrained=pretrained).eval()
    except OSError as error:
        # The hub's own message is a paragraph of advice and hides what the connection said.
        reason = " ".join(str(error.__cause__ or error).split())
        raise ModelError(f"{place}: weights must be on the hub or in its cache, got {reason}; check the connection") from error
    config = timm.data.resolve_data_config({}, model=module)
    channels, height, width = config["input_size"]
    contract = InputContract(
        channels=channels,
        height=height,
        width=width,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=math.floor(min(height, width) / config["crop_pct"]),
        interpolation=config["interpolation"],
    )
    return Network(name=place, module=module, input=contract, classes=module.num_classes)


def names() -> list[str]:
    """All that the installed timm has, without tags; `ModelError` where it is not installed."""
    found: list[str] = _torchvision_import.timm().list_models()
    return found
