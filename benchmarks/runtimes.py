"""How fast exported files are, beside full precision and beside what the runtimes' own tools make: ONNX Runtime's `quantize_static`, NNCF.

    python benchmarks/runtimes.py --assets ../shared/assets                        every network: files, times, then the tables
    python benchmarks/runtimes.py --assets ../shared/assets --networks resnet18    one of them, then the tables of all that are there
    python benchmarks/runtimes.py --assets ../shared/assets --again                times anew; files are kept
    python benchmarks/runtimes.py --assets ../shared/assets --parity               what 1,000 images give in both runtimes; half an hour
    python benchmarks/runtimes.py --assets ../shared/assets --table                the tables of what is there

Needs the extras `onnx`, `openvino`, `models` and `package`, and nncf. Files and times of a network are a folder below build/runtimes, so
that an interrupted benchmark goes on where it stopped; files are made in a process for each network, so that none times what another left.

Time is all that is compared here: students are rounded to nearest, everybody gets the same 32 calibration images, and nobody's
accuracy is told. All files of a runtime take turns in one process, in another order each time. A turn is two calls, of which the second
is timed: the threads of the file before spin for a while when it has answered, and would be timed with it. Ratios are those of times in one
turn, so that what else the machine does hits both sides; median (quartiles) of everything.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from reverie import runtimes

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "runtimes"
CALIBRATION, IMAGES = 32, 1000
# Images whose every code is compared, of those whose class is.
INSPECTED = 32
LEAST_TURNS, MOST_TURNS = 10, 300
FLOWER = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NETWORKS = {
    "resnet18": "ResNet-18, random weights",
    "mobilenet_v2": "MobileNetV2",
    "lite0": "EfficientNet-Lite0",
    "resnet20": "ResNet-20, 32 x 32",
}


@dataclass(frozen=True)
class Student:
    """A setting of ours.

    Args:
        bits: Of weights, of activations, and of both in the layers at the ends.
        timed: False for what only the size of its ONNX file is asked of.
    """

    bits: tuple[int, int, int]
    timed: bool = True


@dataclass(frozen=True)
class Emitter:
    """A way to write a student.

    Args:
        target: The plug-in of `reverie.export`.
        runtime: The one that executes the file.
        suffix: Of the file.
        options: Settings of the target.
        most_bits: Of weights, where it would otherwise write what another one writes.
    """

    target: str
    runtime: str
    suffix: str
    options: dict[str, Any] = field(default_factory=dict)
    most_bits: int = 8


@dataclass(frozen=True)
class Row:
    """A file in a runtime.

    Args:
        title: What it is.
        file: Its name.
        kind: "float", "ours" or "theirs"; "other" is timed beside them and compared with nothing.
    """

    title: str
    runtime: str
    file: str
    kind: str


STUDENTS = {
    "W8A8": Student((8, 8, 8)),
    "W4A4": Student((4, 4, 8)),
    "W2A8": Student((2, 8, 8)),
    "W4A4, ends too": Student((4, 4, 4), timed=False),
    "W2A8, ends too": Student((2, 8, 2), timed=False),
}
EMITTERS = {
    "onnx": Emitter("onnx", "onnxruntime", ".onnx"),
    "onnx-int2": Emitter("onnx", "onnxruntime", ".onnx", {"packing": "int2"}, most_bits=2),
    "openvino": Emitter("openvino", "openvino", ".xml"),
    "merged openvino": Emitter("openvino", "openvino", ".xml", {"exact": False}),
}
THEIRS = (
    Row("quantize_static, U8S8 per channel, QDQ", "onnxruntime", "ort-u8s8-qdq.onnx", "theirs"),
    Row("quantize_static, U8S8 per channel, QOperator", "onnxruntime", "ort-u8s8-qoperator.onnx", "theirs"),
    Row("quantize_static, its defaults (S8S8)", "onnxruntime", "ort-defaults.onnx", "other"),
    Row("NNCF, mixed preset", "openvino", "nncf-mixed.xml", "theirs"),
    Row("NNCF, performance preset", "openvino", "nncf-performance.xml", "theirs"),
)


def emitted() -> list[tuple[str, str, str]]:
    """Students, emitters and names of the files that they give."""
    return [
        (student, emitter, f"{student}-{emitter}".replace(", ", "-").replace(" ", "-").lower() + how.suffix)
        for student, what in STUDENTS.items()
        for emitter, how in EMITTERS.items()
        if what.bits[0] <= how.most_bits and (what.timed or how.target == "onnx")
    ]


def rows() -> list[Row]:
    """All that is timed, each runtime's in the order of the table."""
    ours = [
        Row(f"{student}, {emitter}", EMITTERS[emitter].runtime, file, "ours")
        for student, emitter, file in emitted()
        if STUDENTS[student].timed
    ]
    whole = [Row("FP32", runtime, "float.onnx", "float") for runtime in ("onnxruntime", "openvino")]
    return sorted([*whole, *ours, *THEIRS], key=lambda row: row.runtime)


def load(name: str, assets: Path) -> Any:
    """The full-precision network."""
    import torch

    from reverie import models

    if name == "resnet18":
        torch.manual_seed(0)
        return models.load("torchvision:resnet18", pretrained=False)
    if name == "resnet20":
        weights = assets / "nets" / "cifar10" / "resnet20.pth"
        return models.load(f"{assets}/models.py:CifarResNet", weights=weights, input_size=32, classes=10, **FLOWER)
    return models.load({"mobilenet_v2": "package:mobilenet_v2", "lite0": "package:efficientnet_lite0"}[name])


def images_for(network: Any, assets: Path, *, calibration: bool) -> Any:
    """Images to calibrate on, or the ones to compare classes on, in the network's input units."""
    import torch
    from methods import cifar10

    from reverie.images.folder import read_folder

    count = CALIBRATION if calibration else IMAGES
    if network.classes == 10:
        pixels, _ = cifar10(assets, "train10k" if calibration else "test")
        return network.input.normalize(torch.from_numpy(pixels[:count].transpose(0, 3, 1, 2) / np.float32(255)))
    folder = assets / "data" / ("imagenet_sample" if calibration else "nips2017")
    return read_folder(folder, network.input, network.classes, require_labels=False, limit=count).inputs


def recipe_of(student: str) -> Any:
    """The preset `noise`, which learns nothing, at the student's bits."""
    from reverie.recipes import read

    weights, activations, ends = STUDENTS[student].bits
    bits = {"weight_bits": weights, "activation_bits": activations, "end_bits": ends}
    return read("noise", {f"quantization.{key}": value for key, value in bits.items()})


def make(name: str, assets: Path, folder: Path) -> None:
    """All files of a network."""
    from reverie import export, plugins
    from reverie.export._onnx import export_float
    from reverie.export._packed import write_packed
    from reverie.graph.fold import fold_batch_norms
    from reverie.graph.quantized import finish
    from reverie.progress import Silent
    from reverie.recovery.ranges import calibrate_activations, calibrate_weights
    from reverie.stages import as_teacher, student_of

    network = load(name, assets)
    shape, graph = network.input.shape, as_teacher(network).graph
    images = images_for(network, assets, calibration=True)
    export_float(fold_batch_norms(graph), shape, folder / "float.onnx")
    for title in STUDENTS:
        recipe = recipe_of(title)
        reference, student = student_of(graph, recipe.quantization)
        calibrate_activations(reference, student, images, recipe.activations, batch=CALIBRATION, progress=Silent())
        calibrate_weights(student, recipe.weights)
        quantized = finish(student)
        files = {emitter: folder / file for student, emitter, file in emitted() if student == title}
        write_packed(quantized, files["onnx"].with_suffix(".safetensors"))
        for emitter, file in files.items():
            how = EMITTERS[emitter]
            plugins.load(export, how.target)(**how.options)(quantized, shape, file)
    make_theirs(folder, [image[None].numpy() for image in images])
    (folder / "made.json").write_text(json.dumps({"shape": shape}))


def make_theirs(folder: Path, images: list[np.ndarray]) -> None:
    """What the runtimes' own tools make of the full-precision file, of the same images."""
    import nncf
    import openvino
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image}

    prepared = folder / "prepared.onnx"
    quant_pre_process(folder / "float.onnx", prepared)
    best = {"per_channel": True, "activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    settings = {
        "ort-u8s8-qdq.onnx": best | {"quant_format": quantization.QuantFormat.QDQ},
        "ort-u8s8-qoperator.onnx": best | {"quant_format": quantization.QuantFormat.QOperator},
        "ort-defaults.onnx": {},
    }
    for file, chosen in settings.items():
        quantization.quantize_static(prepared, folder / file, Reader(), **chosen)
    whole = openvino.Core().read_model(folder / "float.onnx")
    for preset in (nncf.QuantizationPreset.MIXED, nncf.QuantizationPreset.PERFORMANCE):
        found = nncf.quantize(whole, nncf.Dataset(images), preset=preset, subset_size=len(images))
        openvino.save_model(found, folder / f"nncf-{preset.value}.xml", compress_to_fp16=False)


def is_made(name: str) -> bool:
    """Whether all files of a network are there."""
    wanted = {"made.json", *(row.file for row in rows()), *(file for *_, file in emitted())}
    return all((BUILD / name / file).is_file() for file in wanted)


def measure(folder: Path, *, threads: int, batches: list[int], seconds: float) -> dict[str, Any]:
    """Milliseconds of every row and turn, by batch."""
    shape = json.loads((folder / "made.json").read_text())["shape"]
    found: dict[str, dict[str, list[float]]] = {str(batch): {} for batch in batches}
    for name in sorted({row.runtime for row in rows()}):
        runtime = runtimes.load(name)
        sessions = {row_key(row): runtime.open(folder / row.file, threads=threads) for row in rows() if row.runtime == name}
        for batch in batches:
            found[str(batch)] |= take_turns(sessions, (batch, *shape), seconds)
    return {"threads": threads, "milliseconds": found, "machine": machine(threads)}


def take_turns(sessions: dict[str, runtimes.Session], shape: tuple[int, ...], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a call of each session, turn by turn, for about so many seconds."""
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    order, shuffle = list(sessions), random.Random(0)
    times: dict[str, list[float]] = {key: [] for key in sessions}
    for session in sessions.values():
        session(images)
    began = time.perf_counter()
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.perf_counter() - began > seconds:
            break
        shuffle.shuffle(order)
        for key in order:
            sessions[key](images)
            start = time.perf_counter()
            sessions[key](images)
            times[key].append(1000 * (time.perf_counter() - start))
    return times


def compare(name: str, assets: Path, folder: Path) -> None:
    """What both runtimes and the students say to the same images, file by file; goes on where it was stopped."""
    import torch

    from reverie.errors import ExportError
    from reverie.export._packed import restore
    from reverie.export._verify import measure_parity, predict
    from reverie.graph.integer import as_integers
    from reverie.report.measure import agreement
    from reverie.stages import as_teacher, student_of

    network = load(name, assets)
    graph, images = as_teacher(network).graph, images_for(network, assets, calibration=False)
    kept = folder / "parity.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for title, what in STUDENTS.items():
        left = {emitter: file for student, emitter, file in emitted() if student == title and file not in found}
        if not what.timed or not left:
            continue
        files = {emitter: folder / file for student, emitter, file in emitted() if student == title}
        _, student = student_of(graph, recipe_of(title).quantization)
        quantized = restore(student, files["onnx"].with_suffix(".safetensors"))
        exact = as_integers(quantized)
        with torch.inference_mode():
            ours = torch.cat([exact(part).argmax(1) for part in images.split(25)])
        for emitter in left:
            runtime = runtimes.load(EMITTERS[emitter].runtime)
            parity, failure = None, None
            try:
                parity = measure_parity(quantized, files[emitter], images[:INSPECTED], runtime=runtime, batch=8)
            except ExportError as error:
                failure = str(error).rpartition("/")[2]
            theirs = predict(runtime.open(files[emitter]), images, batch=25).argmax(1)
            found[files[emitter].name] = {
                "title": f"{title}, {emitter}",
                "layers": len(quantized.layers),
                "float_layers": runtime.float_layers(files[emitter], quantized.layers),
                "codes": None if parity is None else parity.max_code_difference,
                "share": None if parity is None else parity.differing_share,
                "failure": failure,
                "agreement": agreement(ours, theirs),
                "images": len(images),
                "classes": len(ours.unique()),
            }
            kept.write_text(json.dumps(found, indent=1))


def call(part: str, name: str, assets: Path) -> None:
    """Runs a part of this script for one network in a process of its own, with its output in a file."""
    log = BUILD / name / f"{part}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {part}, {log.relative_to(ROOT)}", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__)), "--assets", str(assets), "--networks", name, "--part", part]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {part} failed: {log.read_text().strip().splitlines()[-1]} ({log.relative_to(ROOT)})")


def machine(threads: int) -> str:
    """What the times are of."""
    libraries = ("onnxruntime", "openvino", "nncf", "torch")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True)
    told = ", ".join(f"{library} {version(library)}" for library in libraries)
    return f"{threads} threads, {platform.machine()}, {told}, commit {commit.stdout.strip()}"


def row_key(row: Row) -> str:
    """Of its times."""
    return f"{row.runtime}: {row.title}"


def spread(values: list[float], digits: int = 2) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def ratio(times: dict[str, list[float]], first: Row, second: Row) -> str:
    """Of the times of both, turn by turn."""
    return spread([a / b for a, b in zip(times[row_key(first)], times[row_key(second)], strict=True)])


def compared(times: dict[str, list[float]], runtime: str) -> list[list[str]]:
    """The cells of one network, runtime and batch in the table of ratios, a line for each way to write W8A8."""
    there = [row for row in rows() if row.runtime == runtime]
    of = {kind: [row for row in there if row.kind == kind] for kind in ("float", "ours", "theirs")}
    best = min(of["theirs"], key=lambda row: statistics.median(times[row_key(row)]))
    lines = []
    for eight in of["ours"]:
        student, _, emitter = eight.title.partition(", ")
        if student == "W8A8":
            rest = [
                "; ".join(ratio(times, row, eight) for row in of["ours"] if row.title.startswith(f"{bits}, {emitter}"))
                for bits in ("W4A4", "W2A8")
            ]
            lines.append([emitter, f"{ratio(times, eight, best)}, {best.title}", ratio(times, of["float"][0], eight), *rest])
    return lines


def megabytes(folder: Path, file: str) -> float:
    """On disk, of all parts of a file."""
    return sum(part.stat().st_size for part in runtimes.parts(folder / file)) / 1e6


def tables() -> None:
    """Prints what is there."""
    timed = {name: json.loads(file.read_text()) for name in NETWORKS if (file := BUILD / name / "times.json").is_file()}
    ratios = []
    for name, record in timed.items():
        milliseconds = record["milliseconds"]
        lines = []
        for row in rows():
            cells = [row.title, row.runtime, f"{megabytes(BUILD / name, row.file):.2f}"]
            lines.append(cells + [spread(times[row_key(row)]) for times in milliseconds.values()])
        first = {row.runtime: row_key(row) for row in rows()}
        turns = "; ".join(
            f"turns of batch {batch}: {', '.join(f'{len(times[key])} in {runtime}' for runtime, key in first.items())}"
            for batch, times in milliseconds.items()
        )
        heads = [f"batch {batch}, ms" for batch in milliseconds]
        print(f"\n### {NETWORKS[name]}\n\n{record['machine']}; {turns}.\n")
        print(table(["file", "runtime", "MB", *heads], lines))
        for runtime in dict.fromkeys(row.runtime for row in rows()):
            for batch, times in milliseconds.items():
                ratios += [[NETWORKS[name], runtime, batch, *cells] for cells in compared(times, runtime)]
    if ratios:
        head = [
            "network",
            "runtime",
            "batch",
            "ours",
            "W8A8 / fastest of the tool's",
            "FP32 / W8A8",
            "W4A4 / W8A8",
            "W2A8 / W8A8",
        ]
        print("\n### Ratios of times\n\n" + table(head, ratios))
    print_kernels()
    print_sizes()
    print_parity()
    print("\nCommands of the rows:\n")
    for name in timed:
        print(f"- {NETWORKS[name]}: `python benchmarks/runtimes.py --assets ASSETS --networks {name}`")


def print_kernels() -> None:
    """What ONNX Runtime makes of the files at W8A8: where the kernels are the same, so is the time, but for chance."""
    files = {"Reverie": "w8a8-onnx.onnx", "QDQ": "ort-u8s8-qdq.onnx", "QOperator": "ort-u8s8-qoperator.onnx"}
    lines = [
        [NETWORKS[name], title, ", ".join(f"{count} {kind}" for kind, count in kernels(BUILD / name / file).most_common())]
        for name in NETWORKS
        if is_made(name)
        for title, file in files.items()
    ]
    if lines:
        print("\n### Kernels in ONNX Runtime, W8A8\n\n" + table(["network", "file", "kernels"], lines))


def kernels(file: Path) -> Counter[str]:
    """The nodes of the graph that ONNX Runtime executes, by kind."""
    import onnx
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    # It warns that the optimized graph is for this machine alone.
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        settings.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        optimized = onnx.load(settings.optimized_model_filepath)
    return Counter(node.op_type for node in optimized.graph.node)


def print_sizes() -> None:
    """On disk, and beside W8A8 by the same emitter."""
    names = [name for name in NETWORKS if is_made(name)]
    lines = []
    for student, emitter, file in emitted():
        eight = next(other for title, how, other in emitted() if title == "W8A8" and how == "onnx")
        cells = []
        for name in names:
            size = megabytes(BUILD / name, file)
            cells.append(f"{size:.2f} ({size / megabytes(BUILD / name, eight):.3f})")
        lines.append([f"{student}, {emitter}", *cells])
    whole = ["FP32, onnx", *(f"{megabytes(BUILD / name, 'float.onnx'):.2f}" for name in names)]
    if names:
        print(
            "\n### MB on disk (times the ONNX file of W8A8)\n\n"
            + table(["", *(NETWORKS[name] for name in names)], [whole, *lines])
        )


def print_parity() -> None:
    """What `--parity` found."""
    lines = [
        [
            NETWORKS[name],
            row["title"],
            f"{row['layers'] - len(row['float_layers'])} of {row['layers']}",
            "not seen: " + row["failure"] if row["codes"] is None else str(row["codes"]),
            "" if row["share"] is None else f"{100 * row['share']:.4f} %",
            f"{100 * row['agreement']:.1f} % of {row['images']:,} ({row['classes']} classes)",
        ]
        for name in NETWORKS
        if (file := BUILD / name / "parity.json").is_file()
        for row in json.loads(file.read_text()).values()
    ]
    if lines:
        head = ["network", "file", "integer layers", "largest difference, codes", f"codes that differ, {INSPECTED} images"]
        print("\n### Parity with the student\n\n" + table([*head, "same class"], lines))


def main() -> None:
    """Makes and times what is asked for, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=10, help="of taking turns, for each network, runtime and batch")
    parser.add_argument("--again", action="store_true", help="time what has been timed")
    parser.add_argument("--parity", action="store_true", help="compare with the students, and time nothing")
    parser.add_argument("--table", action="store_true", help="make nothing")
    parser.add_argument("--part", choices=["make", "compare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        parts = {"make": make, "compare": compare}
        for name in options.networks:
            parts[options.part](name, options.assets, BUILD / name)
        return
    for name in [] if options.table else options.networks:
        if not is_made(name):
            call("make", name, options.assets)
        if options.parity:
            call("compare", name, options.assets)
    for name in [] if options.table or options.parity else options.networks:
        file = BUILD / name / "times.json"
        if options.again or not file.is_file():
            print(f"{name}: time", file=sys.stderr, flush=True)
            found = measure(BUILD / name, threads=options.threads, batches=options.batches, seconds=options.seconds)
            file.write_text(json.dumps(found))
    tables()


if __name__ == "__main__":
    main()
