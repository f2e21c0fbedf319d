"""Where networks come from. Each file is one source: `timm:resnet18` asks `timm.py` for `resnet18`.

A source file defines `load(name: str) -> Network`, with the module in evaluation mode. Options of its own are keyword-only
arguments. It imports its library lazily and says in a `ModelError` which extra to install when it is missing. Files need no
prefix: `path/to/file.py:FACTORY` is for `file.py`, `path/to/network.onnx` for `onnx.py`. A source that knows its networks by name
defines `names() -> list[str]`, from which the nearest is suggested.

A network made in Python needs no source: `Network(name=..., module=module.eval(), input=..., classes=...)`.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reverie import plugins
from reverie.errors import ConfigError, ModelError, nearest, unknown
from reverie.images import Images
from reverie.images.contract import InputContract as InputContract
from reverie.images.contract import Interpolation as Interpolation

# Of the largest answer: float32 in another order of sums.
REFERENCE_ERROR = 1e-4
REFERENCE_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Network:
    """A trained classification network and what must be known to feed it.

    Args:
        name: What the user called it, such as `timm:resnet18`.
        module: In evaluation mode; maps `(n, *input.shape)` to `(n, classes)` logits.
        input: The input contract.
        classes: Number of classes.
        held_out: Loads the labelled evaluation set that the network brings along, if it does (`embedded:digits`).
        reference: What the network answers where it comes from, if that is another runtime: an ONNX file in ONNX Runtime.
        options: What `load` was given besides the name: with it, the network can be loaded again. Paths are text, as JSON needs.
    """

    name: str
    module: nn.Module
    input: InputContract
    classes: int
    held_out: Callable[[], Images] | None = field(default=None, repr=False)
    reference: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every weight and buffer with its name, 16 hex digits: tells two checkpoints apart."""
        digest = hashlib.sha256()
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_weights(self) -> None:
        """Raises `ModelError` naming the first tensor that holds NaN or an infinity."""
        for key, value in self.module.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                bad = int((~torch.isfinite(value)).sum())
                raise ModelError(
                    f"{self.name}: weights must be finite, got {bad} NaN or infinite values in {key!r}; "
                    "use a checkpoint from before the training diverged"
                )

    @torch.no_grad()
    def check_reference(self, images: Images, what: str) -> None:
        """Compares the module with `reference`, if there is one.

        Args:
            images: Of any size; the first `REFERENCE_IMAGES` count.
            what: What they are, for the message.

        Raises:
            ModelError: The largest difference is more than `REFERENCE_ERROR` of the largest answer.
        """
        if self.reference is None:
            return
        few = images.resized(*self.input.shape[1:]).inputs[:REFERENCE_IMAGES].cpu()
        device = next((tensor.device for tensor in self.module.state_dict().values()), few.device)
        expected, got = self.reference(few), self.module(few.to(device)).cpu()
        if got.shape != expected.shape:
            raise ModelError(
                f"{self.name}: the converted network must answer as the file does in ONNX Runtime, {tuple(expected.shape)}, got "
                f"{tuple(got.shape)} on {what}; use the network's own code, path/to/file.py:FACTORY"
            )
        difference = float((got - expected).abs().max() / expected.abs().max())
        # Written so that a difference that is not a number fails too.
        if not difference <= REFERENCE_ERROR:
            raise ModelError(
                f"{self.name}: the converted network must answer as the file does in ONNX Runtime, up to {REFERENCE_ERROR:g} of "
                f"the largest answer, got {difference:.2g} on {what}; use the network's own code, path/to/file.py:FACTORY"
            )


def load(name: str, **options: Any) -> Network:
    """The trained network that `name`, `SOURCE:NAME`, `path/to/file.py:FACTORY` or `path/to/network.onnx`, stands for.

    Args:
        name: Such as `embedded:digits`, `timm:resnet18`, `package:mobilenet_v2`, `nets/mine.py:resnet20`, `nets/mine.onnx`.
        options: Keyword arguments of the source's own `load`, such as `weights` of a Python file.

    Raises:
        ConfigError: No such source or network, or an option that the source does not take or lacks.
        ModelError: The network cannot be had, or its weights are not finite.
    """
    source, rest = _source(name)
    load_from = importlib.import_module(f"{__name__}.{source}").load
    _check_options(name, options, inspect.signature(load_from))
    network: Network = load_from(rest, **options)
    network.check_weights()
    kept = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return replace(network, options=kept)


def _source(name: str) -> tuple[str, str]:
    """The source's file name, and what to ask it for."""
    prefix, colon, rest = name.partition(":")
    if name.rpartition(":")[0].endswith(".py") or name.endswith(".py"):
        return "file", name
    if name.endswith(".onnx") and prefix != "onnx":
        return "onnx", name
    sources = [source for source in plugins.names(sys.modules[__name__]) if source != "file"]
    if not colon:
        told = (
            f"a network must be SOURCE:NAME with SOURCE one of {', '.join(sources)}, or path/to/file.py:FACTORY, got {name!r}"
        )
        near = nearest(name, _listed(sources))
        raise ConfigError(f"{told}; did you mean {near!r}?" if near else told)
    if prefix not in sources:
        raise unknown("network source", prefix, sources)
    return prefix, rest


def _listed(sources: list[str]) -> list[str]:
    """Every `SOURCE:NAME` of the sources that can list their networks here."""
    found = []
    for source in sources:
        module = importlib.import_module(f"{__name__}.{source}")
        # A library that is not installed has nothing to suggest.
        with suppress(ModelError):
            found += [f"{source}:{name}" for name in module.names()] if hasattr(module, "names") else []
    return found


def _check_options(name: str, options: dict[str, Any], signature: inspect.Signature) -> None:
    """Refuses options before the source does any work."""
    taken = {key: option for key, option in signature.parameters.items() if option.kind is option.KEYWORD_ONLY}
    for key in options:
        if key not in taken:
            choices = f"it takes {', '.join(sorted(taken))}" if taken else "it takes no options"
            raise ConfigError(f"{name}: got the option {key!r}; {choices}")
    lacking = [key for key, option in taken.items() if option.default is option.empty and key not in options]
    if lacking:
        raise ConfigError(f"{name}: {', '.join(lacking)} must be given, got nothing; its file does not say them")
