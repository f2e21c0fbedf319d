"""What a run comes to, for someone who does not know the field: a sentence, a mark, and a few figures.

The mark is the accuracy kept, as a share of full precision's: good from 99 % on, which is what MLPerf Inference asks of most
quantized networks (Reddi et al. 2020, arXiv:1911.02549), poor below 95 %, which is our own bound.
Without labels it is the middle of the estimate, or unknown.
"""

from dataclasses import dataclass
from typing import Any, Literal

from reverie.report import outcome

Tone = Literal["good", "fair", "poor", "unknown"]

_KEPT: tuple[tuple[float, Tone], ...] = ((0.99, "good"), (0.95, "fair"), (-1.0, "poor"))


@dataclass(frozen=True)
class Card:
    """A figure: what it is, how much, beside what, and whether that is good."""

    what: str
    value: str
    beside: str
    tone: Tone = "unknown"


def sentence(metrics: dict[str, Any]) -> str:
    """What was gained and what it cost."""
    if "quantization" not in metrics:
        return _made(metrics)
    gains = _gains(metrics)
    parts = [
        f"The {outcome.bits_text(metrics)} network {gains}"
        if gains
        else f"The {outcome.bits_text(metrics)} network was only simulated"
    ]
    return f"{parts[0]}, {'and ' if gains else 'and it '}{_cost(metrics)}."


def mark(metrics: dict[str, Any]) -> tuple[Tone, str]:
    """A word or two, and how good that is."""
    if "quantization" not in metrics:
        return "unknown", "images only"
    best, full = _best(metrics), metrics["full_precision"]["top1"]
    if full:
        kept = metrics[best]["top1"] / full
        return _tone(kept), f"keeps {100 * kept:.1f} % of the accuracy" if kept < 1 else "loses no accuracy"
    estimate = metrics["estimate"]
    if estimate is None:
        return "unknown", "accuracy not measured"
    value, _ = outcome.estimate_parts(estimate)
    lost = estimate["low"] if estimate["drop"] is None else estimate["drop"]
    return _tone(1 - lost), f"estimated to lose {value}"


def cards(metrics: dict[str, Any]) -> list[Card]:
    """The figures that matter most."""
    if "quantization" not in metrics:
        return _image_cards(metrics)
    best, found = _best(metrics), []
    tone, _ = mark(metrics)
    if metrics[best]["top1"] is not None:
        found.append(
            Card(
                "accuracy",
                outcome.percent(metrics[best]["top1"]),
                f"was {outcome.percent(metrics['full_precision']['top1'])}",
                tone,
            )
        )
        interval = metrics["difference"][best]
        between = f"95 % sure: {100 * interval['low']:+.2f} to {100 * interval['high']:+.2f}"
        found.append(Card("change, points", f"{100 * interval['difference']:+.2f}", between, tone))
    elif metrics["estimate"] is not None:
        found.append(Card("accuracy lost, estimated", *outcome.estimate_parts(metrics["estimate"]), tone))
    if metrics["agreement"]:
        kind, answers = list(metrics["agreement"].items())[-1]
        share = answers.get("exported", answers["quantized"])
        found.append(Card("same answer", outcome.percent(share), f"on {answers['images']:,} {outcome.SETS[kind]} images"))
    if metrics["latency_ms"] is not None:
        fp32, packed, times = metrics["bytes"]["fp32"], metrics["bytes"]["packed"], metrics["latency_ms"]
        found.append(
            Card("smaller", f"{fp32 / packed:.1f} x", f"{outcome.size_text(fp32)} to {outcome.size_text(packed)}", "good")
        )
        quicker: Tone = "good" if times["ratio"] >= 1 else "fair"
        found.append(
            Card("faster", f"{times['ratio']:.2f} x", f"{times['fp32']:.3g} ms to {times['quantized']:.3g} ms", quicker)
        )
    return found


def _best(metrics: dict[str, Any]) -> str:
    return "quantized" if metrics["exported"]["top1"] is None else "exported"


def _tone(kept: float) -> Tone:
    return next(tone for bound, tone in _KEPT if kept >= bound)


def _gains(metrics: dict[str, Any]) -> str:
    """Such as `takes 5.2 times less space, runs 1.46 times as fast`; empty where nothing was exported."""
    if metrics["latency_ms"] is None:
        return ""
    smaller, ratio = metrics["bytes"]["fp32"] / metrics["bytes"]["packed"], metrics["latency_ms"]["ratio"]
    faster = f"runs {ratio:.2f} times as fast" if ratio >= 1 else f"runs slower, at {ratio:.2f} of the speed"
    return f"takes {smaller:.1f} times less space, {faster}"


def _cost(metrics: dict[str, Any]) -> str:
    best = _best(metrics)
    if metrics[best]["top1"] is not None:
        interval = metrics["difference"][best]
        lost, full = -100 * interval["difference"], outcome.percent(metrics["full_precision"]["top1"])
        if not round(lost, 2):
            told = "as many as the original"
        else:
            chance = "no more than chance explains" if interval["low"] <= 0 <= interval["high"] else "more than chance explains"
            told = f"{abs(lost):.2f} points {'fewer' if lost > 0 else 'more'} than the original's {full}, {chance}"
        return f"reads {outcome.percent(metrics[best]['top1'])} of {metrics[best]['images']:,} labelled images right: {told}"
    if metrics["agreement"]:
        kind, answers = next(iter(metrics["agreement"].items()))
        share = outcome.percent(answers.get("exported", answers["quantized"]))
        told = f"gives the original's answer on {share} of {answers['images']:,} {outcome.SETS[kind]} images"
    else:
        told = "was not compared with the original, for want of images"
    if metrics["estimate"] is None:
        return f"{told}; how accurate it is nobody knows without labelled ones"
    value, interval_text = outcome.estimate_parts(metrics["estimate"])
    return f"{told}; without labelled images the loss of accuracy is an estimate, {value} ({interval_text})"


def _made(metrics: dict[str, Any]) -> str:
    images = metrics["images"]
    sources, diversity = " and ".join(images["source"]), images["diversity"]
    seen = sum(count > 0 for count in diversity["class_histogram"])
    return (
        f"{images['count']:,} images were made out of the network alone by {sources}; it takes them for {seen:,} of its "
        f"{len(diversity['class_histogram']):,} classes, with a mean confidence of {outcome.percent(diversity['confidence'])}."
    )


def _image_cards(metrics: dict[str, Any]) -> list[Card]:
    diversity = metrics["images"]["diversity"]
    found = [
        Card("images", f"{metrics['images']['count']:,}", " and ".join(metrics["images"]["source"])),
        Card("class coverage", f"{diversity['class_coverage']:.2f}", "1 is every class alike"),
        Card("confidence", outcome.percent(diversity["confidence"]), "mean of the network's answers"),
    ]
    if diversity["batch_norm_distance"] is not None:
        found.append(Card("batch-norm distance", f"{diversity['batch_norm_distance']:.3g}", "0 is a perfect match"))
    return found
