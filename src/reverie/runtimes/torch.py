"""PyTorch executing a `torch.export` program as it is loaded: operator by operator, not compiled.

The arithmetic of the program is what is proven here: quantize, clamp of the codes, dequantize, and float32 convolutions of
what is on the grids. That is how the program runs on any machine, and slower than full precision. Its int8 kernels are
Inductor's (`torch.compile`, docs/checkpoint.md), which take a C++ compiler and up to minutes: no session here compiles,
every layer counts as one in float, and what `reverie benchmark` times is not what a compiled program takes.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # names the operators of torch.ops.quantized_decomposed
from numpy.typing import NDArray
from torch import fx

from reverie.errors import ConfigError, ExportError
from reverie.runtimes._program import inert

# What torch's deserializer and its operators raise for files that are damaged.
_FAILURES = (
    AssertionError,
    AttributeError,
    BadZipFile,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True)
class Torch:
    """Has no settings."""

    library: ClassVar[str] = "torch"
    reads: ClassVar[frozenset[str]] = frozenset({".pt2"})

    def open(self, path: Path, *, threads: int = 1) -> "_Session":
        """See `Runtime.open`."""
        return _Session(_loaded(path), threads)

    def probe(self, path: Path, names: Sequence[str], *, threads: int = 1) -> "_Probe":
        """See `Runtime.probe`."""
        program = _loaded(path)
        found = {node.name for node in program.graph.nodes}
        for name in names:
            if f"{name}_codes" not in found:
                raise ExportError(
                    f"{path}: must hold the tensor {name!r}, got none; compare a file with the network it was written from"
                )
        return _Probe(_Session(program, threads), tuple(names))

    def float_layers(self, path: Path, layers: Iterable[str]) -> list[str]:
        """All of them, as nothing is compiled here; see `Runtime.float_layers`."""
        return list(layers)


METHOD = Torch


@dataclass(frozen=True)
class _Session:
    program: fx.GraphModule
    threads: int

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.run(fx.Interpreter(self.program), images)

    def run(self, interpreter: fx.Interpreter, images: NDArray[np.float32]) -> NDArray[np.float32]:
        # Errors are sentences for users; the interpreter would add the node's source to them.
        interpreter.extra_traceback = False
        with _reported("run", "the network"), _threads(self.threads), torch.no_grad():
            logits: NDArray[np.float32] = interpreter.run(torch.from_numpy(images)).numpy()
        return logits


@dataclass(frozen=True)
class _Probe:
    session: _Session
    names: tuple[str, ...]
    # Quantize and dequantize are executed one by one.
    unrounded: frozenset[str] = frozenset()

    def __call__(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        recorder = _Recorder(self.session.program, {f"{name}_codes": name for name in self.names})
        logits = self.session.run(recorder, images)
        return logits, recorder.codes


class _Recorder(fx.Interpreter):
    """Keeps what some of the nodes give; `wanted` says by their names what that is called."""

    def __init__(self, program: fx.GraphModule, wanted: dict[str, str]) -> None:
        super().__init__(program)
        self._wanted = wanted
        self.codes: dict[str, NDArray[Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self.codes[self._wanted[n.name]] = value.numpy()
        return value


def _loaded(path: Path) -> fx.GraphModule:
    try:
        program_file = inert(path)
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error
    with _reported("load", str(path)), _quiet():
        program = torch.export.load(program_file).module()
    assert isinstance(program, fx.GraphModule)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts, torch writes no traceback of its own about a damaged program; its error is what counts."""
    log = logging.getLogger("torch.export")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _reported(verb: str, what: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"torch: it must {verb} {what}, got {reason!r}; try another version of torch") from error
