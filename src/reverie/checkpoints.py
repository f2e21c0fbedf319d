"""Where a stage puts the parts it has finished, so that a killed run goes on from there.

A part is one safetensors file. It holds the hash of its own tensors and says which run it belongs to, so that one that was changed,
broke off or comes from another run is refused by name instead of being learned from.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reverie import interrupts, received
from reverie.errors import ConfigError
from reverie.files import atomic_write

# In a run: seconds between two checkpoints at least, and what share of the time between them writing one may take at most.
SECONDS, SHARE = 1.0, 0.02
# What is expected of the first, which nothing has been measured for: hashed, written and flushed, on a slow disk.
_BYTES_A_SECOND = 2.5e8


@runtime_checkable
class Checkpoints(Protocol):
    """Named parts of a stage's result."""

    @property
    def folder(self) -> Path | None:
        """Where large files that a stage needs for a while may go, not made yet; None for where the system puts such."""
        ...

    def at(self, name: str) -> "Checkpoints":
        """Those of a stage below."""
        ...

    def due(self, size: int = 0) -> bool:
        """Whether a part that could be computed again is worth keeping now: enough time went by, or the process is asked to stop.

        Args:
            size: Its bytes, where they are known.
        """
        ...

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The part as it was saved; None if it was not.

        Raises:
            ConfigError: What is there is damaged, or is not this run's.
        """
        ...

    def save(self, name: str, part: dict[str, Tensor]) -> None:
        """Keeps the part."""
        ...


class Forgetful:
    """Keeps nothing: a stage that is used on its own."""

    folder: Path | None = None

    def at(self, name: str) -> "Forgetful":
        """Itself."""
        return self

    def due(self, size: int = 0) -> bool:
        """Never."""
        return False

    def load(self, name: str) -> dict[str, Tensor] | None:
        """None."""
        return None

    def save(self, name: str, part: dict[str, Tensor]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class _Told:
    """What a part says of itself."""

    run: str
    sha256: str


class Folder:
    """One safetensors file a part, each written whole.

    Args:
        path: Made with the first part. Its parent must be there, so that a run whose folder vanished does not go on in a new one.
        run: What tells this run from others.
        seconds: Between two parts that could be computed again, at least.
        share: Of the time between two such parts, what writing one may take; 1 for any.
        clock: Seconds, not those of the day, which may jump.
    """

    def __init__(
        self,
        path: Path,
        run: str = "",
        *,
        seconds: float = 0.0,
        share: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder: Path | None = path
        self._path, self._run, self._seconds, self._share, self._clock = path, run, seconds, share, clock
        self._saved, self._cost = clock(), 0.0

    def at(self, name: str) -> "Folder":
        """The folder `name` below this one."""
        return Folder(self._path / name, self._run, seconds=self._seconds, share=self._share, clock=self._clock)

    def due(self, size: int = 0) -> bool:
        """Whether enough time went by since the last part, or the process is asked to stop."""
        passed = self._clock() - self._saved
        cost = self._cost or size / _BYTES_A_SECOND
        return interrupts.asked() or (passed >= self._seconds and self._share * passed >= (1 - self._share) * cost)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The part as it was saved; None if it was not."""
        file = self._path / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                told = received.parse_json((opened.metadata() or {})["reverie"], _Told, "delete it")
                part = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise self._refused(file, "a damaged or foreign file") from error
        if told["run"] != self._run:
            raise self._refused(file, f"one of another run ({told['run']} instead of {self._run})")
        if (found := _hash(name, part)) != told["sha256"]:
            raise self._refused(file, f"a changed one (sha256 {found[:12]} instead of {told['sha256'][:12]})")
        return part

    def save(self, name: str, part: dict[str, Tensor]) -> None:
        """Keeps the part."""
        began = self._clock()
        try:
            self._path.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self._path}: must be a folder that can be made, got {error.strerror!r}; put the run back"
            ) from error
        whole = {key: tensor.contiguous() for key, tensor in part.items()}
        # One entry only: safetensors writes several in an order that changes from process to process.
        told = {"reverie": json.dumps({"run": self._run, "sha256": _hash(name, whole)})}
        atomic_write(self._path / f"{name}.safetensors", lambda aside: save_file(whole, aside, told))
        self._saved = self._clock()
        self._cost = self._saved - began

    def _refused(self, file: Path, got: str) -> ConfigError:
        return ConfigError(
            f"{file}: must be a checkpoint that this run wrote, got {got}; delete it, what it held is made again"
        )


class Unfinished:
    """A part while it is being made: its state can be kept at any step that is worth it.

    Args:
        checkpoints: Of the stage.
        name: Of the part.
    """

    def __init__(self, checkpoints: Checkpoints, name: str) -> None:
        self._checkpoints, self._name = checkpoints, f"{name}-unfinished"
        self._generators: list[torch.Generator] = []
        self._size = 0

    def draws_from(self, *generators: torch.Generator) -> None:
        """What is drawn from these decides the steps to come, so they belong to the state."""
        self._generators += generators

    def load(self) -> dict[str, Tensor] | None:
        """The state that was kept last, after which the generators go on where they were; None if none was."""
        state = self._checkpoints.load(self._name)
        if state is not None:
            for number, generator in enumerate(self._generators):
                generator.set_state(state[f"generator {number}"])
        return state

    def keep(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Keeps what `state` gives, if that is due."""
        if not self._checkpoints.due(self._size):
            return
        drawn = {f"generator {number}": generator.get_state() for number, generator in enumerate(self._generators)}
        part = state() | drawn
        # Of the same size every time, so that it is put together once to know.
        self._size = sum(tensor.numel() * tensor.element_size() for tensor in part.values())
        if self._checkpoints.due(self._size):
            self._checkpoints.save(self._name, part)


def _hash(name: str, part: dict[str, Tensor]) -> str:
    """SHA-256 of what a part is called and of its tensors, with their names, types and shapes."""
    digest = hashlib.sha256(name.encode())
    for key in sorted(part):
        digest.update(f"{key} {part[key].dtype} {tuple(part[key].shape)}".encode())
        digest.update(part[key].cpu().numpy().data)
    return digest.hexdigest()
