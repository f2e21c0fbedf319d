"""The tables of docs/benchmarks.md: methods against each other on one network, several seeds each.

    python benchmarks/methods.py --assets ../shared/assets                                 all rows of ResNet-20, then the tables
    python benchmarks/methods.py --assets ../shared/assets --rows fdda-4 --seeds 0 1       some of them
    python benchmarks/methods.py --assets ../shared/assets --table                         the tables of what is there
    python benchmarks/methods.py --assets ../shared/assets --tuning --rows gdfq-3 --seeds 0 --more "--set synthesis.steps=800"
    python benchmarks/methods.py --assets ../shared/assets --rows mobilenet_v2-gdfq mobilenet_v2-clusterq mobilenet_v2-fdda --more "--device cuda"

Each row is a `reverie quantize` command that anyone can run, printed below the tables; each of its seeds is a run
directory below build/methods, so an interrupted benchmark goes on where it stopped, and two may share the work. Accuracy
is that of the last state on all 10,000 CIFAR-10 test images (1,000 photographs of nips2017 for ImageNet networks), never the
best of several, and nothing was tuned on them: `--tuning` judges on other images, in directories of their own. They are 2,000 training
images, turned, scaled and shifted so far that the network gets 91 % of them right, and photographs of things that it does not know, shrunk
to 32 px. Few-shot images are drawn from the training images of `--assets` by the run's seed. Exported means: executed by ONNX Runtime.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "methods"
RESNET20 = (
    "{assets}/models.py:CifarResNet --weights {assets}/nets/cifar10/resnet20.pth --input-size 32 --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225 --classes 10 --evaluate {build}/cifar10_test.npz"
)
MOBILENET = "package:mobilenet_v2 --evaluate {assets}/data/nips2017"
LITERATURE = "--placement literature"
ONE, TEN, MANY, MORE = (
    f"--calibration {{build}}/cifar10_train_{kind}_{{seed}}.npz" for kind in ("1_a_class", "10_a_class", "256", "1024")
)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        table: Which table it stands in.
        method, data: What the first columns say.
        command: What follows `reverie quantize`; {assets}, {build} and {seed} are filled in.
    """

    table: str
    method: str
    data: str
    command: str


def bits(number: int) -> str:
    """The flags for weights and activations of `number` bits."""
    return f"--weight-bits {number} --activation-bits {number}"


# Calibration alone: nearest rounding, weights from minimum to maximum, ranges by moving average, as the papers have it.
CALIBRATED = (
    f"{RESNET20} {LITERATURE} {bits(4)} --set activations.method=ema --set weights.method=minmax "
    "--set rounding.method=nearest --set quantization.bias_correction=false"
)
# Rounded to nearest, as in the papers.
NEAREST = "--set rounding.method=nearest"
TUNED = f"{RESNET20} {LITERATURE} {NEAREST}"
# The papers' way to feed the student: absolute statistics, no refinement, a generator that goes on training with it.
FRESH = (
    f"{TUNED} --set synthesis.relative=false --set synthesis.statistics_weight=1 --set synthesis.refine_steps=0 "
    "--set distillation.synthetic=fresh --set images=256 --set distillation.steps=300 --set activations.percentile=99.99 "
    "--set quantization.batch_norm_adaptation=false"
)
# Made when what only sums read, and what the stem writes, had four bits like the rest.
SUMS = "--set quantization.sum_bits=4 --set quantization.stem_bits=4"
FOUR, THREE, INTEGER = (
    "W4A4, all layers, literature",
    "W3A3, all layers, literature",
    "W4A4, sums too, 8-bit ends, integer, exported",
)
FRESH_FOUR, FRESH_THREE = f"{FOUR}, fresh images", f"{THREE}, fresh images"
ROWS = {
    "real-calibration": Row(
        "W4A4, calibration only, literature",
        "calibration",
        "256 real images",
        f"{CALIBRATED} --recipe zeroq --set images=0 --set held_out=0 {MANY}",
    ),
    "zeroq-calibration": Row(
        "W4A4, calibration only, literature",
        "zeroq, per sample as published",
        "none",
        f"{CALIBRATED} --recipe zeroq --images 64 --set synthesis.level=sample --set synthesis.class_weight=0 --set synthesis.batch=64 "
        "--set synthesis.start=white --set synthesis.swing=false",
    ),
    "dsg-calibration": Row(
        "W4A4, calibration only, literature", "dsg", "none", f"{CALIBRATED} --recipe dsg --images 64 --set synthesis.batch=64"
    ),
    "adaround-real": Row(
        INTEGER, "AdaRound", "256 real images", f"{RESNET20} {SUMS} --recipe dsg_adaround --images 0 --set held_out=0 {MANY}"
    ),
    "adaround-dsg": Row(INTEGER, "dsg + AdaRound", "none", f"{RESNET20} {SUMS} --recipe dsg_adaround"),
    "clusterq-integer": Row(INTEGER, "clusterq", "none", f"{RESNET20} {SUMS} --recipe clusterq"),
    "fdda-integer": Row(INTEGER, "fdda", "1 image a class", f"{RESNET20} {SUMS} --recipe fdda {ONE}"),
}
for table, number in ((FOUR, 4), (THREE, 3)):
    ROWS |= {
        f"gdfq-{number}": Row(table, "gdfq", "none", f"{TUNED} {bits(number)} --recipe gdfq"),
        f"clusterq-{number}": Row(table, "clusterq", "none", f"{TUNED} {bits(number)} --recipe clusterq"),
        f"fdda-{number}": Row(table, "fdda", "1 image a class", f"{TUNED} {bits(number)} --recipe fdda {ONE}"),
        f"fdda-10-{number}": Row(table, "fdda", "10 images a class", f"{TUNED} {bits(number)} --recipe fdda {TEN}"),
    }
for table, number in ((FRESH_FOUR, 4), (FRESH_THREE, 3)):
    ROWS |= {
        f"gdfq-fresh-{number}": Row(table, "gdfq", "none", f"{FRESH} {bits(number)} --recipe gdfq"),
        f"clusterq-fresh-{number}": Row(table, "clusterq", "none", f"{FRESH} {bits(number)} --recipe clusterq"),
        f"fdda-fresh-{number}": Row(
            table, "fdda", "1 image a class", f"{FRESH} {bits(number)} --recipe fdda --set real_share=0.5 {ONE}"
        ),
    }
# What `best` chooses, without data and with 1,024 real images.
for weights, activations in ((4, 4), (3, 3), (2, 4), (2, 2)):
    chosen = f"{RESNET20} --recipe best --weight-bits {weights} --activation-bits {activations}"
    table = f"W{weights}A{activations}, sums in 8, 8-bit ends, integer, exported"
    ROWS |= {
        f"best-{weights}{activations}": Row(table, "best", "none", chosen),
        f"best-{weights}{activations}-sums": Row(
            table,
            f"best, sums in {activations} too",
            "none",
            f"{chosen} --set quantization.sum_bits={activations} --set quantization.stem_bits={activations}",
        ),
        f"best-real-{weights}{activations}": Row(table, "best", "1,024 real images", f"{chosen} {MORE}"),
    }
ROWS |= {
    "best-literature": Row(FOUR, "best", "none", f"{RESNET20} {LITERATURE} {bits(4)} --recipe best"),
    "best-48": Row("W4A8, 8-bit ends, integer, exported", "best (gptq)", "none", f"{RESNET20} --recipe best --weight-bits 4"),
}
# Each term by itself, at W3A3: what the others would do without it.
ABLATIONS = {
    "gdfq-real-3": ("gdfq with fdda's real images", "1 image a class", f"--recipe gdfq --set real_share=0.35 {ONE}"),
    "fdda-unreal-3": ("fdda, no real images for the student", "1 image a class", f"--recipe fdda --set real_share=0.001 {ONE}"),
    "fdda-aimless-3": (
        "fdda without centres",
        "1 image a class",
        f"--recipe fdda --set synthesis.centred_weight=0 --set synthesis.distorted_weight=0 {ONE}",
    ),
    "clusterq-aimless-3": ("clusterq without centroids", "none", "--recipe clusterq --set synthesis.cluster_weight=0"),
    "gdfq-unrefined-3": ("gdfq, images not refined", "none", "--recipe gdfq --set synthesis.refine_steps=0"),
    "gdfq-unadapted-3": (
        "gdfq, batch norms not adapted",
        "none",
        "--recipe gdfq --set quantization.batch_norm_adaptation=false",
    ),
}
ROWS |= {
    name: Row(f"{THREE}: ablations", method, data, f"{TUNED} {bits(3)} {more}")
    for name, (method, data, more) in ABLATIONS.items()
}
ROWS |= {
    "mobilenet_v2-gdfq": Row(
        f"MobileNetV2, {FOUR}", "gdfq", "none", f"{MOBILENET} {LITERATURE} {NEAREST} {bits(4)} --recipe gdfq"
    ),
    "mobilenet_v2-clusterq": Row(
        f"MobileNetV2, {FOUR}", "clusterq", "none", f"{MOBILENET} {LITERATURE} {NEAREST} {bits(4)} --recipe clusterq"
    ),
    "mobilenet_v2-fdda": Row(
        f"MobileNetV2, {FOUR}",
        "fdda",
        "1 image a class",
        f"{MOBILENET} {LITERATURE} {NEAREST} {bits(4)} --recipe fdda --calibration {{assets}}/data/imagenet_sample",
    ),
}
# 1,000 real images, one of each class.
SAMPLE = "--images 0 --set held_out=0 --calibration {assets}/data/imagenet_sample"
for network, title, named in (
    ("mobilenet_v2", "MobileNetV2", MOBILENET),
    ("lite0", "EfficientNet-Lite0", "package:efficientnet_lite0 --evaluate {assets}/data/nips2017"),
):
    for activations in (8, 4):
        sums = "" if activations == 8 else "sums in 8, "
        table = f"{title}, W4A{activations}, {sums}8-bit ends, integer, exported"
        chosen = f"{named} --recipe best --weight-bits 4 --activation-bits {activations}"
        ROWS |= {
            f"{network}-best-4{activations}": Row(table, "best", "none", chosen),
            f"{network}-best-real-4{activations}": Row(table, "best", "1,000 real images", f"{chosen} {SAMPLE}"),
            f"{network}-best-mixed-4{activations}": Row(
                table,
                "best, weights of 4 bits on average",
                "none",
                f"{named} --recipe best --effective-bits 4 --activation-bits {activations}",
            ),
        }
    # The last table and command of the loop: W4A4.
    ROWS[f"{network}-best-apart-44"] = Row(
        table, "best", "1,000 real images beside", f"{chosen} --calibration {{assets}}/data/imagenet_sample"
    )
    ROWS[f"{network}-best-means-44"] = Row(
        f"{title}, W4A4 on average, integer, exported",
        "best, weights and activations of 4 bits on average",
        "none",
        f"{named} --recipe best --effective-bits 4 --effective-activation-bits 4",
    )
SLOW = [name for name in ROWS if name.startswith(("mobilenet_v2", "lite0"))]


def cifar10(assets: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) and labels of "test" or "train10k"."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    mosaic = np.asarray(Image.open(assets / f"data/cifar10/{name}.webp").convert("RGB"))
    images = mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    return images, np.load(assets / f"data/cifar10/{name}_labels.npy")


def save(file: Path, **arrays: np.ndarray) -> None:
    """An array file, whole or not there: two benchmarks may start at the same time."""
    aside = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(aside, **arrays)
    aside.replace(file)


def prepare(assets: Path, seeds: list[int]) -> None:
    """CIFAR-10's test images, and few-shot sets of training images for each seed, as array files."""
    BUILD.mkdir(parents=True, exist_ok=True)
    if not (BUILD / "cifar10_test.npz").is_file():
        images, labels = cifar10(assets, "test")
        save(BUILD / "cifar10_test.npz", images=images, labels=labels)
    images, labels = cifar10(assets, "train10k")
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(labels))
        sets = {"256": order[:256], "1024": order[:1024]}
        for number in (1, 10):
            sets[f"{number}_a_class"] = np.concatenate([order[labels[order] == label][:number] for label in range(10)])
        for name, chosen in sets.items():
            file = BUILD / f"cifar10_train_{name}_{seed}.npz"
            if not file.is_file():
                save(file, images=images[chosen], labels=labels[chosen])


def prepare_tuning(assets: Path) -> None:
    """Images to tune on: training images that are no longer as the network knows them by heart, and photographs."""
    import torch
    from PIL import Image
    from torch.nn import functional

    images, labels = cifar10(assets, "train10k")
    pixels = torch.from_numpy(images[:2000].copy()).permute(0, 3, 1, 2).float()
    random = torch.Generator().manual_seed(0)
    angle, scale, right, down = (
        most * (2 * torch.rand(2000, generator=random) - 1) for most in (math.radians(15), 0.15, 0.08, 0.08)
    )
    scale = 1 + scale
    rows = [(angle.cos() * scale, -angle.sin() * scale, right), (angle.sin() * scale, angle.cos() * scale, down)]
    maps = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = functional.affine_grid(maps, list(pixels.shape), align_corners=False)
    warped = functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False).round().clamp(0, 255)
    save(BUILD / "cifar10_tuning.npz", images=warped.permute(0, 2, 3, 1).byte().numpy(), labels=labels[:2000])
    photographs = []
    for file in sorted((assets / "data/imagenet_sample").rglob("*.*")):
        if file.suffix.lower() in (".jpg", ".jpeg", ".png"):
            photograph = Image.open(file).convert("RGB")
            side = min(photograph.size)
            left, top = ((length - side) // 2 for length in photograph.size)
            square = photograph.crop((left, top, left + side, top + side))
            photographs.append(np.asarray(square.resize((32, 32), Image.Resampling.BOX)))
    save(BUILD / "imagenet_32.npz", images=np.stack(photographs))


def output(name: str, seed: int, tuning: str) -> Path:
    """The run directory of a row and seed; `tuning` tells apart what is tried."""
    return BUILD / (
        f"{name}-{seed}" if not tuning else f"tuning/{name}-{seed}-{hashlib.sha256(tuning.encode()).hexdigest()[:8]}"
    )


def measure(name: str, assets: Path, seed: int, more: str, tuning: bool) -> Path:
    """Makes the run, or finds it complete: its directory."""
    command = ROWS[name].command.format(assets=assets, build=BUILD, seed=seed).split() + more.split()
    if tuning:
        command[command.index("--evaluate") + 1] = str(BUILD / "cifar10_tuning.npz")
        command += ["--unlabelled", str(BUILD / "imagenet_32.npz")]
    folder = output(name, seed, f"{ROWS[name].command} {more}" if tuning else "")
    began = time.perf_counter()
    call = [sys.executable, "-m", "reverie", "quantize", *command, "--seed", str(seed), "--output", str(folder)]
    done = subprocess.run([*call, "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        # Progress comes before the error, as JSON lines.
        raise SystemExit(f"{name} seed {seed}: {done.stderr.splitlines()[-1]}")
    print(f"{name} seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return folder


def tuned(folder: Path) -> str:
    """What a run says of the images to tune on."""
    metrics = json.loads((folder / "metrics.json").read_text())
    far = (metrics["divergence"][kind]["quantized"] for kind in ("evaluation", "unlabelled"))
    top1 = " -> ".join(f"{100 * metrics[kind]['top1']:.2f}" for kind in ("full_precision", "quantized"))
    return f"turned training images {top1}, KL {' and on photographs '.join(f'{value:.3f}' for value in far)}"


def found(name: str) -> list[dict]:
    """The metrics of all seeds that are complete."""
    runs = sorted(BUILD.glob(f"{name}-[0-9]*"))
    complete = [run for run in runs if json.loads((run / "run.json").read_text())["complete"]]
    return [json.loads((run / "metrics.json").read_text()) for run in complete]


def points(values: list[float]) -> str:
    """Mean and sample standard deviation, in points."""
    middle = f"{100 * statistics.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ± {100 * statistics.stdev(values):.2f}"


HEADER = "| method | data | full precision | fake-quantized | drop | exported | minutes | GiB | seeds |\n|---|---|---|---|---|---|---|---|---|"


def line(row: Row, runs: list[dict]) -> str:
    """The Markdown row of one setting."""
    exported = [run["exported"]["top1"] for run in runs]
    cells = [
        row.method,
        row.data,
        points([runs[0]["full_precision"]["top1"]]),
        points([run["quantized"]["top1"] for run in runs]),
        points([run["full_precision"]["top1"] - run["quantized"]["top1"] for run in runs]),
        "not exported" if exported[0] is None else points(exported),
        f"{statistics.mean(sum(run['seconds'].values()) for run in runs) / 60:.1f}",
        f"{max(run['peak_memory_bytes'] for run in runs) / 2**30:.1f}",
        f"{len(runs)}",
    ]
    return "| " + " | ".join(cells) + " |"


def tables(assets: Path) -> None:
    """Prints what is complete."""
    for table in dict.fromkeys(row.table for row in ROWS.values()):
        lines = [line(row, runs) for name, row in ROWS.items() if row.table == table and (runs := found(name))]
        if lines:
            print("\n".join([f"\n### {table}\n\n{HEADER}", *lines]))
    print()
    for name, row in ROWS.items():
        command = row.command.format(assets="ASSETS", build=BUILD.relative_to(ROOT), seed="SEED")
        print(f"- `{name}`: `reverie quantize {command} --seed SEED`")


def main() -> None:
    """Makes the runs asked for, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=[name for name in ROWS if name not in SLOW])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--more", default="", help="flags for every run, such as '--budget 10' or '--device cuda'")
    parser.add_argument(
        "--tuning", action="store_true", help="judge on the images to tune on (ResNet-20 only), and make no table"
    )
    parser.add_argument("--table", action="store_true", help="make no runs")
    options = parser.parse_args()
    if options.tuning and any(name in SLOW for name in options.rows):
        parser.error(f"--tuning must be with rows of ResNet-20, got {', '.join(name for name in options.rows if name in SLOW)}")
    if not options.table:
        prepare(options.assets, options.seeds)
        if options.tuning:
            prepare_tuning(options.assets)
        for seed in options.seeds:
            for name in options.rows:
                folder = measure(name, options.assets, seed, options.more, options.tuning)
                if options.tuning:
                    print(f"{name} seed {seed} {options.more}: {tuned(folder)}", flush=True)
    if not options.tuning:
        tables(options.assets)


if __name__ == "__main__":
    main()
