"""What a reader might take the numbers of a run for, and should not."""

from typing import Any

from reverie.report import outcome


def caveats(metrics: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """A sentence or two each.

    Args:
        metrics: As in `metrics.json`.
        record: As in `run.json`.
    """
    found: list[str] = []
    if "quantization" not in metrics:
        return [
            "How good these images are for quantization shows only where a network learns from them: `reverie quantize` measures that."
        ]
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
    if metrics["estimate"] is not None:
        found.append(
            "The drop of accuracy is an estimate: how much the answers change on synthetic images of another kind, and what such a change "
            "meant for networks whose labels are known. For images unlike those that the network was trained on it says nothing."
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
            f"Times are medians for single images in {_where(metrics, record)} on one machine "
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
            f"Parity was checked in {_where(metrics, record)} on a CPU. Other runtimes round and fuse in their own ways."
        )
    return found


def _where(metrics: dict[str, Any], record: dict[str, Any]) -> str:
    """The runtime and its version."""
    library = metrics["parity"].get("runtime", "onnxruntime") if metrics["parity"] else "onnxruntime"
    return f"{outcome.runtime_name(metrics)} {record['versions'].get(library, '')}".strip()
