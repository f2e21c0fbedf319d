"""Which real images a run read: for each set where it came from, how many there were, and a hash of each; or that none was.

The list is the file `real_images.json` of a run, its summary stands in `run.json` and in the report. What it is for: saying to whoever
owns the images which of them had a part in the result, and to whoever resumes the run which of them changed since.

    hashes       of what
    "files"      the image files as they lie on the disk (what `sha256sum` says)
    "archive"    the one .npz or .safetensors file that holds them all
    "inputs"     the network inputs, float32, where they came from no place on the disk
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reverie import received
from reverie.errors import ConfigError
from reverie.files import file_hash
from reverie.images import Images
from reverie.synthesis._capsule import Capsule

FILE = "real_images.json"
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """What is compared of a set in the file."""

    sha256: dict[str, str]


def listed(sets: Mapping[str, Images | None], capsule: Capsule | None, places: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, by what it was read for.

    Args:
        capsule: What stands for images that were read when it was made.
        places: The folder or file of each set, where it is known.
    """
    found = {name: _listed(images, places.get(name)) for name, images in sets.items() if images is not None}
    if capsule is not None:
        place = places.get("capsule")
        held = {Path(place).name: file_hash(Path(place))} if place else {}
        images = int(capsule.count.sum())
        found["capsule"] = {"from": place, "count": images, "hashes": "archive" if place else "none", "sha256": held}
    return found


def _listed(images: Images, place: str | None) -> dict[str, Any]:
    where = None if place is None else Path(place)
    if where is not None and where.is_dir():
        hashes, of = {name: file_hash(where / name) for name in images.sources}, "files"
    elif where is not None and where.is_file():
        hashes, of = {where.name: file_hash(where)}, "archive"
    else:
        rows = enumerate(images.inputs.contiguous().numpy())
        hashes, of = {f"{number}": hashlib.sha256(row.data).hexdigest() for number, row in rows}, "inputs"
    return {"from": place, "count": len(images), "hashes": of, "sha256": hashes}


def summary(read: Mapping[str, Any]) -> dict[str, Any]:
    """The list without the single hashes: in their place one of all of them."""
    return {
        name: {**part, "sha256": hashlib.sha256(json.dumps(part["sha256"], sort_keys=True).encode()).hexdigest()}
        for name, part in read.items()
    }


def changes(run: Path, read: Mapping[str, Any], changed: list[str]) -> list[str]:
    """Which images of the sets that `changed` are not those of `run` any more, by set; none where that is not known.

    Args:
        read: What is there now, as `listed` says.
    """
    try:
        before = received.parse_json(received.read_bytes(run / FILE), dict[str, _Listed], "delete it")
    except ConfigError:
        return []
    told = [
        _difference(name, before[name]["sha256"], read[name]["sha256"]) for name in changed if name in before and name in read
    ]
    return [difference for difference in told if difference]


def _difference(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    groups = {
        "changed": sorted(key for key in before.keys() & now.keys() if before[key] != now[key]),
        "gone": sorted(before.keys() - now.keys()),
        "new": sorted(now.keys() - before.keys()),
    }
    parts = []
    for kind, keys in groups.items():
        if keys:
            more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
            parts.append(f"{kind} {', '.join(keys[:_NAMED])}{more}")
    return f"{name}: {', '.join(parts)}" if parts else ""
