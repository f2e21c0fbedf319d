"""Runs on the disk at a glance: what `reverie runs` lists and `reverie compare` puts side by side.

Files alone are read: nothing is imported that takes long, so that a folder of hundreds of runs is listed at once, and nothing is
written. What cannot be read is told as such, not left out.
"""

import fcntl
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reverie.errors import ConfigError
from reverie.report.outcome import bits_text

State = Literal["complete", "interrupted", "in use", "damaged"]

# In their order; a run has "budget" where it was given one.
_STAGES = ("capture", "synthesize", "quantize", "export", "measure")
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A run directory in figures; None for what is not known, or not yet.

    Args:
        path: The directory, as it was given or found.
        state: "in use" while a process works there; "damaged" if its files cannot be read.
        stage: The first stage that is not done, of a run that is not complete.
        only_images: Whether `reverie synthesize` made it.
        network, fingerprint: The full-precision network.
        bits: Such as `W4A8`.
        recipe: The methods, in the order in which they work.
        settings: The whole recipe: dotted keys and values.
        images: How many images it learned from.
        full_precision, accuracy: Top-1 on labelled images, 0 to 1; of what was exported, or else of the student.
        drop: What is lost of it, 0 to 1, as (value, low, high): measured with its 95 % interval, or estimated with one of 90 %. An
            estimate beyond what it was calibrated on has no value.
        estimated: Whether `drop` is an estimate.
        agreement: Share of images with the class of full precision, and of how many images of which set.
        bytes, full_precision_bytes: Of the exported files.
        latency_ms, speed: Of one image; how many times as fast as full precision.
        seconds: Of all stages, in all processes.
        memory_bytes: At the peak.
        versions: Of the last process.
        sets: Digests of the images that were measured on and learned from, by option.
    """

    path: str
    state: State
    stage: str | None = None
    only_images: bool = False
    network: str | None = None
    fingerprint: str | None = None
    bits: str | None = None
    recipe: str | None = None
    settings: dict[str, Any] | None = None
    images: int | None = None
    full_precision: float | None = None
    accuracy: float | None = None
    drop: tuple[float | None, float, float] | None = None
    estimated: bool = False
    agreement: tuple[float, int, str] | None = None
    bytes: int | None = None
    full_precision_bytes: int | None = None
    latency_ms: float | None = None
    speed: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    versions: dict[str, Any] | None = None
    sets: dict[str, str] | None = None


def find(folder: Path) -> list[Overview]:
    """The runs in `folder` and below it, by path; what lies inside a run is not looked through.

    Raises:
        ConfigError: There is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: must be a folder with runs, got {'a file' if folder.exists() else 'nothing there'}")
    found = []
    for place, folders, files in os.walk(folder):
        if "run.json" in files:
            folders.clear()
            found.append(look_at(Path(place)))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return sorted(found, key=lambda run: run.path)


def look_at(path: Path) -> Overview:
    """The run in `path`."""
    try:
        record = _read(path / "run.json")
        known = _of_record(path, record) | _of_recipe(path)
        if record["complete"]:
            known |= _of_metrics(_read(path / "metrics.json"))
    except _BROKEN:
        return Overview(path=_plain(str(path)), state="damaged")
    return Overview(path=_plain(str(path)), **known)


def _read(file: Path) -> dict[str, Any]:
    # Here, since it brings pydantic, and the command line imports this file for its help.
    from reverie import received
    from reverie.records import PUT_BACK

    # Not `read_record`: a run of an older version is listed too.
    found: dict[str, Any] = received.parse_json(received.read_bytes(file), dict[str, Any], PUT_BACK)
    return found


def _of_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    identity, done = record["identity"], record["stages"]
    only_images = identity.get("only") == "images"
    stages = _STAGES[:2] if only_images else _STAGES
    complete = bool(record["complete"])
    # The sets of images are parts of the stage that makes them.
    seconds = [facts["seconds"] for name, facts in done.items() if name in (*_STAGES, "budget")]
    return {
        "state": "complete" if complete else "in use" if _is_locked(path) else "interrupted",
        "stage": None if complete else next((stage for stage in stages if stage not in done), stages[-1]),
        "only_images": only_images,
        "network": _plain(str(record["facts"]["network"])) if "network" in record["facts"] else None,
        "fingerprint": _plain(str(identity["network"])),
        "seconds": float(sum(seconds)),
        "versions": {_plain(str(name)): _plain(str(version)) for name, version in record["versions"].items()},
        "sets": {name: str(identity.get(name, "none")) for name in ("calibration", "evaluation", "unlabelled")},
    }


def _of_recipe(path: Path) -> dict[str, Any]:
    file = path / "recipe.toml"
    # Killed before it was written.
    if not file.is_file():
        return {}
    from reverie import received

    tables = tomllib.loads(received.read_bytes(file, received.MOST_RECIPE_BYTES).decode())
    settings = {
        _plain(f"{table}.{key}" if table else key): setting
        for table, value in [
            ("", {key: value for key, value in tables.items() if not isinstance(value, dict)}),
            *tables.items(),
        ]
        if isinstance(value, dict)
        for key, setting in value.items()
    }
    # Runs of older versions lack what there was not yet.
    mixed, quantization = tables.get("mixed_precision", {}), _older(tables["quantization"])
    weights = mixed.get("effective_bits") or quantization["weight_bits"]
    activations = mixed.get("effective_activation_bits") or quantization["activation_bits"]
    chosen = any(mixed.get(key) for key in ("effective_bits", "effective_activation_bits", "bit_operations"))
    bits = f"mixed W{weights:g}A{activations:g}" if chosen else bits_text({"quantization": quantization})
    return {"bits": bits, "recipe": _plain(_methods(tables)), "settings": settings, "images": int(tables["images"])}


def _methods(tables: dict[str, Any]) -> str:
    """Such as `zeroq, adaround by layer`, or `gdfq, distillation, adaround by block`."""
    distillation, rounding = tables.get("distillation", {}), tables["rounding"]["method"]
    distils = distillation.get("steps", 0) > 0
    # As `Rounding.needs` says, without importing the method.
    learned = f"{rounding} by {tables['reconstruction']['unit']}" if rounding == "adaround" else rounding
    parts = [tables["synthesis"]["method"] if tables["images"] else "real images"]
    parts += ["distillation"] if distils and distillation.get("after", "calibration") == "calibration" else []
    parts += [learned]
    parts += ["distillation"] if distils and distillation.get("after") == "rounding" else []
    return ", ".join(map(str, parts))


def _of_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"memory_bytes": int(metrics["peak_memory_bytes"]), "images": int(metrics["images"]["count"])}
    if "quantization" not in metrics:
        return found
    best = "quantized" if metrics["exported"]["top1"] is None else "exported"
    found["bits"] = _plain(bits_text(metrics | {"quantization": _older(metrics["quantization"])}))
    found |= {"full_precision": _number(metrics["full_precision"]["top1"]), "accuracy": _number(metrics[best]["top1"])}
    if best in metrics["difference"]:
        change = metrics["difference"][best]
        found["drop"] = (-float(change["difference"]), -float(change["high"]), -float(change["low"]))
    elif metrics.get("estimate") is not None:
        estimate = metrics["estimate"]
        drop = (_number(estimate["drop"]), float(estimate["low"]), float(estimate["high"]))
        found |= {"drop": drop, "estimated": True}
    if metrics["agreement"]:
        name, answers = list(metrics["agreement"].items())[-1]
        share = float(answers["exported"] if "exported" in answers else answers["quantized"])
        found["agreement"] = (share, int(answers["images"]), _plain(str(name)))
    sizes, times = metrics["bytes"], metrics["latency_ms"]
    found["bytes"] = int(sizes["packed"] if "packed" in sizes else sizes["network"])
    found["full_precision_bytes"] = int(sizes["fp32"]) if "fp32" in sizes else None
    return found | ({} if times is None else {"latency_ms": float(times["quantized"]), "speed": float(times["ratio"])})


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _older(settings: dict[str, Any]) -> dict[str, Any]:
    """What runs of older versions did not say: sums and stems had the bits of activations."""
    bits = settings["activation_bits"]
    return {"placement": "integer", "stem_bits": bits, "sum_bits": bits} | settings


def _is_locked(path: Path) -> bool:
    """Whether a process works there; asked without writing, and let go at once."""
    try:
        lock = os.open(path / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # A file system without locks; then no process can hold one.
        return False
    finally:
        os.close(lock)
    return False


def _plain(text: str) -> str:
    """Text of a file without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
