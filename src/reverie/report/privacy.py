"""In words: which real images had a part in a run, and how near synthetic ones come to them."""

from typing import Any

from reverie.report import nearest

_HASHES = {
    "files": "their hashes are in real_images.json",
    "archive": "the file's hash is in real_images.json",
    "inputs": "hashes of the network inputs are in real_images.json",
    "none": "given by Python code",
}
_UNITS = {
    "pixels": "root of the mean squared difference of network inputs",
    "features": "in what the last layer reads",
}


def lines(metrics: dict[str, Any]) -> list[str]:
    """Sentences, one for each set of real images that was read, and for each space in which synthetic ones were compared with them."""
    read = metrics.get("real_images")
    if read is None:
        return []
    told = [_set(name, part) for name, part in read.items()] or ["No real image was read."]
    found = metrics["images"].get("nearest_real")
    return told if found is None else told + [_space(space, found) for space in nearest.SPACES]


def _set(name: str, part: dict[str, Any]) -> str:
    where = "" if part["from"] is None else f" from {part['from']}"
    what = f"statistics of {part['count']} images" if name == "capsule" else f"{part['count']} images"
    return f"{name}: {what}{where}; {_HASHES[part['hashes']]}."


def _space(space: str, found: dict[str, Any]) -> str:
    """How far synthetic images are from real ones, beside how far those are from each other."""
    part, compared = found[space], found["compared"]
    first, second, least = part["nearest"][0]
    among = part["among_real"]
    yardstick = "" if among is None else f" (real ones to each other: median {among['median']:.3g}, least {among['least']:.3g})"
    return (
        f"{compared['synthetic']} synthetic images to the nearest of {compared['real']} real ones, {_UNITS[space]}: median "
        f"{part['median']:.3g}, least {least:.3g} (synthetic {first}, real {second}){yardstick}."
    )
