"""Where a stage puts the parts it has finished, so that a killed run goes on from there."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from safetensors.torch import load_file, save_file
from torch import Tensor

from reverie.runs import atomic_write


@runtime_checkable
class Checkpoints(Protocol):
    """Named parts of a stage's result."""

    @property
    def folder(self) -> Path | None:
        """Where large files that a stage needs for a while may go, not made yet; None for where the system puts such."""
        ...

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The part as it was saved; None if it was not."""
        ...

    def save(self, name: str, part: dict[str, Tensor]) -> None:
        """Keeps the part."""
        ...


class Forgetful:
    """Keeps nothing: a stage that is used on its own."""

    folder: Path | None = None

    def load(self, name: str) -> dict[str, Tensor] | None:
        """None."""
        return None

    def save(self, name: str, part: dict[str, Tensor]) -> None:
        """Nothing."""


class Folder:
    """One safetensors file a part, each written whole."""

    def __init__(self, path: Path) -> None:
        self.folder: Path | None = path
        self._path = path

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The part as it was saved; None if it was not."""
        file = self._path / f"{name}.safetensors"
        return load_file(file) if file.is_file() else None

    def save(self, name: str, part: dict[str, Tensor]) -> None:
        """Keeps the part."""
        self._path.mkdir(parents=True, exist_ok=True)
        whole = {key: tensor.contiguous() for key, tensor in part.items()}
        atomic_write(self._path / f"{name}.safetensors", lambda aside: save_file(whole, aside))
