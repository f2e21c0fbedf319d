"""One HTML file about a run that needs nothing else: styles, script, charts and pictures are inside, and nothing may be fetched.

The words for the numbers come from `outcome.py` and `verdict.py`; what each section shows from `sections.py`; `report.html.j2`,
`report.css` and `report.js` have the markup, the looks and the behaviour. Equal runs give equal files, since nothing here looks
at the clock. Every string is escaped where it enters the page, and a policy in its head forbids every request, and every script but
ours, by its hash.
"""

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reverie.progress import duration_text
from reverie.recipe import Recipe
from reverie.recipes import fingerprint, tables, to_toml
from reverie.report import details, outcome, privacy, sections, verdict
from reverie.report.caveats import caveats
from reverie.report.sensitivity_table import sensitivity_table

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


def render(metrics: dict[str, Any], recipe: Recipe, record: dict[str, Any], path: Path) -> str:
    """The report as HTML.

    Args:
        metrics: As in `metrics.json`, of a whole run or of one that made images only.
        record: As in `run.json`.
        path: The run directory; its `details.json`, where it has one, and its pictures are put into the file.
    """
    folder = resources.files("reverie.report")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["signed"] = lambda value, digits=2: f"{value:+.{digits}f}".replace("-", "\u2212")
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    more = details.read(path)
    sheet = sections.sheet(more.get("thumbnails"), path / "plots")
    quantized = _quantized(metrics, more) if "quantization" in metrics else {"quantized": False}
    return template.render(
        name=metrics["network"]["name"],
        methods=_methods(recipe) if quantized["quantized"] else _methods(recipe)[:1],
        sentence=verdict.sentence(metrics),
        mark=verdict.mark(metrics),
        cards=verdict.cards(metrics),
        sheet=sheet,
        contact_sheet=None if sheet else sections.embedded(path / "images" / "contact_sheet.png"),
        images=outcome.images_text(metrics["images"]),
        learning=outcome.learning_notes(metrics),
        classes=_classes(metrics["images"]["diversity"]["class_histogram"]),
        class_labels=metrics["network"]["classes"] <= outcome.MOST_CLASSES_LISTED,
        measures=_measures(metrics["images"]["diversity"]),
        separation=_separation(metrics["images"].get("separation", {})),
        plane=sections.plane(more.get("plane"), metrics["network"]["classes"]),
        features=None if "plane" in more else sections.embedded(path / "plots" / "features.png"),
        deviations=sections.deviations(more.get("deviations")),
        histograms=None if "deviations" in more else sections.embedded(path / "plots" / "deviations.png"),
        nearest=sections.embedded(path / "plots" / "nearest.png"),
        privacy=privacy.lines(metrics),
        curves=sections.curves(more.get("losses", {})),
        stages=_stages(metrics["seconds"]),
        total=duration_text(sum(metrics["seconds"].values())),
        memory=outcome.memory_text(metrics["peak_memory_bytes"]),
        recipe=to_toml(recipe),
        facts=_facts(metrics, recipe, record),
        commands=sections.commands(record),
        caveats=caveats(metrics, record),
        percent=outcome.percent,
        style=Markup(style),
        script=Markup(script),
        policy=f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        data=_as_data(sheet["data"] if sheet else []),
        **quantized,
    )


def _quantized(metrics: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """What a run has that did not only make images."""
    head, rows = outcome.table(metrics)
    tensors = more.get("tensors", [])
    return {
        "quantized": True,
        "bits": outcome.bits_text(metrics),
        "head": head,
        "rows": rows,
        "parity": metrics["parity"],
        "runtime": outcome.runtime_name(metrics),
        "others": outcome.other_runtimes(metrics),
        "opinion": outcome.reference_opinion(metrics),
        "certified": outcome.certified(metrics),
        "hashes": (metrics.get("certificate") or {}).get("sha256"),
        "worst": _worst(metrics["parity"]),
        "latency": metrics["latency_ms"],
        "speed": sections.speed(metrics),
        "tensors": tensors,
        "looked_at": outcome.SETS.get(more.get("looked_at", ""), ""),
        "ranges": sections.ranges(tensors),
        "worst_ranges": sections.WORST,
        "widths": sections.widths(tensors),
        "by_class": metrics.get("by_class"),
        "change": sections.change(metrics.get("by_class")),
        "sensitivity": sensitivity_table(metrics.get("mixed_precision")),
        "bits_spent": outcome.mixed_precision_text(metrics["mixed_precision"]) if "mixed_precision" in metrics else "",
        "rounding": sections.rounding(metrics["rounding_errors"]),
    }


def _as_data(value: object) -> Markup:
    """JSON for a script element: nothing in it can end the element, or begin a comment there."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _methods(recipe: Recipe) -> list[str]:
    resolved = tables(recipe)
    return [f"{key} {table['method']}" for key, table in resolved.items() if isinstance(table, dict) and "method" in table]


def _worst(parity: dict[str, Any] | None) -> list[tuple[str, int, float]]:
    """The tensors that differ at all, most first: name, steps, share of their values."""
    if parity is None:
        return []
    found = [(name, part["max_code_difference"], part["differing_share"]) for name, part in parity["per_tensor"].items()]
    found = [part for part in found if part[1]]
    return sorted(found, key=lambda part: (-part[1], -part[2], part[0]))[:_WORST]


def _classes(histogram: list[int]) -> list[sections.Bar]:
    most = max([1, *histogram])
    return [
        sections.Bar(str(number), count / most, f"class {number}: {count} images") for number, count in enumerate(histogram)
    ]


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


def _stages(seconds: dict[str, float]) -> list[sections.Bar]:
    longest = max([1e-9, *seconds.values()])
    return [sections.Bar(stage, value / longest, duration_text(value)) for stage, value in seconds.items()]


def _facts(metrics: dict[str, Any], recipe: Recipe, record: dict[str, Any]) -> dict[str, str]:
    facts = {
        "network": f"{metrics['network']['name']}, weights {metrics['network']['fingerprint']}",
        "recipe": f"{fingerprint(recipe)}, seed {recipe.seed}",
        "device": str(record["facts"]["device"]),
    }
    options = record["facts"]["options"]
    if options:
        facts["options"] = ", ".join(f"{key} = {value}" for key, value in options.items())
    return facts | {name: str(version) for name, version in record["versions"].items()}
