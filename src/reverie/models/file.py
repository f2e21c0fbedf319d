"""`path/to/file.py:FACTORY`: a network that the caller's own Python file makes, with weights from a file.

`FACTORY` is anything in the file that can be called without arguments and gives an `nn.Module`: a function, or the class
itself. The file is ordinary Python and is run, so it must be trusted; the weights are only read unless `execute_weights` (`_weights.py`).

The file may import its neighbours. Afterwards its folder is not on `sys.path` and its neighbours are not in `sys.modules`,
so a second file may have neighbours of the same names; imports that only happen inside `forward` will not find them.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reverie.errors import ConfigError, ModelError, at, unknown
from reverie.models import InputContract, Interpolation, Network, _weights


def load(
    name: str,
    *,
    input_size: int | tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: int,
    weights: str | Path | None = None,
    execute_weights: bool = False,
    resize: int | None = None,
    interpolation: Interpolation = "bilinear",
) -> Network:
    """The network that `name`, `path/to/file.py:FACTORY`, makes.

    Args:
        input_size: Side of the square input in pixels, or its (height, width).
        mean, std: Per channel, of pixels in 0..1. Their number is the number of channels.
        classes: Number of classes.
        weights: A .safetensors, .pt or .pth file with a state dict; None if the factory's network is trained already.
        execute_weights: Run the code that a pickled weights file holds, with all rights of this process; its classes are found in the
            Python file and beside it. For files alone that one would also run as a program.
        resize: Shorter side of an image file before the centre crop; None means no margin.
        interpolation: How an image file is resized.

    Raises:
        ConfigError: The file, the factory, the weights file or the input contract cannot be used.
        ModelError: The file does not run, the weights do not fit, or the network does not take or give what was said.
    """
    path, factory = _parse(name)
    with at(name):
        if classes < 1:
            raise ConfigError(f"classes must be at least 1, got {classes}")
        if len(mean) != len(std):
            raise ConfigError(f"mean and std must have one value for each channel, got {len(mean)} and {len(std)}")
        height, width = input_size if isinstance(input_size, tuple) else (input_size, input_size)
        contract = InputContract(
            channels=len(mean), height=height, width=width, mean=mean, std=std, resize=resize, interpolation=interpolation
        )
        if execute_weights and weights is None:
            raise ConfigError(
                "weights must be given with execute_weights, got none; leave it out, or name the file that it is for"
            )
        state = None if weights is None or execute_weights else _weights.read(Path(weights))
        with _neighbours(path.parent):
            names = _run(path)
            if execute_weights:
                assert weights is not None
                with _lent(names):
                    state = _weights.read(Path(weights), execute=True)
            module = _made(names, factory, path).eval()
        if state is not None:
            with at(str(weights)):
                _weights.fit_(module, state)
        _check_output(module, contract, classes)
    return Network(name=name, module=module, input=contract, classes=classes)


def _parse(name: str) -> tuple[Path, str]:
    file, _, factory = name.rpartition(":")
    if not file.endswith(".py") or not factory.isidentifier():
        raise ConfigError(f"a network from a file must be path/to/file.py:FACTORY, got {name!r}")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{name}: {file} must be a Python file, got {'a folder' if path.is_dir() else 'nothing there'}")
    return path.resolve(), factory


def _made(names: dict[str, Any], factory: str, path: Path) -> nn.Module:
    made = _call(_find(names, factory, path))
    if not isinstance(made, nn.Module):
        raise ModelError(f"the factory must give an nn.Module, got a {type(made).__name__}; return the network itself")
    return made


def _run(path: Path) -> dict[str, Any]:
    """The names the file defines. Registered under a name of its own: dataclasses and pickle look their module up."""
    name = f"reverie_network_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Not our code: it may raise anything.
        raise ModelError(f"the file must run, got {_weights.one_line(error)}; try it with python {path.name}") from error
    return vars(module)


@contextmanager
def _lent(names: dict[str, Any]) -> Iterator[None]:
    """Lets a pickle that a script saved find its classes: it calls them those of `__main__`, which the script was then."""
    main = vars(sys.modules["__main__"])
    lent = {name: value for name, value in names.items() if name not in main}
    main.update(lent)
    try:
        yield
    finally:
        for name in lent:
            main.pop(name, None)


def _find(names: dict[str, Any], factory: str, path: Path) -> Callable[..., Any]:
    if factory not in names:
        public = [name for name, value in names.items() if callable(value) and not name.startswith("_")]
        own = [
            name for name in public if getattr(names[name], "__module__", None) == names["__name__"] and not _lacks(names[name])
        ]
        raise unknown("factory", factory, own) if own else ConfigError(f"unknown factory {factory!r}; {path.name} defines none")
    found = names[factory]
    if not callable(found):
        raise ConfigError(f"the factory must be callable, got a {type(found).__name__}")
    call: Callable[..., Any] = found
    if needed := _lacks(call):
        raise ConfigError(
            f"the factory must take no arguments, got one that needs {', '.join(needed)}; write a function that fills them in"
        )
    return call


def _lacks(factory: Callable[..., Any]) -> list[str]:
    """The arguments that have to be given."""
    return [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _call(factory: Callable[..., Any]) -> Any:
    try:
        return factory()
    except Exception as error:
        # Not our code: it may raise anything.
        raise ModelError(f"the factory must give a network, got {_weights.one_line(error)}") from error


@torch.no_grad()
def _check_output(module: nn.Module, contract: InputContract, classes: int) -> None:
    """Runs one grey image through: a wrong size or class count would otherwise come out far from its cause."""
    try:
        logits = module(torch.zeros(1, *contract.shape))
    except Exception as error:
        # Not our code: it may raise anything.
        raise ModelError(f"the network must take inputs of shape {contract.shape}, got {_weights.one_line(error)}") from error
    got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if got != (1, classes):
        raise ModelError(
            f"the network must give (1, {classes}) logits for one image, got {got}; set classes or the factory right"
        )


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Lets the imports inside find what lies in `folder`, and forgets it afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    # Python remembers what a folder held; these files may be new.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if _lies_in(name, folder):
                del sys.modules[name]


def _lies_in(name: str, folder: Path) -> bool:
    """Whether module `name` was found directly in `folder`; an environment kept in a subfolder does not count."""
    file = getattr(sys.modules[name], "__file__", None)
    found = [file] if file else list(getattr(sys.modules[name], "__path__", []))
    expected = folder.joinpath(*name.split("."))
    return any(Path(place).resolve() in (expected.with_suffix(".py"), expected / "__init__.py", expected) for place in found)
