"""`reverie verify`: the parity certificates of a run, issued again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions
from reverie.cli._output import say, say_json, say_table
from reverie.cli._runs import exported_files, load_network, packed_file, restored, runtime_of
from reverie.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from torch import Tensor

    from reverie.models import Network


def verify(
    run: Path,
    /,
    *,
    images: int = 64,
    data: Path | None = None,
    runtime: str | None = None,
    network: str | None = None,
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Compare every exported file of a run with its checkpoint in every installed runtime that reads it.

    Every quantized tensor must be at most one code apart, and both must give the same classes. The exit status is 1 if that is not
    so in the runtime that a file is made for or in the one that was asked for, if the runtime that a file is made for is not
    installed, unless another one was asked for, or if a file is not what the run wrote. What another
    runtime makes of a file is told, and so is how many codes differ from those of the reference interpreter, which computes in
    integers alone and from end to end.

    Example: reverie verify runs/embedded-digits-w4a8 --images 64 --runtime openvino

    Args:
        run: A run directory that `reverie quantize` completed.
        images: How many to compare at most.
        data: Folder of images to compare on, or an .npz or .safetensors file; default: the run's own.
        runtime: Ask this one only; default: all that are installed.
        network: The full-precision network; default: the one that the run names.
        json: Print the certificates as one JSON document.
    """
    from reverie import runtimes
    from reverie.export._certificate import attached, certificate, oppose, prove, refer

    if images < 1:
        raise ConfigError(f"images must be at least 1, got {images}")
    asked = runtimes.installed() if runtime is None else {runtime: runtimes.load(runtime)}
    files, packed = exported_files(run), packed_file(run)
    before = {file: attached(file) for file in files}
    loaded = load_network(run, network, options)
    quantized, inputs = restored(run, loaded), _inputs(run, loaded, data, images)
    answer = refer(quantized, inputs)
    issued: dict[str, Any] = {}
    untold: list[str] = []
    for file in files:
        able = {name: plugin for name, plugin in asked.items() if file.suffix in plugin.reads}
        proofs = prove(quantized, file, inputs, able)
        own = (before[file] or {"runtime": runtime_of(file)})["runtime"]
        beside = own if own in able else next(iter(able), None)
        readable = beside is not None and proofs[beside].parity is not None
        opinion = None
        if readable:
            try:
                opinion = oppose(answer, quantized, file, inputs, able[str(beside)])
            except ExportError as error:
                # It is beside the proof, and no part of it.
                untold.append(f"{file.name}: not compared with the reference: {error}")
        issued[file.name] = certificate(proofs, file, runtime=own, checkpoint=packed, images=inputs, opinion=opinion)
        issued[file.name]["same_checkpoint"] = _same_checkpoint(before[file], issued[file.name])
    if json:
        say_json({"images": len(inputs), "files": issued, "notes": untold})
    else:
        _tell(issued, len(inputs), sorted(set(runtimes.names()) - set(runtimes.installed())))
        for line in untold:
            say(line)
    failed = [
        f"{name} in {place}: {proof['failure']}"
        for name, file in issued.items()
        for place, proof in file["runtimes"].items()
        if proof["failure"] is not None and place in (file["runtime"], runtime)
    ]
    if runtime is None:
        failed += [
            f"{name}: must be asked in the runtime that it is made for, and {_missing(file['runtime'])}"
            for name, file in issued.items()
            if file["runtime"] not in file["runtimes"]
        ]
    failed += [
        f"{run / name}: must be of this run's checkpoint, got a certificate for another one; export it again"
        for name, file in issued.items()
        if file["same_checkpoint"] is False
    ]
    if failed:
        raise ExportError("; ".join(failed))
    if not any(file["runtimes"] for file in issued.values()):
        raise ConfigError(f"{run}: a runtime that reads {', '.join(issued)} must be asked, got {', '.join(asked) or 'none'}")


def _inputs(run: Path, network: "Network", data: Path | None, count: int) -> "Tensor":
    """At most `count` images in the network's own units."""
    from reverie.images.folder import read_folder
    from reverie.images.store import load_images
    from reverie.runs import check_hash

    if data is not None:
        return read_folder(data, network.input, network.classes, require_labels=False).inputs[:count]
    stored = run / "images.safetensors"
    if not stored.is_file():
        raise ConfigError(f"{run}: must hold images.safetensors, got none; give images with --data")
    check_hash(run, stored)
    return load_images(stored).resized(*network.input.shape[1:]).inputs[:count]


def _missing(runtime: str) -> str:
    """Why a runtime cannot be asked, and what helps."""
    from reverie import runtimes

    try:
        runtimes.load(runtime)
    except ConfigError as error:
        return str(error)
    return f"runtime {runtime!r} does not read it; export it again"


def _same_checkpoint(before: dict[str, Any] | None, now: dict[str, Any]) -> bool | None:
    """Whether the certificate in a file is for the run's checkpoint; None where there is none."""
    return None if before is None else bool(before["sha256"]["checkpoint"] == now["sha256"]["checkpoint"])


def _tell(issued: dict[str, Any], images: int, missing: list[str]) -> None:
    rows = []
    for name, file in issued.items():
        for place, proof in file["runtimes"].items():
            label, integers = (
                f"{place} {proof['version']}",
                f"{proof['layers'] - len(proof['float_layers'])} of {proof['layers']}",
            )
            if "codes" not in proof:
                rows.append((name, label, "-", "-", "-", "-", "fails"))
                continue
            rows.append(
                (
                    name,
                    label,
                    str(proof["max_code_difference"]),
                    f"{proof['differing_share']:.3%}",
                    f"{proof['top1_agreement']:.2%}",
                    integers,
                    "holds" if proof["failure"] is None else "fails",
                )
            )
        if (reference := file["reference"]) is not None:
            rows.append(
                (
                    name,
                    f"reference, beside {reference['runtime']}",
                    str(reference["max_code_difference"]),
                    f"{reference['differing_share']:.3%}",
                    f"{reference['top1_agreement']:.2%}",
                    f"{reference['layers'] - len(reference['float_layers'])} of {reference['layers']}",
                    "differs" if reference["differing_share"] else "equal",
                )
            )
    head = ("file", "runtime", "largest difference, codes", "codes that differ", "same class", "integer layers", "parity")
    say_table(head, rows, numbers=range(2, 6))
    say(f"images: {images}")
    for count in sorted({file["reference"]["images"] for file in issued.values() if file["reference"] is not None}):
        say(f"reference: integer arithmetic alone, run freely on {count} of them")
    for name, file in issued.items():
        for place, proof in file["runtimes"].items():
            if proof["failure"] is not None:
                say(f"{name} in {place}: {proof['failure']}")
            if proof.get("unrounded"):
                say(
                    f"{place} does not round {len(proof['unrounded'])} tensors of {name} that it merges into sums: they stay finer"
                )
            if proof.get("unseen"):
                say(
                    f"{place} hides the codes of {len(proof['unseen'])} tensors of {name}: asking for them changes what it computes"
                )
        say(f"{name}: content sha256 {file['sha256']['content']}")
    for name in missing:
        say(f"not installed: {name}")
