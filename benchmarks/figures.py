"""The figures of the README: runs `reverie quantize` on real networks, several seeds each, and prints a table.

    python benchmarks/figures.py --assets ../shared/assets                         all rows
    python benchmarks/figures.py --assets ../shared/assets --rows resnet20-w4a8    one row

Each row is a command that anyone can run; it is printed below the table. `--assets` is a folder with the networks and
labelled images that the rows name. Accuracy is that of the last state, never the best; full precision is that of the same
checkpoint on the same images; the interval is the 95 % interval of the paired difference of the exported file, first seed.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "figures"
CIFAR = "--input-size 32 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --classes 10"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        title: Network and data.
        setting: Bits and method, as the table says it.
        command: What follows `reverie quantize`; {assets} and {build} are filled in.
    """

    title: str
    setting: str
    command: str


RESNET20 = f"{{assets}}/models.py:CifarResNet --weights {{assets}}/nets/cifar10/resnet20.pth {CIFAR}"
CIFAR_TEST = "--evaluate {build}/cifar10_test.npz"
NIPS = "--evaluate {assets}/data/nips2017"

ROWS = {
    "embedded-w8a8": Row("embedded:digits, 599 held-out digits", "W8A8, nearest", "embedded:digits --evaluate held-out"),
    "embedded-w4a8": Row(
        "embedded:digits, 599 held-out digits", "W4A8, AdaRound", "embedded:digits --weight-bits 4 --evaluate held-out"
    ),
    "resnet20-w8a8": Row("ResNet-20, CIFAR-10 test (10,000)", "W8A8, nearest", f"{RESNET20} {CIFAR_TEST}"),
    "resnet20-w4a8": Row("ResNet-20, CIFAR-10 test (10,000)", "W4A8, AdaRound", f"{RESNET20} --weight-bits 4 {CIFAR_TEST}"),
    "resnet20-noise-w4a8": Row(
        "ResNet-20, CIFAR-10 test (10,000)",
        "W4A8, noise images, nearest",
        f"{RESNET20} --recipe noise --weight-bits 4 {CIFAR_TEST}",
    ),
    "mobilenet_v2-w8a8": Row("MobileNetV2, nips2017 (1,000)", "W8A8, nearest", f"package:mobilenet_v2 {NIPS}"),
    "mobilenet_v2-noise-w8a8": Row(
        "MobileNetV2, nips2017 (1,000)", "W8A8, noise images", f"package:mobilenet_v2 --recipe noise {NIPS}"
    ),
    "lite0-w8a8": Row("EfficientNet-Lite0, nips2017 (1,000)", "W8A8, nearest", f"package:efficientnet_lite0 {NIPS}"),
    "lite0-noise-w8a8": Row(
        "EfficientNet-Lite0, nips2017 (1,000)", "W8A8, noise images", f"package:efficientnet_lite0 --recipe noise {NIPS}"
    ),
}


def prepare(assets: Path) -> None:
    """CIFAR-10's test images as the array file that `--evaluate` reads."""
    from PIL import Image

    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "cifar10_test.npz"
    if file.is_file():
        return
    Image.MAX_IMAGE_PIXELS = None
    mosaic = np.asarray(Image.open(assets / "data/cifar10/test.webp").convert("RGB"))
    images = mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    np.savez(file, images=images, labels=np.load(assets / "data/cifar10/test_labels.npy"))


def measure(name: str, assets: Path, seed: int) -> dict:
    """The metrics of one run, with its wall time as `wall`."""
    output = BUILD / f"{name}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    command = ROWS[name].command.format(assets=assets, build=BUILD).split()
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "reverie", "quantize", *command, "--seed", str(seed), "--output", str(output), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout) | {"wall": time.perf_counter() - began}


def percent(values: list[float]) -> str:
    """Mean, and half the spread where there are several."""
    middle = f"{100 * statistics.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ± {50 * (max(values) - min(values)):.2f}"


def line(name: str, runs: list[dict]) -> str:
    """The Markdown row of one setting."""
    row, first = ROWS[name], runs[0]
    interval = first["difference"]["exported"]
    drop = [run["full_precision"]["top1"] - run["exported"]["top1"] for run in runs]
    cells = [
        row.title,
        row.setting,
        f"{100 * first['full_precision']['top1']:.2f}",
        percent([run["quantized"]["top1"] for run in runs]),
        percent([run["exported"]["top1"] for run in runs]),
        f"{percent(drop)} [{-100 * interval['high']:.2f}, {-100 * interval['low']:.2f}]",
        f"{statistics.median(run['latency_ms']['ratio'] for run in runs):.2f} x",
        f"{first['bytes']['fp32'] / 1e6:.2f} → {first['bytes']['packed'] / 1e6:.2f}",
        f"{first['images']['count']}",
        f"{statistics.median(run['wall'] for run in runs):.0f}",
        f"{max(run['peak_memory_bytes'] for run in runs) / 2**30:.1f}",
        f"{len(runs)}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| network, data | setting | full precision | fake-quantized | exported | drop [95 %] | faster than FP32 | MB | images | s | GiB | seeds |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Prints the table, then the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    prepare(options.assets)
    print(HEADER, flush=True)
    for name in options.rows:
        print(line(name, [measure(name, options.assets, seed) for seed in range(options.seeds)]), flush=True)
    print()
    for name in options.rows:
        command = ROWS[name].command.format(assets=options.assets, build=BUILD.relative_to(ROOT))
        print(f"- {ROWS[name].title}, {ROWS[name].setting}: `reverie quantize {command}`")


if __name__ == "__main__":
    main()
