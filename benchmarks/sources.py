"""Other tools' 8-bit quantization, calibrated with noise, with synthetic and with real images; prints a table.

    python benchmarks/sources.py --assets ../shared/assets                                   ResNet-20 on CIFAR-10
    python benchmarks/sources.py --assets ../shared/assets --network mobilenet_v2            on nips2017

The tools are used as `examples/` uses them, their defaults for x86. As many images of each kind: noise and synthetic ones made by the
recipes `noise` and `zeroq`, real ones from CIFAR-10's training images, or one ImageNet training image of each of so many classes.
Accuracy is that of the quantized network in its own runtime (torchao: the converted graph in PyTorch).
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import reverie
from reverie.images.folder import read_folder
from reverie.pipeline import run_synthesis

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
TOOLS = ("onnxruntime", "nncf", "torchao")


def load(name: str, assets: Path, count: int, seed: int) -> tuple[reverie.Network, reverie.Images, reverie.Images]:
    """The network, real images to calibrate with and labelled ones to judge with."""
    if name == "mobilenet_v2":
        network = reverie.load_network("package:mobilenet_v2")
        real = read_folder(assets / "data/imagenet_sample", network.input, network.classes, require_labels=True, limit=count)
        return network, real, read_folder(assets / "data/nips2017", network.input, network.classes, require_labels=True)
    network = reverie.load_network(
        f"{assets / 'models.py'}:CifarResNet",
        weights=assets / "nets/cifar10/resnet20.pth",
        input_size=32,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classes=10,
    )
    chosen = np.random.default_rng(seed).choice(10_000, count, replace=False)
    train, test = (cifar(assets, part, network.input) for part in ("train10k", "test"))
    return network, reverie.Images(inputs=train.inputs[chosen], labels=train.labels[chosen]), test


def cifar(assets: Path, part: str, contract: reverie.InputContract) -> reverie.Images:
    """One part of CIFAR-10, which is stored as a square of 100 by 100 pictures."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    square = np.asarray(Image.open(assets / f"data/cifar10/{part}.webp").convert("RGB"))
    pixels = square.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    labels = torch.from_numpy(np.load(assets / f"data/cifar10/{part}_labels.npy")).long()
    return reverie.Images(inputs=contract.normalize(torch.from_numpy(pixels).float() / 255), labels=labels)


def made(recipe: str, network: reverie.Network, count: int, seed: int) -> reverie.Images:
    """Images by a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_synthesis(reverie.read_recipe(recipe, {"images": count, "seed": seed}), network, output=folder)
        return reverie.load_images(run.path / "images.safetensors")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--network", choices=("resnet20", "mobilenet_v2"), default="resnet20")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    network, real, evaluation = load(options.network, options.assets, options.count, options.seed)
    task = importlib.import_module("task")
    judge: Callable[[Callable[[np.ndarray], np.ndarray]], float] = task.Task(network, real, evaluation).accuracy
    full = judge(task.full_precision(network))
    sets = {recipe: made(recipe, network, options.count, options.seed) for recipe in ("noise", "zeroq")} | {"real": real}
    print(f"{network.name}, {len(evaluation)} images, {options.count} to calibrate, seed {options.seed}: {100 * full:.2f}\n")
    lines = ["| tool | noise | synthetic | real |", "|---|---|---|---|"]
    for tool in options.tools:
        quantize = importlib.import_module(f"calibrate_{tool}").quantize
        cells = []
        for images in sets.values():
            with tempfile.TemporaryDirectory() as folder:
                cells.append(f"{100 * judge(quantize(network, images, Path(folder))):.2f}")
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    # Last, since NNCF draws its bars on standard output.
    print("\n".join(lines))


if __name__ == "__main__":
    main()
