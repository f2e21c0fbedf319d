"""Runtimes that execute exported files: what a file computes there, which codes its tensors have, what runs in float.

The folder is the registry, and a plug-in has the name of the library that it needs, which is imported with the plug-in and
not before. Sessions take and give arrays of numpy, so that a process can measure a runtime without loading PyTorch.

Not here: what the student computes, and how the two compare (`export/_verify.py`).
"""

import importlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

import reverie.runtimes
from reverie import plugins
from reverie.errors import ConfigError


@runtime_checkable
class Session(Protocol):
    """A file, loaded."""

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits of a batch, float32 of shape (n, classes).

        Raises:
            ExportError: The runtime cannot execute the file.
        """
        ...


@runtime_checkable
class Probe(Protocol):
    """A file, loaded so that one sees inside.

    What a runtime merges into one kernel may have no codes to be seen, and asking for them could change how the network
    runs: such tensors are `unrounded`, since the kernel goes on with the sum before it is rounded to codes.
    """

    @property
    def unrounded(self) -> frozenset[str]:
        """Those of the tensors asked for."""
        ...

    def __call__(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """The logits, and the codes (whole numbers of any type) of the tensors asked for that are not `unrounded`, by name."""
        ...


@runtime_checkable
class Runtime(Protocol):
    """Executes files on the CPU. The object is its own configuration."""

    library: ClassVar[str]
    """The distribution whose version matters."""
    reads: ClassVar[frozenset[str]]
    """Suffixes of the files it executes."""

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """A session as users get it, with the runtime's default optimizations.

        Raises:
            ExportError: The runtime cannot load the file.
        """
        ...

    def probe(self, path: Path, names: Sequence[str], *, threads: int = 1) -> Probe:
        """A session that gives the codes of the tensors `names` as well.

        Raises:
            ExportError: The runtime cannot load the file, or the file lacks one of the tensors.
        """
        ...

    def float_layers(self, path: Path, layers: Iterable[str]) -> list[str]:
        """Those of the `layers`, by the names of their nodes, that the runtime does not execute as integers.

        Raises:
            ExportError: The runtime cannot load the file.
        """
        ...


def names() -> list[str]:
    """All runtimes that there are plug-ins for, sorted, installed or not."""
    return plugins.names(reverie.runtimes)


def load(name: str) -> Runtime:
    """The runtime with its default configuration.

    Raises:
        ConfigError: There is no such plug-in, or its library is not installed; the message names the extra.
    """
    runtime: Runtime = plugins.load(reverie.runtimes, name)()
    return runtime


def installed(suffix: str | None = None) -> dict[str, Runtime]:
    """The runtimes whose libraries are here, by name; with a `suffix`, those that execute such files."""
    found = {}
    for name in names():
        with suppress(ConfigError):
            found[name] = load(name)
    return {name: runtime for name, runtime in found.items() if suffix is None or suffix in runtime.reads}


def version(runtime: Runtime) -> str:
    """Of its library, such as `1.31.1`."""
    try:
        return metadata.version(runtime.library)
    except metadata.PackageNotFoundError:
        # Another distribution brings the module of this name: onnxruntime-gpu, openvino-nightly.
        return str(importlib.import_module(runtime.library).__version__)


def parts(path: Path) -> tuple[Path, ...]:
    """The files that one exported file consists of: an OpenVINO IR keeps its weights beside it."""
    return (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
