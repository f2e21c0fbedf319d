"""What commands read back from a run directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.cli._options import NetworkOptions
from reverie.errors import ConfigError, at

if TYPE_CHECKING:
    from reverie.graph.quantized import QuantizedNetwork
    from reverie.models import Network

# Of the files that emitters write, and which runtime they are made for.
_MADE_FOR = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What run.json tells of how the network was loaded; `models.load` refuses others."""

    weights: str | None = None
    execute_weights: bool = False
    input_size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: int | None = None
    resize: int | None = None
    interpolation: str | None = None
    pretrained: bool = True


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What run.json tells of the network and of the files."""

    network: str
    options: Options


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

    facts, identity = _facts(run), read_record(run)["identity"]
    if name is None:
        check_code(run, facts["network"], f"give --network {facts['network']}")
    network = models.load(
        name or facts["network"], **recorded(facts["options"], options.weights, options.execute_weights) | options.given()
    )
    quantized = identity.get("network")
    if network.fingerprint != quantized:
        raise ConfigError(
            f"{run}: must be of this very network ({quantized}), got {network.name} with other weights "
            f"({network.fingerprint}); name the right one with --network and --weights"
        )
    return network


def recorded(options: Mapping[str, Any], weights: Path | None, execute_weights: bool) -> dict[str, Any]:
    """Options of a record as `models.load` takes them.

    Args:
        weights, execute_weights: As they were typed: no file gives leave to execute code, nor says in which file it is.

    Raises:
        ConfigError: Leave to execute weights without saying which.
    """
    if execute_weights and weights is None:
        raise ConfigError(
            "--execute-weights must come with --weights, got none: which code is executed is not for a run directory to say; name the file"
        )
    found = {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items() if key != "execute_weights"
    }
    return (
        found | ({} if weights is None else {"weights": str(weights)}) | ({"execute_weights": True} if execute_weights else {})
    )


def check_code(run: Path, network: str, cure: str) -> None:
    """Refuses a network whose Python file came with the run: it would be executed because a file says so, and not the user.

    Args:
        cure: How to say that it is trusted.
    """
    file = Path(network.rpartition(":")[0])
    if file.suffix == ".py" and file.resolve().is_relative_to(run.resolve()):
        raise ConfigError(
            f"{run}: must name a network outside of this folder, got {file}, which is code that would be executed; "
            f"read it, and {cure} if you trust it"
        )


def _facts(run: Path) -> dict[str, Any]:
    from reverie import received
    from reverie.records import PUT_BACK
    from reverie.runs import read_record

    facts: dict[str, Any] = read_record(run)["facts"]
    with at(f"{run / 'run.json'}: facts"):
        received.check_structure(facts, _Facts, PUT_BACK)
    return facts


def exported_files(run: Path) -> list[Path]:
    """The exported files of a complete run, `network.onnx` first if it is there; their certificates say whether they were changed.

    Raises:
        ConfigError: There is none.
    """
    _complete(run)
    found = sorted(file for file in run.glob("network*") if file.suffix in _MADE_FOR)
    if not found:
        raise ConfigError(f"{run}: must hold an exported network, got none; `reverie export` makes one")
    return sorted(found, key=lambda file: file.name != "network.onnx")


def exported_file(run: Path, name: str | None = None) -> Path:
    """One exported file of a complete run: the one called `name`, or the first.

    Raises:
        ConfigError: There is none, or none of that name.
    """
    found = {file.name: file for file in exported_files(run)}
    if name is None:
        return next(iter(found.values()))
    if name not in found:
        raise ConfigError(f"--file must be one of {', '.join(found)}, got {name!r}; `reverie export` makes others")
    return found[name]


def check_intact(run: Path, *files: Path) -> None:
    """Refuses files of a run, and what belongs to them, that are not as the run recorded them; what is missing is for others to tell."""
    from reverie.runs import check_hash
    from reverie.runtimes import parts

    for part in (part for file in files for part in parts(file)):
        if part.is_file():
            check_hash(run, part)


def runtime_of(file: Path) -> str:
    """The runtime that an exported file is made for."""
    return _MADE_FOR[file.suffix]


def packed_file(run: Path) -> Path:
    """`network.safetensors` of a complete run, as the run left it."""
    return _file(run, "network.safetensors", "run `reverie quantize` to its end")


def restored(run: Path, network: "Network") -> "QuantizedNetwork":
    """The integer model of a complete run.

    Args:
        network: The full-precision network of the run.
    """
    from reverie import recipes, stages
    from reverie.export._packed import restore, stored_bits
    from reverie.runs import check_hash

    packed = packed_file(run)
    check_hash(run, run / "recipe.toml")
    resolved, bits = recipes.read(str(run / "recipe.toml")), stored_bits(packed)
    _, student = stages.student_of(stages.as_teacher(network).graph, resolved.quantization, bits)
    return restore(student, packed)


def _complete(run: Path) -> None:
    from reverie.runs import read_record

    _facts(run)
    if not read_record(run)["complete"]:
        raise ConfigError(f"{run}: must be a complete run, got an interrupted one; run the same `reverie quantize` again")


def _file(run: Path, name: str, cure: str) -> Path:
    from reverie.runs import check_hash

    _complete(run)
    file = run / name
    if not file.is_file():
        raise ConfigError(f"{run}: must hold {name}, got none; {cure}")
    check_hash(run, file)
    return file
