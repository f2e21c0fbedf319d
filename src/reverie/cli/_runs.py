"""What commands read back from a run directory."""

from pathlib import Path
from typing import TYPE_CHECKING

from reverie.cli._options import NetworkOptions
from reverie.errors import ConfigError

if TYPE_CHECKING:
    from reverie.models import Network


def load_network(run: Path, name: str | None, options: NetworkOptions) -> "Network":
    """The full-precision network of a run.

    Args:
        name: Another name for it, such as a moved file; None for the one in run.json.
        options: Those given win over the ones in run.json.

    Raises:
        ConfigError: Its weights are not those that were quantized.
    """
    from reverie import models
    from reverie.runs import read_record

    record = read_record(run)
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in record["facts"]["options"].items()}
    network = models.load(name or record["facts"]["network"], **kept | options.given())
    quantized = record["identity"]["network"]
    if network.fingerprint != quantized:
        raise ConfigError(
            f"{run}: must be of this very network ({quantized}), got {network.name} with other weights "
            f"({network.fingerprint}); name the right one with --network and --weights"
        )
    return network


def exported_file(run: Path) -> Path:
    """`network.onnx` of a complete run."""
    return _file(run, "network.onnx", "`reverie export` makes one")


def packed_file(run: Path) -> Path:
    """`network.safetensors` of a complete run."""
    return _file(run, "network.safetensors", "run `reverie quantize` to its end")


def _file(run: Path, name: str, cure: str) -> Path:
    from reverie.runs import read_record

    if not read_record(run)["complete"]:
        raise ConfigError(f"{run}: must be a complete run, got an interrupted one; run the same `reverie quantize` again")
    file = run / name
    if not file.is_file():
        raise ConfigError(f"{run}: must hold {name}, got none; {cure}")
    return file
