"""Weight files: state dicts, code in them only where the caller says so, and a clear word when one does not fit its network.

Pickled checkpoints are read with `torch.load(weights_only=True)`. Whatever needs more is a program, and is refused unless the caller
asks for it to be executed; then a whole saved model gives its state dict. A checkpoint that wraps its state dict or model as
`{"state_dict": ...}` or `{"model": ...}` is unwrapped, and the `module.` that `nn.DataParallel` puts in front of every key is dropped.
"""

import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from reverie import received
from reverie.errors import ConfigError, ModelError, at

SUFFIXES = (".safetensors", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model")
_PARALLEL_PREFIX = "module."
# `torch.load` reads it.
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ZIP = b"PK\x03\x04"
# What torch's unpickler meets in a stream of opcodes that is none.
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def read(path: Path, *, execute: bool = False) -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU.

    Args:
        execute: Run the code in a pickle that holds more than tensors, with all rights of this process.

    Raises:
        ConfigError: No such file, another format, damaged, or a pickle that holds more than tensors.
        ModelError: Its code was executed, and failed.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: weights must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, got {path.suffix!r}")
    if not path.exists() or path.is_dir():
        raise ConfigError(f"{path}: weights must be an existing file, got {'a folder' if path.is_dir() else 'nothing there'}")
    with at(str(path)):
        received.check_file(path)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _unwrap(_read_pickle(path, execute), path)
    if state and all(key.startswith(_PARALLEL_PREFIX) for key in state):
        state = {key.removeprefix(_PARALLEL_PREFIX): value for key, value in state.items()}
    return state


@contextmanager
def tensors_alone() -> Iterator[None]:
    """While it lasts, libraries that unpickle whatever lies in their download folder read tensors alone, as `read` does."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def fit_(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts `state` into `module`, in place.

    Keys and shapes must agree; only the counters `num_batches_tracked`, which older checkpoints lack and inference never
    reads, may be missing.

    Raises:
        ModelError: They do not agree; names the first difference of each kind.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    found = []
    if missing:
        found.append(f"no {missing[0]!r} {tuple(own[missing[0]].shape)}{_more(missing)}")
    if extra:
        found.append(f"an unknown {extra[0]!r} {tuple(state[extra[0]].shape)}{_more(extra)}")
    if reshaped:
        key = reshaped[0]
        found.append(f"{key!r} {tuple(state[key].shape)} for {tuple(own[key].shape)}{_more(reshaped)}")
    if found:
        raise ModelError(f"weights must fit the architecture, got {'; '.join(found)}; use the weights of this very network")
    module.load_state_dict(state, strict=False)


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{path}: must be a whole safetensors file, got {one_line(error)}; fetch it again") from error


def _check_zip(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    with zipfile.ZipFile(path) as archive, at(str(path)):
        received.check_archive(archive, path.stat().st_size)


def _read_pickle(path: Path, execute: bool) -> Any:
    try:
        _check_zip(path)
        with warnings.catch_warnings():
            # What torch says about the protocol of a pickle is no news to whoever has a damaged file.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if execute:
            return _execute(path)
        # torch wraps the reason into a screenful of advice, part of which is to turn the protection off.
        reason = re.search(r"Unsupported [^\n]*?(?= was not an allowed|\n|$)", str(error))
        got = reason[0] if reason else one_line(error)
        raise ConfigError(
            f"{path}: weights must be a state dict of tensors alone, got a pickle that needs more ({got}); "
            "save model.state_dict() in place of the model, or let its code run with --execute-weights if you trust the file"
        ) from error
    except ConfigError:
        raise
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise ConfigError(
                f"{path}: weights must be a state dict, got a TorchScript archive; save state_dict() of the module that it was made of"
            ) from error
        raise ConfigError(f"{path}: must be a whole PyTorch file, got {one_line(error)}; fetch it again") from error


def _execute(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        # Not our code: it may raise anything.
        raise ModelError(
            f"{path}: its code must run, got {one_line(error)}; classes are found in the network's Python file and "
            "beside it, under the module names that they were saved with"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), dict | nn.Module):
                content = content[wrapper]
                break
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: weights must be a state dict, got a {type(content).__name__}; save model.state_dict()")
    for key, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            got = type(value).__name__ if isinstance(key, str) else f"{type(key).__name__} as a name"
            raise ConfigError(
                f"{path}: weights must be a state dict of tensors alone, got a {got} at {key!r}; "
                "save model.state_dict() alone, or as 'state_dict' or 'model'"
            )
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            raise ConfigError(
                f"{path}: weights must be dense tensors of real numbers, got another kind at {key!r}; save the network in full precision"
            )
    return dict(content)


def one_line(error: Exception) -> str:
    """Kind and beginning of an error that is not ours, for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
