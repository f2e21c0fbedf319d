"""Files for runtimes: one emitter per target, each from the same integer model."""

from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from reverie.graph.quantized import QuantizedNetwork


@runtime_checkable
class Exporter(Protocol):
    """Writes an integer model as a file for one target. The object is its own configuration.

    Args:
        filename: What the file is called in a run directory.
        runtime: Which runtime proves it.
        device: What executes it where that is not `runtime`: it is compared there and was never run on the device; None where
            `runtime` is what users run, so that every layer must be executed as integers too.
    """

    filename: ClassVar[str]
    runtime: ClassVar[str]
    device: ClassVar[str | None]

    def __call__(
        self, quantized: QuantizedNetwork, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None
    ) -> None:
        """Writes `path`, whole or not at all; the same arguments give the same bytes.

        Args:
            shape: Of one input, without the batch, which stays free.
            facts: What the file is, as text by name; stored in it where the format has a place for it.

        Raises:
            ExportError: The target cannot express the model.
        """
        ...
