"""What the numbers of a run mean, in words: the same on the terminal and in the HTML report.

Everything here reads `metrics.json` and nothing else, so an old run can be shown again.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

_NAMES = {"full_precision": "full precision", "quantized": "fake-quantized", "exported": "exported (ONNX Runtime)"}
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
SETS = {
    "synthetic": "held-out synthetic",
    "unlabelled": "unlabelled",
    "evaluation": "evaluation",
    "calibration": "calibration",
}
NONE = "-"
# With more classes a number for each, or a name below each bar, would be unreadable.
MOST_CLASSES_LISTED = 20
_MOST_NUMBERS = 10


def headline(metrics: dict[str, Any]) -> str:
    """The result in a sentence or two."""
    best = "quantized" if metrics["exported"]["top1"] is None else "exported"
    name = f"{metrics['network']['name']} at {bits_text(metrics)}"
    if metrics[best]["top1"] is not None:
        sentence = (
            f"{name} reads {percent(metrics[best]['top1'])} of {metrics[best]['images']} labelled images right, "
            f"full precision {percent(metrics['full_precision']['top1'])}: "
            f"{_difference(metrics['difference'][best])} points"
        )
    elif metrics["agreement"]:
        kind, answers = next(iter(metrics["agreement"].items()))
        share = answers.get("exported", answers["quantized"])
        sentence = (
            f"{name} gives the class of full precision on {percent(share)} of {answers['images']} {SETS[kind]} images; "
            f"{_unlabelled(metrics['estimate'])}"
        )
    else:
        sentence = f"{name} was not compared with full precision, for want of images"
    if metrics["latency_ms"] is None:
        return f"{sentence}. Nothing was exported, so nothing was timed."
    smaller = metrics["bytes"]["fp32"] / metrics["bytes"]["packed"]
    return f"{sentence}. The file is {smaller:.1f} times smaller; {_speed(metrics['latency_ms']['ratio'])} in {runtime_name(metrics)}."


def runtime_name(metrics: dict[str, Any]) -> str:
    """What the exported file was executed in; runs of older versions knew one."""
    name = (metrics["parity"] or {}).get("runtime", "onnxruntime")
    return str(_RUNTIMES.get(name, name))


def table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns and the rows: full precision, fake-quantized and, if there is a file, exported."""
    labelled = metrics["full_precision"]["top1"] is not None
    sets = list(metrics["agreement"])
    head = ["", "accuracy", *(["difference, points (95 %)"] if labelled else [])]
    head += [*(f"agrees, {name}" for name in sets), "size", "latency", "speed"]
    rows = []
    for key, name in (_NAMES | {"exported": f"exported ({runtime_name(metrics)})"}).items():
        if key == "exported" and metrics["latency_ms"] is None:
            continue
        row = [name, percent(metrics[key]["top1"]) if labelled else "no labels"]
        if labelled:
            row.append(_difference(metrics["difference"][key]) if key in metrics["difference"] else NONE)
        row += [percent(metrics["agreement"][part][key]) if key != "full_precision" else NONE for part in sets]
        rows.append([*row, _size(metrics, key), *_latency(metrics, key)])
    return head, rows


def score_table(scores: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Likewise for what `report.metrics.score` found on one set of images."""
    labelled = "top1" in scores
    head = ["", *(["accuracy", "difference, points (95 %)"] if labelled else []), "agreement"]
    rows = []
    for key, name in _NAMES.items():
        other = key in scores["agreement"]
        if other or key == "full_precision":
            difference = _difference(scores["difference"][key]) if labelled and other else NONE
            accuracy = [percent(scores["top1"][key]), difference] if labelled else []
            rows.append([name, *accuracy, percent(scores["agreement"][key]) if other else NONE])
    return head, rows


def notes(metrics: dict[str, Any]) -> list[str]:
    """A line each on parity, images, what was learned from them, and time."""
    lines = []
    if metrics["parity"] is not None:
        lines.append(f"parity: {_parity(metrics['parity'], runtime_name(metrics))}")
        lines += [f"parity: {line}" for line in other_runtimes(metrics)]
    lines += [f"images: {images_text(metrics['images'])}", *learning_notes(metrics)]
    if "mixed_precision" in metrics:
        lines.append(f"bits: {mixed_precision_text(metrics['mixed_precision'])}")
    if metrics["estimate"] is not None:
        lines.append(f"estimated drop: {estimate_text(metrics['estimate'])}")
    lines.append(f"seconds: {seconds_text(metrics['seconds'])}; peak memory {memory_text(metrics['peak_memory_bytes'])}")
    return lines


def images_text(images: dict[str, Any]) -> str:
    """Such as `64 (64 zeroq), 30 20 14 of each class, batch-norm distance 0.021, class coverage 0.95, entropy 0.1, ...`."""
    sources = ", ".join(f"{count} {source}" for source, count in images["source"].items())
    diversity = images["diversity"]
    parts = [f"{images['count']} ({sources})", _classes(diversity["class_histogram"])]
    for key in ("batch_norm_distance", "class_coverage", "entropy", "feature_similarity"):
        if diversity[key] is not None:
            parts.append(f"{key.replace('_', ' ').replace('batch norm', 'batch-norm')} {diversity[key]:.3g}")
    return ", ".join(parts)


def estimate_parts(estimate: dict[str, Any]) -> tuple[str, str]:
    """Such as `1.8 points` and `90 % interval 0.6 to 4.1`; the first is a bound beyond what the estimate was calibrated on."""
    if estimate["drop"] is None:
        return f"more than {100 * estimate['low']:.1f} points", "further than the estimate was calibrated"
    return f"{100 * estimate['drop']:.1f} points", f"90 % interval {100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"


def estimate_text(estimate: dict[str, Any]) -> str:
    """Such as `1.8 points (90 % interval 0.6 to 4.1), from answers that are 0.093 apart on 32 images made for it`."""
    value, interval = estimate_parts(estimate)
    apart = f"answers that are {estimate['distance']:.3g} apart on {estimate['images']} images made for it"
    return f"{value} ({interval}), from {apart}"


def learning_notes(metrics: dict[str, Any]) -> list[str]:
    """Likewise on what was chosen, images that were joined or left out, classes that the capsule does not tell, and what distillation saw; where
    there is any."""
    images, distillation = metrics["images"], metrics.get("distillation")
    capsule, mosaics = images.get("capsule"), images.get("mosaics", {})
    lines = [f"best: {reason}" for reason in metrics.get("choice", [])]
    lines += [f"mosaics: {images['source'][kind]} {kind} joined to {count} whole images" for kind, count in mosaics.items()]
    fewer = metrics.get("calibration", {})
    if any(count < (images["source"] | mosaics)[kind] for kind, count in fewer.items()):
        used = ", ".join(f"{count} {kind}" for kind, count in fewer.items())
        lines.append(f"ranges and rounding: decided on {used} of them")
    if capsule is not None and (capsule["missing"] or capsule["misclassified"]):
        lines.append(f"capsule: {_capsule(capsule)}")
    if distillation is not None:
        lines.append(f"distillation: {_distillation(distillation)}")
    return lines


def numbers_text(numbers: Sequence[int]) -> str:
    """Such as `3, 7`, or `0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 90 more`; `none` for none."""
    more = f" and {len(numbers) - _MOST_NUMBERS} more" if len(numbers) > _MOST_NUMBERS else ""
    return ", ".join(map(str, numbers[:_MOST_NUMBERS])) + more or "none"


def seconds_text(seconds: dict[str, float]) -> str:
    """Such as `capture 1.2, synthesize 10.3, total 11.5`."""
    return ", ".join(f"{stage} {value:.1f}" for stage, value in {**seconds, "total": sum(seconds.values())}.items())


def bits_text(metrics: dict[str, Any]) -> str:
    """Such as `W4A8`, `W4A4 (stem and sums in 8)`, or `mixed W3.99A8` with the means over all tensors."""
    mixed = metrics.get("mixed_precision")
    if mixed is not None:
        # Without a tensor on a grid, activations are in float.
        return f"mixed W{mixed['effective_bits']:.3g}A{mixed.get('effective_activation_bits', 32):.3g}"
    settings = metrics["quantization"]
    text = f"W{settings['weight_bits']}A{settings['activation_bits']}"
    more = {"stem": settings["stem_bits"], "sums": settings["sum_bits"]}
    more = {
        what: bits for what, bits in more.items() if settings["placement"] == "integer" and settings["activation_bits"] < bits
    }
    if len(more) == 2 and len(set(more.values())) == 1:
        more = {"stem and sums": settings["sum_bits"]}
    return f"{text} ({', '.join(f'{what} in {bits}' for what, bits in more.items())})" if more else text


def mixed_precision_text(mixed: dict[str, Any]) -> str:
    """Such as `8 weights with 3, 12 with 4 (mean 3.99); 31 activations with 8 (mean 8); 31.9 bit operations a multiply-accumulate`."""
    parts = []
    for kind, key in (("weight", "effective_bits"), ("activation", "effective_activation_bits")):
        counts = sorted(Counter(tensor["bits"] for tensor in mixed["tensors"] if tensor["kind"] == kind).items())
        if not counts:
            continue
        mean = mixed[key]
        (bits, first), *rest = counts
        listed = [f"{first} {kind}{'' if first == 1 else 's'} with {bits}", *(f"{count} with {bits}" for bits, count in rest)]
        parts.append(f"{', '.join(listed)} (mean {mean:.3g})")
    return "; ".join([*parts, f"{mixed['bit_operations']:.3g} bit operations a multiply-accumulate"])


def percent(share: float | None) -> str:
    """Such as `99.67 %`; `below 0.01 %` for what would look like nothing."""
    if share is None:
        return NONE
    return "below 0.01 %" if 0 < share < 5e-5 else f"{100 * share:.2f} %"


def size_text(size: int) -> str:
    """Such as `1.2 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def memory_text(size: int) -> str:
    """Such as `0.6 GiB`, the unit of `--memory-limit`."""
    return f"{size / 2**30:.1f} GiB"


def _unlabelled(estimate: dict[str, Any] | None) -> str:
    """What can be said about accuracy without labels."""
    if estimate is None:
        return "its accuracy is unknown without labelled ones"
    value, interval = estimate_parts(estimate)
    return f"without labels, its accuracy is estimated to be lower by {value} ({interval})"


def _classes(histogram: list[int]) -> str:
    """Such as `30 20 14 of each class`, or `61 of 1000 classes seen, at most 3 of one` where there are too many to list."""
    if len(histogram) <= MOST_CLASSES_LISTED:
        return f"{' '.join(map(str, histogram))} of each class"
    return f"{sum(count > 0 for count in histogram)} of {len(histogram)} classes seen, at most {max(histogram)} of one"


def _capsule(capsule: dict[str, Any]) -> str:
    """Such as `3 of 10 classes missing (2, 5, 7); 1 misclassified (4)`."""
    found = {kind: capsule[kind] for kind in ("missing", "misclassified") if capsule[kind]}
    text = "; ".join(f"{len(classes)} {kind} ({numbers_text(classes)})" for kind, classes in found.items())
    count, _, rest = text.partition(" ")
    return f"{count} of {capsule['classes']} classes {rest}"


def _distillation(distillation: dict[str, Any]) -> str:
    """Such as `300 steps, each on 64 fdda and 64 real images`."""
    steps = distillation["steps"]
    images = " and ".join(f"{count} {source}" for source, count in distillation["images_of_a_step"].items())
    # Runs of before had no such setting.
    kept = "" if distillation.get("learned_weights", True) else "; weights were kept, biases, norms and scales learned"
    return f"{steps} step{'' if steps == 1 else 's'}, each on {images} images{kept}"


def _difference(interval: dict[str, float]) -> str:
    return f"{100 * interval['difference']:+.2f} ({100 * interval['low']:+.2f} to {100 * interval['high']:+.2f})"


def _speed(ratio: float) -> str:
    return (
        f"it runs {ratio:.2f} times as fast as the FP32 file"
        if ratio >= 1
        else f"it runs at {ratio:.2f} of the speed of the FP32 file"
    )


def _size(metrics: dict[str, Any], key: str) -> str:
    name = {"full_precision": "fp32", "quantized": "network", "exported": "packed"}[key]
    return size_text(metrics["bytes"][name]) if name in metrics["bytes"] else NONE


def _latency(metrics: dict[str, Any], key: str) -> tuple[str, str]:
    """Milliseconds, and how many times as fast as full precision."""
    times = metrics["latency_ms"]
    if times is None or key == "quantized":
        return NONE, NONE
    if key == "full_precision":
        return f"{times['fp32']:.3g} ms", "1.00 x"
    return f"{times['quantized']:.3g} ms", f"{times['ratio']:.2f} x"


def other_runtimes(metrics: dict[str, Any]) -> list[str]:
    """What the certificate says of the runtimes that the file is not made for, a sentence each."""
    issued = metrics.get("certificate") or {"runtime": None, "runtimes": {}}
    return [
        f"in {_RUNTIMES.get(name, name)} {proof['version']} {_told(proof)}"
        for name, proof in issued["runtimes"].items()
        if name != issued["runtime"]
    ]


def reference_opinion(metrics: dict[str, Any]) -> str | None:
    """What the certificate says of the reference interpreter, as the end of a sentence about the checkpoint; None where it was not asked."""
    found = (metrics.get("certificate") or {}).get("reference")
    if found is None:
        return None
    return f"and {_RUNTIMES.get(found['runtime'], found['runtime'])}: {_told(found)}, {percent(found['differing_share'])} of codes differ"


def certified(metrics: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Every tensor that the certificate speaks of: the runtimes, and for each tensor what each of them says."""
    issued = metrics.get("certificate") or {"runtimes": {}}
    proofs = {_RUNTIMES.get(name, name): proof["codes"] for name, proof in issued["runtimes"].items() if "codes" in proof}
    tensors = dict.fromkeys(tensor for codes in proofs.values() for tensor in codes)
    rows = [(tensor, [_apart(codes.get(tensor)) for codes in proofs.values()]) for tensor in tensors]
    return list(proofs), rows


def _apart(difference: Sequence[int | float] | None) -> str:
    """The largest difference of codes and the share of those that differ; a runtime may not show a tensor."""
    if difference is None:
        return "not seen"
    steps, share = difference
    return f"{steps:.0f}, {percent(share)}" if steps else "0"


def _told(proof: dict[str, Any]) -> str:
    if proof.get("failure") is not None and "codes" not in proof:
        return str(proof["failure"])
    steps, integers = proof["max_code_difference"], proof["layers"] - len(proof["float_layers"])
    return (
        f"codes at most {steps} step{'' if steps == 1 else 's'} apart, same class on {percent(proof['top1_agreement'])} of "
        f"{proof['images']} images, {integers} of {proof['layers']} layers in integers"
    )


def benchmark_notes(rows: Sequence[dict[str, Any]], bits: Sequence[int], *, full_precision: str) -> list[str]:
    """What the numbers of `reverie benchmark` mean, in plain words.

    Args:
        bits: Of the weights of each layer.
        full_precision: The name of that form in the rows.
    """
    notes = []
    low = sum(width < 8 for width in bits)
    if low:
        notes.append(
            f"{low} of {len(bits)} layers have weights below 8 bits: that buys a smaller file and not speed, because every runtime here "
            "unpacks them to bytes when it loads the file and multiplies bytes"
        )
    if any(row["runtime"] == "torch" for row in rows):
        notes.append("torch executes a program uncompiled here, every layer in float: torch.compile makes int8 kernels of it")
    for row in rows:
        slower = [size for size, time in row["latency_ms"].items() if (time["times_full_precision"] or 1) < 1]
        if slower and row["form"] != full_precision:
            notes.append(
                f"{row['form']} is slower than full precision in {_RUNTIMES.get(row['runtime'], row['runtime'])} "
                f"at batch {' and '.join(slower)}: there it buys size only"
            )
    return notes


def _parity(parity: dict[str, Any], runtime: str) -> str:
    steps = parity["max_code_difference"]
    return (
        f"codes of {runtime} and the student at most {steps} step{'' if steps == 1 else 's'} apart "
        f"({percent(parity['differing_share'])} differ), same class on {percent(parity['top1_agreement'])} "
        f"of {parity['images']} images"
    )
