"""One HTML file about a run that needs nothing else: styles, charts and pictures are inside.

The words for the numbers come from `outcome.py`, as on the terminal; `report.html.j2` has the markup. Equal runs give equal
files, since nothing here looks at the clock.
"""

import base64
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from reverie.progress import duration_text
from reverie.recipe import Recipe, tables, to_toml
from reverie.report import outcome

_WORST = 10

_MEASURES = {
    "batch_norm_distance": "how far the images' statistics are from those that the batch norms remember; 0 is a perfect match",
    "class_coverage": "how evenly the network's answers spread over the classes, 0 to 1",
    "confidence": "mean probability of the class that the network takes an image for",
    "entropy": "mean entropy of the network's answers, in nats; 0 is certainty",
    "feature_similarity": "mean cosine of pairs of images in what the last layer reads, 0 to 1 behind a ReLU; 1 is one image many times",
}

_SEPARATION = {
    "inter_class_separation": "how far apart the classes are: mean squared distance of their centres",
    "intra_class_spread": "how far images of one class are apart: mean squared distance to its centre",
    "separation_ratio": "the first over the second; classes drawn at random have about 2 over the number of images in each",
    "centre_distance_to_real": "how far a class is from where its real images are: mean squared distance of the centres",
    "coverage": "share of real images that have a synthetic one among their neighbours, 0 to 1",
}


@dataclass(frozen=True)
class Bar:
    """One row or column of a chart; `share` of the largest, 0 to 1."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class Cell:
    """A number in a table: `shade` says how large, 0 to 1; whether it was `chosen`."""

    text: str
    shade: float
    chosen: bool


def render(metrics: dict[str, Any], recipe: Recipe, record: dict[str, Any], path: Path) -> str:
    """The report as HTML.

    Args:
        metrics: As in `metrics.json`.
        record: As in `run.json`.
        path: The run directory; its contact sheet and plots are put into the file.
    """
    template = (resources.files("reverie.report") / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    head, rows = outcome.table(metrics)
    return environment.from_string(template).render(
        name=metrics["network"]["name"],
        bits=outcome.bits_text(metrics),
        methods=_methods(recipe),
        headline=outcome.headline(metrics),
        cards=_cards(metrics),
        head=head,
        rows=rows,
        parity=metrics["parity"],
        worst=_worst(metrics["parity"]),
        latency=metrics["latency_ms"],
        sheet=_embedded(path / "images" / "contact_sheet.png"),
        images=outcome.images_text(metrics["images"]),
        learning=outcome.learning_notes(metrics),
        classes=_classes(metrics["images"]["diversity"]["class_histogram"]),
        class_labels=metrics["network"]["classes"] <= outcome.MOST_CLASSES_LISTED,
        measures=_measures(metrics["images"]["diversity"]),
        separation=_separation(metrics["images"].get("separation", {})),
        features=_embedded(path / "plots" / "features.png"),
        deviations=_embedded(path / "plots" / "deviations.png"),
        sensitivity=_sensitivity(metrics.get("mixed_precision")),
        bits_spent=outcome.mixed_precision_text(metrics["mixed_precision"]) if "mixed_precision" in metrics else "",
        rounding=_rounding(metrics["rounding_errors"]),
        stages=_stages(metrics["seconds"]),
        total=duration_text(sum(metrics["seconds"].values())),
        memory=outcome.size_text(metrics["peak_memory_bytes"]),
        recipe=to_toml(recipe),
        facts=_facts(metrics, recipe, record),
        caveats=_caveats(metrics, record),
        percent=outcome.percent,
    )


def _methods(recipe: Recipe) -> list[str]:
    resolved = tables(recipe)
    return [f"{key} {table['method']}" for key, table in resolved.items() if isinstance(table, dict) and "method" in table]


def _cards(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that matter most: what, how much, and beside what."""
    best = "quantized" if metrics["exported"]["top1"] is None else "exported"
    cards = []
    if metrics[best]["top1"] is not None:
        full = outcome.percent(metrics["full_precision"]["top1"])
        cards.append(("accuracy", outcome.percent(metrics[best]["top1"]), f"full precision {full}"))
    if metrics["agreement"]:
        kind, answers = list(metrics["agreement"].items())[-1]
        share = answers.get("exported", answers["quantized"])
        cards.append(("agreement", outcome.percent(share), f"{answers['images']} {kind} images"))
    if metrics["latency_ms"] is not None:
        fp32, packed = metrics["bytes"]["fp32"], metrics["bytes"]["packed"]
        cards.append(("size", f"{fp32 / packed:.1f} x smaller", f"{outcome.size_text(fp32)} to {outcome.size_text(packed)}"))
        times = metrics["latency_ms"]
        cards.append(("speed", f"{times['ratio']:.2f} x", f"{times['fp32']:.3g} ms to {times['quantized']:.3g} ms"))
    return cards


def _worst(parity: dict[str, Any] | None) -> list[tuple[str, int, float]]:
    """The tensors that differ at all, most first: name, steps, share of their values."""
    if parity is None:
        return []
    found = [(name, part["max_code_difference"], part["differing_share"]) for name, part in parity["per_tensor"].items()]
    found = [part for part in found if part[1]]
    return sorted(found, key=lambda part: (-part[1], -part[2], part[0]))[:_WORST]


def _embedded(picture: Path) -> str | None:
    if not picture.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _classes(histogram: list[int]) -> list[Bar]:
    most = max([1, *histogram])
    return [Bar(str(number), count / most, f"class {number}: {count} images") for number, count in enumerate(histogram)]


def _measures(diversity: dict[str, Any]) -> list[tuple[str, str, str]]:
    known = [(key, diversity[key], meaning) for key, meaning in _MEASURES.items() if diversity[key] is not None]
    return [(key.replace("_", " "), f"{value:.3g}", meaning) for key, value, meaning in known]


def _separation(sets: dict[str, dict[str, float | None]]) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """The names of the sets, and for each measure that any of them has its name, its meaning and a number for each set."""
    rows = []
    for key, meaning in _SEPARATION.items():
        values = [measures[key] for measures in sets.values()]
        if any(value is not None for value in values):
            numbers = [outcome.NONE if value is None else f"{value:.3g}" for value in values]
            rows.append((key.replace("_class", "-class").replace("_", " "), meaning, numbers))
    return list(sets), rows


def _sensitivity(mixed: dict[str, Any] | None) -> list[tuple[str, list[str], list[tuple[str, str, list[Cell]]]]]:
    """For weights and for activations: what they are, the widths, and a row for each tensor (name, elements, a cell for each width)."""
    if mixed is None:
        return []
    largest = max(max(tensor["divergence"].values()) for tensor in mixed["tensors"])
    found = []
    for kind in ("weight", "activation"):
        tensors = [tensor for tensor in mixed["tensors"] if tensor["kind"] == kind]
        widths = sorted({int(bits) for tensor in tensors for bits in tensor["divergence"]})
        rows = [
            (
                tensor["name"],
                f"{tensor['elements']:,}",
                [
                    Cell(f"{value:.1e}", _shade(value, largest), int(bits) == tensor["bits"])
                    for bits, value in sorted(tensor["divergence"].items(), key=lambda item: int(item[0]))
                ],
            )
            for tensor in tensors
        ]
        found.append((f"{kind}s", [f"{bits} bits" for bits in widths], rows))
    return found


def _shade(value: float, largest: float) -> float:
    """0 for what is a hundred-thousandth of the largest or less, 1 for the largest, in proportion to the logarithm."""
    return max(0.0, 1 + math.log10(value / largest) / 5) if value > 0 else 0.0


def _rounding(errors: dict[str, dict[str, float]]) -> list[Bar]:
    """What is left of each unit's error."""
    left = {name: error["after"] / error["before"] if error["before"] else 1.0 for name, error in errors.items()}
    return [
        Bar(name, min(1.0, left[name]), f"{error['before']:.3g} to {error['after']:.3g}, {100 * left[name]:.0f} % left")
        for name, error in errors.items()
    ]


def _stages(seconds: dict[str, float]) -> list[Bar]:
    longest = max([1e-9, *seconds.values()])
    return [Bar(stage, value / longest, duration_text(value)) for stage, value in seconds.items()]


def _facts(metrics: dict[str, Any], recipe: Recipe, record: dict[str, Any]) -> dict[str, str]:
    facts = {
        "network": f"{metrics['network']['name']}, weights {metrics['network']['fingerprint']}",
        "recipe": f"{recipe.fingerprint}, seed {recipe.seed}",
        "device": str(record["facts"]["device"]),
    }
    options = record["facts"]["options"]
    if options:
        facts["options"] = ", ".join(f"{key} = {value}" for key, value in options.items())
    return facts | {name: str(version) for name, version in record["versions"].items()}


def _caveats(metrics: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What a reader might take these numbers for, and should not."""
    found = []
    if metrics["full_precision"]["top1"] is None:
        found.append(
            "No labelled images were given, so accuracy is unknown. Agreement with full precision is not accuracy: where both "
            "agree both may be wrong, and where they differ the quantized network may be right."
        )
    else:
        found.append(
            "Accuracy and its interval are about images like the labelled ones given, with one set of synthetic images; another "
            "seed gives slightly other weights."
        )
    if "synthetic" in metrics["agreement"]:
        found.append(
            "The held-out synthetic images come from the same method as those used for calibration. They show whether "
            "quantization changed the network where it was looked at, not how it behaves on real images."
        )
    if "calibration" in metrics["agreement"]:
        found.append(
            "Agreement was measured on the calibration images themselves, for want of others: on new images it may be lower."
        )
    if "noise" in metrics["images"]["source"]:
        found.append(
            "Part of the calibration images is Gaussian noise, which knows nothing of the network: a baseline, no more."
        )
    if metrics["latency_ms"] is not None:
        found.append(
            f"Times are medians for single images in ONNX Runtime {record['versions'].get('onnxruntime', '')} on one machine "
            f"({record['versions']['threads']} threads). Other processors rank FP32 and integers differently, and a busy "
            "machine shifts both."
        )
    if metrics["quantization"].get("placement") == "literature":
        found.append(
            "This is the literature's placement (batch norms kept, all layers at the same bits), for comparison with papers: "
            "integer runtimes execute another one, with another accuracy."
        )
    if metrics["latency_ms"] is None:
        found.append("Nothing was run in a real runtime, so the numbers are those of the simulation in PyTorch.")
    elif metrics["parity"] is not None:
        found.append(
            "Parity was checked in this version of ONNX Runtime on a CPU. Other runtimes round and fuse in their own ways."
        )
    return found
