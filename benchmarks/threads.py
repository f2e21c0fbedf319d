"""How far apart runs are that differ in the number of threads alone, which sum in another order.

    python benchmarks/threads.py                          embedded:digits, each recipe on 1 and on 2 threads; a few minutes
    python benchmarks/threads.py --recipes zeroq --threads 4

Bytes are promised for one number of threads only (`reverie resume` takes the run's own). What to expect of another is printed here: the
difference of pixels in network inputs, the share of weights that got another code, the largest change of a scale, and beside them
what the results are worth, on the 599 held-out digits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from reverie.export._packed import read_packed
from reverie.images.store import load_images

RECIPES = {
    "zeroq": ["--weight-bits", "8"],
    "adaround": ["--weight-bits", "4"],
    "qdrop": ["--weight-bits", "4", "--activation-bits", "4", "--set", "reconstruction.iterations=200"],
    "gdfq": ["--weight-bits", "4", "--set", "synthesis.steps=200", "--set", "distillation.steps=100"],
}


def ran(recipe: str, threads: int, output: Path) -> dict[str, Any]:
    """The metrics of one run in a process of its own."""
    words = ["quantize", "embedded:digits", "--recipe", recipe, *RECIPES[recipe], "--images", "64", "--evaluate", "held-out"]
    command = [sys.executable, "-m", "reverie", *words, "--output", str(output), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    metrics: dict[str, Any] = json.loads(done.stdout)
    return metrics


def codes_and_scales(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of all weights, and the scales of weights and activations, one after the other."""
    tensors, header = read_packed(run / "network.safetensors")
    layers = header["layers"].values()
    codes = [tensors[f"{layer['weight']}.codes"].flatten() for layer in layers]
    names = [layer["weight"] for layer in layers] + list(header["tensors"])
    return torch.cat(codes).int(), torch.cat([tensors[f"{name}.scale"].flatten() for name in names])


def main() -> None:
    """Runs every recipe twice, and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2, help="beside 1")
    given = parser.parse_args()
    print(
        f"| recipe | pixels, mean (most) | other codes | scales, most | top-1 on 1, {given.threads} threads | KL |\n|---|---|---|---|---|---|"
    )
    for recipe in given.recipes:
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder) / str(count) for count in (1, given.threads)]
            found = [ran(recipe, count, run) for count, run in zip((1, given.threads), runs, strict=True)]
            first, second = (load_images(run / "images.safetensors").inputs for run in runs)
            (codes, scales), (others, their_scales) = (codes_and_scales(run) for run in runs)
        apart, changed = (first - second).abs(), ((scales - their_scales).abs() / scales).max()
        accuracy = ", ".join(f"{100 * part['exported']['top1']:.2f}" for part in found)
        divergence = ", ".join(f"{part['divergence']['evaluation']['quantized']:.2g}" for part in found)
        print(
            f"| {recipe} | {apart.mean():.3g} ({apart.max():.2g}) | {(codes != others).float().mean():.2%} | {changed:.2%} | {accuracy} | "
            f"{divergence} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
