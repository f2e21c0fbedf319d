"""Reverie beside Sony's Model Compression Toolkit (MCT) and Qualcomm's AIMET: same network, same images to judge on, same tensors on grids.

    python benchmarks/rivals.py --assets ../shared/assets                            the rows of ResNet-20, then the table
    python benchmarks/rivals.py --assets ../shared/assets --rows resnet20-44-aimet   one of them (and what it needs)
    python benchmarks/rivals.py --assets ../shared/assets --rows resnet20-44-reverie --again
    python benchmarks/rivals.py --assets ../shared/assets --table                    the table of what is there

MCT and AIMET get environments of their own below build/rivals/environments (two gigabytes each where torch is a CPU build), made at
first use from `rivals/mct.txt` and `rivals/aimet.txt`; Reverie runs in the one that runs this script. Each row and seed is a
folder below build/rivals, so that an interrupted benchmark goes on where it stopped; a tool that fails leaves its error in the table.

Accuracy is judged on all 10,000 CIFAR-10 test images, or on the 1,000 photographs of nips2017: that of Reverie in ONNX Runtime, that
of the others in their own simulation. Minutes are those of making images and quantizing, without starting Python and judging;
Reverie's include exporting and verifying the file. Memory is the largest resident set of all processes of a row, judging included.
AIMET has no images of its own: it gets those of Reverie's run with the same bits and seed; their minutes are counted, not the memory
of that run.
"""

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "rivals"
BUILD = ROOT / "build" / "rivals"
RESNET20 = (
    "{assets}/models.py:CifarResNet --weights {assets}/nets/cifar10/resnet20.pth --input-size 32 --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225 --classes 10 --evaluate {build}/cifar10_test.npz"
)
MOBILENET = "package:mobilenet_v2 --evaluate {assets}/data/nips2017"
TITLES = {"resnet20": "ResNet-20, CIFAR-10", "mobilenet_v2": "MobileNetV2, nips2017"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        network: "resnet20" or "mobilenet_v2".
        bits: Of weights and of activations; the ends and what only sums read have eight.
        tool: Which tool.
        title: What the table says.
        flags: What the tool's script or `reverie quantize` gets besides.
        synthesis: What MCT's data generation gets besides.
    """

    network: str
    bits: tuple[int, int]
    tool: str
    title: str
    flags: str = ""
    synthesis: str = ""

    @property
    def common(self) -> list[str]:
        """Flags that all scripts share."""
        weights, activations = self.bits
        return ["--network", self.network, "--weight-bits", str(weights), "--activation-bits", str(activations)]


ROWS = {
    f"resnet20-{weights}{activations}-{name}": Row("resnet20", (weights, activations), tool, title, flags)
    for weights, activations in ((4, 8), (4, 4))
    for name, tool, title, flags in (
        ("reverie", "reverie", "Reverie, best", "--recipe best"),
        ("mct", "mct", "MCT, data generation + PTQ", ""),
        ("mct-gptq", "mct", "MCT, data generation + gradient-based PTQ", "--epochs 50"),
        ("aimet", "aimet", "AIMET, AdaRound on Reverie's images", "--iterations 2000"),
    )
}
# The others put the stream of the network on four bits, and its branches, which only sums read, on eight; here both have four.
ROWS["resnet20-44-reverie-sums"] = Row(
    "resnet20",
    (4, 4),
    "reverie",
    "Reverie, best, sums in 4",
    "--recipe best --set quantization.sum_bits=4 --set quantization.stem_bits=4",
)
# Data generation at 224 px as in MCT's tutorial takes hours on a CPU: as many pixels as Reverie's `best`, whose 256 images have half the side.
SHORT = "--count 64 --iterations 50"
ROWS |= {
    f"mobilenet_v2-48-{name}": Row("mobilenet_v2", (4, 8), tool, title, flags, SHORT)
    for name, tool, title, flags in (
        ("reverie", "reverie", "Reverie, best", "--recipe best"),
        ("mct", "mct", "MCT, data generation + PTQ", ""),
        ("mct-gptq", "mct", "MCT, data generation + gradient-based PTQ", "--epochs 5"),
        ("aimet", "aimet", "AIMET, AdaRound on Reverie's images", "--iterations 100"),
    )
}
# AIMET's own number of iterations: half an hour on one core.
ROWS["resnet20-44-aimet-default"] = Row(
    "resnet20", (4, 4), "aimet", "AIMET, AdaRound on Reverie's images, its default iterations", "--iterations 15000"
)
LONG = [name for name, row in ROWS.items() if row.network == "mobilenet_v2" or name.endswith("-default")]


class ToolError(Exception):
    """A tool's process failed; the message is its last line."""


def environment(tool: str) -> Path:
    """The Python of a tool's environment, made if there is none for these requirements."""
    folder, requirements = BUILD / "environments" / tool, SCRIPTS / f"{tool}.txt"
    mark, wanted = folder / "made.txt", hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not mark.is_file() or mark.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{tool}: making {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "--requirement", str(requirements)], check=True)
        mark.write_text(wanted)
    return folder / "bin" / "python"


def call(command: list[str], log: Path) -> float:
    """Runs a command with its output in `log`; seconds.

    Raises:
        ToolError: It failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ToolError(f"{lines[-1] if lines else f'exit status {done.returncode}'} ({log.relative_to(ROOT)})")
    return time.perf_counter() - began


def script(tool: str, row: Row, assets: Path, seed: int, folder: Path, more: list[str]) -> dict:
    """Runs a tool's script in its environment: its record, with the command."""
    command = [str(environment(tool)), str(SCRIPTS / f"{tool}.py"), *more, "--assets", str(assets), *row.common]
    command += ["--seed", str(seed), "--output", str(folder)]
    wall = call(command, folder / "log.txt")
    return json.loads((folder / "result.json").read_text()) | {"commands": [told(command, assets)], "wall_seconds": wall}


def mct(name: str, assets: Path, seed: int) -> dict:
    """Images, shared by all rows with the same ones, then quantization."""
    row = ROWS[name]
    folder = BUILD / f"{row.network}-mct-images-{seed}"
    kept = folder / "row.json"
    if not kept.is_file():
        made = script("mct", row, assets, seed, folder, ["synthesize", *row.synthesis.split()])
        kept.write_text(json.dumps(made))
    images = json.loads(kept.read_text())
    more = ["quantize", *row.flags.split(), "--images", str(folder / "images.npy")]
    result = script("mct", row, assets, seed, BUILD / f"{name}-{seed}", more)
    return result | {
        "seconds": images["seconds"] | result["seconds"],
        "wall_seconds": images["wall_seconds"] + result["wall_seconds"],
        "peak_memory_bytes": max(images["peak_memory_bytes"], result["peak_memory_bytes"]),
        "settings": f"{images['settings']}; {result['settings']}",
        "commands": images["commands"] + result["commands"],
    }


def aimet(name: str, assets: Path, seed: int) -> dict:
    """AdaRound on the images of Reverie's row, which is made if it is not there."""
    row = ROWS[name]
    theirs = f"{name.partition('-aimet')[0]}-reverie"
    reverie_row = measured(theirs, assets, seed)
    if "error" in reverie_row:
        raise ToolError(f"no images: {theirs}: {reverie_row['error']}")
    images = BUILD / f"{theirs}-{seed}" / "run" / "images.safetensors"
    result = script("aimet", row, assets, seed, BUILD / f"{name}-{seed}", [*row.flags.split(), "--images", str(images)])
    return result | {
        "seconds": {"images": reverie_row["seconds"]["images"]} | result["seconds"],
        # Images are made by a process that does more.
        "wall_seconds": reverie_row["seconds"]["images"] + result["wall_seconds"],
    }


def reverie(name: str, assets: Path, seed: int) -> dict:
    """`reverie quantize` in the environment that runs this script."""
    row, folder = ROWS[name], BUILD / f"{name}-{seed}"
    what = {"resnet20": RESNET20, "mobilenet_v2": MOBILENET}[row.network].format(assets=assets, build=BUILD)
    weights, activations = row.bits
    bits = ["--weight-bits", str(weights), "--activation-bits", str(activations)]
    command = ["reverie", "quantize", *what.split(), *bits, *row.flags.split(), "--seed", str(seed)]
    command += ["--output", str(folder / "run")]
    wall = call([sys.executable, "-m", *command], folder / "log.txt")
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    seconds = metrics["seconds"]
    return {
        "seconds": {
            "images": seconds["synthesize"],
            "quantize": seconds["capture"] + seconds["quantize"],
            "export": seconds["export"],
        },
        "wall_seconds": wall,
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "full_precision": metrics["full_precision"]["top1"],
        "quantized": metrics["exported"]["top1"],
        "settings": "; ".join(metrics["choice"]),
        "placement": packed_placement(folder / "run" / "network.safetensors"),
        "versions": {"reverie": commit(), "python": platform.python_version()}
        | {package: version(package) for package in ("torch", "onnxruntime")},
        "commands": [told(command, assets)],
    }


def packed_placement(file: Path) -> dict[str, dict[str, int]]:
    """Bits of every weight and tensor of a packed checkpoint, without importing torch into this process."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        packed = json.loads(json.loads(opened.read(length))["__metadata__"]["reverie"])
    return {"weights": {name: layer["bits"] for name, layer in packed["layers"].items()}, "activations": packed["tensors"]}


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


TOOLS: dict[str, Callable[[str, Path, int], dict]] = {"reverie": reverie, "mct": mct, "aimet": aimet}


def measured(name: str, assets: Path, seed: int, *, again: bool = False) -> dict:
    """The record of a row and seed: kept, or made now. A failed row is tried anew."""
    folder = BUILD / f"{name}-{seed}"
    kept = folder / "row.json"
    if kept.is_file() and not again:
        record = json.loads(kept.read_text())
        if "error" not in record:
            return record
    # Half a run would be timed by half.
    shutil.rmtree(folder, ignore_errors=True)
    try:
        record = TOOLS[ROWS[name].tool](name, assets, seed)
    except ToolError as error:
        record = {"error": str(error)}
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(record, indent=1))
    outcome = record["error"] if "error" in record else f"{100 * record['quantized']:.2f}"
    print(f"{name} seed {seed}: {outcome}", file=sys.stderr, flush=True)
    return record


def told(command: list[str], assets: Path) -> str:
    """The command for anybody's machine."""
    return " ".join(command).replace(str(assets), "ASSETS").replace(f"{ROOT}/", "")


def prepare(assets: Path) -> None:
    """CIFAR-10's test images as the array file that `reverie quantize --evaluate` reads."""
    file = BUILD / "cifar10_test.npz"
    BUILD.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from methods import cifar10, save

        images, labels = cifar10(assets, "test")
        save(file, images=images, labels=labels)


HEADER = (
    "| tool | full precision | quantized | drop | minutes | of these images | GiB | seeds |\n|---|---|---|---|---|---|---|---|"
)


def points(values: list[float]) -> str:
    """Mean and sample standard deviation, in points."""
    middle = f"{100 * statistics.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ± {100 * statistics.stdev(values):.2f}"


def line(row: Row, records: list[dict]) -> str:
    """The Markdown row of one tool."""
    good = [record for record in records if "error" not in record]
    if not good:
        return f"| {row.title} | | failed: {records[0]['error']} | | | | | 0 |"

    def minutes(*kinds: str) -> str:
        each = [sum(value for kind, value in record["seconds"].items() if not kinds or kind in kinds) for record in good]
        return f"{statistics.mean(each) / 60:.1f}"

    cells = [
        row.title,
        points([good[0]["full_precision"]]),
        points([record["quantized"] for record in good]),
        points([record["full_precision"] - record["quantized"] for record in good]),
        minutes(),
        minutes("images"),
        f"{max(record['peak_memory_bytes'] for record in good) / 2**30:.2f}",
        str(len(good)) if len(good) == len(records) else f"{len(good)}; {len(records) - len(good)} failed",
    ]
    return "| " + " | ".join(cells) + " |"


def found(name: str) -> list[dict]:
    """The records of all seeds that are there."""
    return [json.loads(file.read_text()) for file in sorted(BUILD.glob(f"{name}-[0-9]*/row.json"))]


def grids(placement: dict[str, dict[str, int]]) -> str:
    """How many weights and tensors have how many bits."""

    def counts(kind: str) -> str:
        widths = Counter(placement[kind].values())
        return f"{widths.total()} {kind} ({', '.join(f'{count} of {bits} bits' for bits, count in sorted(widths.items()))})"

    return f"{counts('weights')}, {counts('activations')}"


def table() -> None:
    """Prints what is there: a table for each network and bits, then settings, versions and commands."""
    there = {name: records for name in ROWS if (records := found(name))}
    for network, bits in dict.fromkeys((ROWS[name].network, ROWS[name].bits) for name in there):
        chosen = [name for name in there if (ROWS[name].network, ROWS[name].bits) == (network, bits)]
        print(f"\n### {TITLES[network]}, W{bits[0]}A{bits[1]}\n\n{HEADER}")
        print("\n".join(line(ROWS[name], there[name]) for name in chosen))
    print()
    for name, records in there.items():
        record = next((record for record in records if "error" not in record), None)
        if record is not None:
            told_versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
            print(f"- `{name}`: {record['settings']}. {grids(record['placement'])}. {told_versions}.")
            print("".join(f"  - `{command}`\n" for command in record["commands"]), end="")


def main() -> None:
    """Makes the rows asked for, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=[name for name in ROWS if name not in LONG])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--again", action="store_true", help="make rows that are there anew")
    parser.add_argument("--table", action="store_true", help="make no rows")
    options = parser.parse_args()
    if not options.table:
        assets = options.assets.resolve()
        prepare(assets)
        for seed in options.seeds:
            for name in options.rows:
                measured(name, assets, seed, again=options.again)
    table()


if __name__ == "__main__":
    main()
