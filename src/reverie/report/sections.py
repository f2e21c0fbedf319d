"""What each section of the report shows, made of `metrics.json` and `details.json`; None, or nothing, where a run has no such thing."""

import base64
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reverie import flags
from reverie.report import charts, outcome
from reverie.report.separation import REAL

# Histograms that are shown at once; the others are folded away.
WORST = 12
_MOST_CLASSES_COLOURED = 10
_REAL_COLOUR = 9
_STAGES = {
    "synthesize": "Making the images",
    "refine": "Refining the images",
    "excite": "Images that excite the ranges",
    "round": "Rounding, unit after unit",
    "distil": "Teaching the student",
}
# Why a curve has teeth.
_BEGINS_ANEW = dict.fromkeys(("synthesize", "refine", "excite"), " Where it jumps, the next batch of images begins.") | {
    "round": " Where it jumps, the next unit begins."
}


@dataclass(frozen=True)
class Bar:
    """One row of a chart in HTML: `share` of the largest, 0 to 1, and where its quartiles are, if it has some."""

    name: str
    share: float
    text: str
    quartiles: tuple[float, float] | None = None


@dataclass(frozen=True)
class Thumb:
    """A small picture: its place in the sheet, per cent, what it is, and whether the network takes it for that."""

    number: int
    left: float
    top: float
    label: str
    agreed: bool


def sheet(thumbnails: dict[str, Any] | None, plots: Path) -> dict[str, Any] | None:
    """The sheet of thumbnails: the picture, sets with their thumbnails (by class where each has a row), and what the script shows of each."""
    if thumbnails is None or not (plots / thumbnails["file"]).is_file():
        return None
    columns, rows, items = thumbnails["columns"], thumbnails["rows"], thumbnails["items"]
    sets: dict[str, list[tuple[int, Thumb]]] = {}
    for number, item in enumerate(items):
        answer, share = item["top"][0]
        asked = answer if item["class"] is None else item["class"]
        made = "" if item["class"] is None else f"{'of' if item['set'] == REAL else 'made for'} class {item['class']}; "
        thumb = Thumb(
            number,
            100 * (number % columns) / max(columns - 1, 1),
            100 * (number // columns) / max(rows - 1, 1),
            f"{item['set']} image {made}the network says class {answer}, {100 * share:.1f} %",
            asked == answer,
        )
        sets.setdefault(item["set"], []).append((asked, thumb))
    classes = sorted({asked for thumbs in sets.values() for asked, _ in thumbs})
    return {
        "picture": embedded(plots / thumbnails["file"]),
        "size": thumbnails["size"],
        "scale": [100 * columns, 100 * rows],
        "pixelated": max(thumbnails["size"]) <= 64,
        "sets": {name: [thumb for _, thumb in thumbs] for name, thumbs in sets.items()},
        "rows": [
            (number, {name: [thumb for asked, thumb in thumbs if asked == number] for name, thumbs in sets.items()})
            for number in classes
        ]
        if thumbnails["by_class"]
        else [],
        "real": REAL in sets,
        "wrong": sum(not thumb.agreed for thumbs in sets.values() for _, thumb in thumbs),
        "data": [[item["set"], item["class"], item["top"]] for item in items],
    }


def embedded(picture: Path) -> str | None:
    """The file as a data URI; None if there is none."""
    if not picture.is_file():
        return None
    kind = "jpeg" if picture.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def set_colours(names: Sequence[str]) -> dict[str, int]:
    """The number of each set's colour; real images have their own."""
    others = [name for name in names if name != REAL]
    return {name: index % 6 for index, name in enumerate(others)} | ({REAL: _REAL_COLOUR} if REAL in names else {})


def plane(found: dict[str, Any] | None, classes: int) -> dict[str, Any] | None:
    """Panels of the plane of deep features, all with the same axes: name, count and chart of each set."""
    if found is None:
        return None
    everything = [point for part in found["sets"].values() for point in part["points"]]
    ends = [(min(axis), max(axis)) for axis in zip(*everything, strict=True)]
    reach = max(1e-6, *(0.54 * (high - low) for low, high in ends))
    limits = tuple(((low + high) / 2 - reach, (low + high) / 2 + reach) for low, high in ends)
    coloured = classes <= _MOST_CLASSES_COLOURED
    colours = set_colours(list(found["sets"]))
    first, second = (f"{100 * share:.0f} %" for share in found["shares"])
    return {
        "panels": [
            (
                name,
                len(part["points"]),
                charts.scatter(
                    part["points"],
                    part["classes"],
                    (limits[0], limits[1]),
                    label=f"Deep features of {len(part['points'])} {name} images on the plane of their two principal components",
                    colours=None if coloured else colours[name],
                ),
            )
            for name, part in found["sets"].items()
        ],
        "shares": (first, second),
        "legend": list(range(classes)) if coloured else [],
    }


def deviations(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two curves over the layers for each set, and histograms of some layers."""
    if not found or not found["layers"]:
        return None
    layers, colours = found["layers"], set_colours(list(found["sets"]))
    names = [short(layer.removesuffix("_batch_norm").strip("_")) for layer in layers]

    def curve(key: str, what: str) -> Markup:
        series = [charts.Line(name=name, colour=colours[name], values=part[key]) for name, part in found["sets"].items()]
        return charts.lines(
            series,
            list(range(len(layers))),
            label=f"{what}, by batch norm",
            across="batch norms, from first to last",
            names=names,
        )

    return {
        "legend": colours,
        "off": curve("off", "How far the mean over a set of images is from the one remembered"),
        "spread": curve("spread", "Standard deviation from image to image"),
        "histograms": [
            (
                short(part["layer"].removesuffix("_batch_norm").strip("_")),
                charts.outlines(
                    list(part["sets"].values()),
                    part["reach"],
                    label=f"Deviations of single images at {part['layer']}",
                    numbers=[colours[name] for name in part["sets"]],
                    filled=list(part["sets"]).index(REAL) if REAL in part["sets"] else None,
                ),
            )
            for part in found["histograms"]
        ],
    }


def curves(losses: dict[str, Any]) -> list[tuple[str, str, Markup]]:
    """For each stage that went down a loss: its name, what is to be said of the curve, and the chart."""
    found = []
    for stage, title in _STAGES.items():
        if stage not in losses or len(losses[stage]["steps"]) < 2:
            continue
        steps, values = losses[stage]["steps"], losses[stage]["losses"]
        told = f"{values[0]:.3g} at first, {values[-1]:.3g} at last"
        line = charts.Line(name="loss", colour=0, values=values)
        chart = charts.lines([line], steps, label=f"{title}: loss {told}", across="step", logarithmic=min(values) > 0)
        found.append((title, f"Loss {told}.{_BEGINS_ANEW.get(stage, '')}", chart))
    return found


def rounding(errors: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Of each unit: its name, its errors before and after, and the share left."""
    return [
        {
            "name": name,
            "before": error["before"],
            "after": error["after"],
            "left": error["after"] / error["before"] if error["before"] else 1.0,
        }
        for name, error in errors.items()
    ]


def ranges(tensors: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Markup]]:
    """Tensors with the histogram of their values and their grid, worst first."""
    ordered = sorted(tensors, key=lambda tensor: (tensor["sqnr"], tensor["name"]))
    return [
        (
            tensor,
            charts.on_grid(
                tensor["counts"],
                (tensor["from"], tensor["to"]),
                (tensor["low"], tensor["high"]),
                tensor["step"],
                label=f"Values of {tensor['name']} and its grid of {tensor['bits']} bits, {tensor['low']:.3g} to {tensor['high']:.3g}",
                unit="codes" if tensor["unit"] == "step" else "values",
            ),
        )
        for tensor in ordered
    ]


def widths(tensors: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """The bits of every weight and every activation, where they are not all alike."""
    found = []
    for kind in ("weight", "activation"):
        parts = [tensor for tensor in tensors if tensor["kind"] == kind]
        bits = [tensor["bits"] for tensor in parts]
        if len(set(bits)) > 1:
            label = f"Bits of the {kind}s: {', '.join(f'{bits.count(width)} with {width}' for width in sorted(set(bits)))}"
            found.append(
                (f"{kind}s", charts.columns(bits, [tensor["name"] for tensor in parts], label=label, most=8, unit="bits"))
            )
    return found


def speed(metrics: dict[str, Any]) -> list[tuple[str, list[Bar]]]:
    """Bars of the times and sizes of the file in full precision and the quantized one."""
    times, sizes = metrics.get("latency_ms"), metrics.get("bytes", {})
    if times is None:
        return []
    names = {"fp32": "full precision", "quantized": "quantized"}
    slowest = max(times["quartiles"][key][1] for key in names)
    largest = max(sizes["fp32"], sizes["packed"])
    return [
        (
            "time for one image",
            [
                Bar(name, times[key] / slowest, f"{times[key]:.3g} ms", tuple(end / slowest for end in times["quartiles"][key]))
                for key, name in names.items()
            ],
        ),
        (
            "size of the file",
            [
                Bar(name, sizes[key] / largest, outcome.size_text(sizes[key]))
                for key, name in (("fp32", "full precision"), ("packed", "quantized"))
            ],
        ),
    ]


def change(found: dict[str, Any] | None) -> list[list[tuple[str, float, bool]]]:
    """The table of changed answers: text, how strong (-1 fewer to 1 more) and whether it is on the diagonal, for each cell."""
    table = (found or {}).get("change")
    if table is None:
        return []
    most = max(3, *(abs(count) for row in table for count in row))
    return [
        [(f"{count:+d}" if count else "·", count / most, label == answer) for answer, count in enumerate(row)]
        for label, row in enumerate(table)
    ]


def commands(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What each does, and the command line; the very line that made the run first, where it is recorded (`request`)."""
    facts, identity = record["facts"], record.get("identity", {})
    made = "synthesize" if identity.get("only") == "images" else "quantize"
    words = ["reverie", made, str(facts.get("network", "NETWORK")), "--recipe", "RUN/recipe.toml"]
    words += flags.words({key: value for key, value in facts.get("options", {}).items() if key != "execute_weights"})
    words += ["--device", str(facts["device"])] if facts["device"] != "cpu" else []
    for option, key in (
        ("--calibration", "calibration"),
        ("--evaluate", "evaluation"),
        ("--unlabelled", "unlabelled"),
        ("--capsule", "capsule"),
    ):
        if identity.get(key, "none") != "none":
            words += [option, "FOLDER"]
    literal = (facts.get("request") or {}).get("line")
    found = [("What made this run:", literal)] if literal else []
    found.append(("What makes it again:", shlex.join([*words, "--output", "again"])))
    if made == "quantize":
        found += [
            ("What proves once more that the runtime computes what was simulated:", "reverie verify RUN"),
            ("What measures it on other labelled images:", "reverie evaluate RUN --data FOLDER"),
            ("What tells which tensors cost most, and what would help:", "reverie diagnose RUN"),
        ]
    return found


def short(name: str, most: int = 30) -> str:
    """A name that fits above a panel: its end."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
