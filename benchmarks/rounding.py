"""Ways to round weights against each other: the same network, images, ranges and bias correction; and how long each takes.

    python benchmarks/rounding.py --assets ../shared/assets --tuning --seeds 0       on the images to tune on
    python benchmarks/rounding.py --assets ../shared/assets                          on the 10,000 CIFAR-10 test images
    python benchmarks/rounding.py --assets ../shared/assets --time resnet18          seconds, torchvision's ResNet-18 at 224 px

Accuracy is that of ResNet-20 (akamaster's checkpoint), integer placement with 8-bit ends, on 128 ZeroQ images (100 steps), executed on
integer codes; ranges of activations are those of the preset `gptq` at 8 bits and of 99.9 % at 4. Learned rounding is AdaRound, layer by layer, 500
steps each. The images of a seed are kept below build/rounding. ResNet-18 has random weights, and noise for images: time does not ask for more.
"""

import argparse
import statistics
import time
from pathlib import Path

import methods
import numpy as np
import torch
from torch import fx
from torch.nn import functional

from reverie.checkpoints import Forgetful
from reverie.graph.integer import as_integers
from reverie.graph.placement import Student
from reverie.graph.quantized import finish
from reverie.images import Images
from reverie.images.folder import read_folder
from reverie.images.store import load_images, save_images
from reverie.models import Network, load
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recipe import Recipe
from reverie.recipes import read
from reverie.recovery.bias_correction import correct_biases
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.recovery.reconstruction import round_weights
from reverie.report.metrics import predict
from reverie.stages import as_teacher, student_of, synthesize

BUILD = methods.ROOT / "build" / "rounding"
SETTINGS = [(4, 8), (3, 8), (4, 4), (2, 8)]
METHODS = ["nearest", "squant", "gptq", "adaround"]


def recipe_of(weight_bits: int, activation_bits: int, method: str, seed: int) -> Recipe:
    """The preset `gptq` at other bits and with another rounding."""
    settings = {"quantization.weight_bits": weight_bits, "quantization.activation_bits": activation_bits, "seed": seed}
    if activation_bits < 8:
        settings["activations.percentile"] = 99.9
    return read("gptq", settings | {"rounding.method": method})


def rounded(recipe: Recipe, graph: fx.GraphModule, inputs: torch.Tensor, *, correct: bool) -> tuple[Student, float]:
    """The student, and the seconds that rounding took."""
    reference, student = student_of(graph, recipe.quantization)
    calibrate_activations(reference, student, inputs, recipe.activations, batch=64, progress=Silent())
    calibrate_weights(student, recipe.weights)
    began = time.perf_counter()
    round_weights(
        reference,
        student,
        inputs,
        recipe.rounding,
        recipe.reconstruction,
        seed=Seed(recipe.seed),
        checkpoints=Forgetful(),
        progress=Silent(),
    )
    seconds = time.perf_counter() - began
    if correct:
        correct_biases(reference, student, inputs, progress=Silent())
    return student, seconds


def resnet20(assets: Path) -> Network:
    """The CIFAR-10 ResNet-20 of the assets."""
    return load(
        f"{assets / 'models.py'}:CifarResNet",
        weights=str(assets / "nets/cifar10/resnet20.pth"),
        input_size=32,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classes=10,
    )


def images_of(network: Network, seed: int) -> Images:
    """The synthetic images of a seed, made once."""
    file = BUILD / f"images-{seed}.safetensors"
    if not file.is_file():
        BUILD.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(4, 8, "gptq", seed)
        save_images(synthesize(recipe, as_teacher(network), recipe.images, "images", Forgetful(), Silent()), file)
    return load_images(file)


def answers(graph: fx.GraphModule, inputs: torch.Tensor) -> torch.Tensor:
    """The logits for all inputs."""
    return torch.cat([predict(graph, part) for part in inputs.split(250)])


def judged(truth: torch.Tensor, made: torch.Tensor, labels: torch.Tensor | None) -> tuple[float, float]:
    """Accuracy (agreement with full precision where nobody knows labels), and KL from full precision in nats."""
    right = truth.argmax(dim=1) if labels is None else labels
    far = functional.kl_div(made.log_softmax(1), truth.log_softmax(1), log_target=True, reduction="batchmean")
    return float((made.argmax(dim=1) == right).float().mean()), float(far)


def accuracy(assets: Path, seeds: list[int], names: list[str], settings: list[tuple[int, int]], tuning: bool) -> None:
    """Prints a row for each setting and method."""
    methods.prepare(assets, [])
    network = resnet20(assets)
    teacher = as_teacher(network)
    if tuning:
        methods.prepare_tuning(assets)
    kinds = ("cifar10_tuning", "imagenet_32") if tuning else ("cifar10_test",)
    sets = [
        read_folder(methods.BUILD / f"{kind}.npz", network.input, network.classes, require_labels=kind != "imagenet_32")
        for kind in kinds
    ]
    truths = [answers(teacher.graph, known.inputs) for known in sets]
    print(f"| bits | rounding | biases corrected | {' | '.join(f'{kind}: top-1, KL' for kind in kinds)} | seconds | seeds |")
    print("|---" * (5 + len(kinds)) + "|")
    own = [judged(truth, truth, known.labels)[0] for truth, known in zip(truths, sets, strict=True)]
    print(f"| full precision | | | {' | '.join(methods.points([top1]) for top1 in own)} | | |", flush=True)
    # Learned rounding fits the means already.
    rows = [(name, True) for name in names] + [("adaround", False)] * ("adaround" in names)
    for weight_bits, activation_bits in settings:
        for name, correct in rows:
            found: list[list[tuple[float, float]]] = [[] for _ in sets]
            times = []
            for seed in seeds:
                recipe = recipe_of(weight_bits, activation_bits, name, seed)
                student, seconds = rounded(recipe, teacher.graph, images_of(network, seed).inputs, correct=correct)
                times.append(seconds)
                codes = as_integers(finish(student))
                for known, truth, results in zip(sets, truths, found, strict=True):
                    results.append(judged(truth, answers(codes, known.inputs), known.labels))
            cells = [
                f"{methods.points([top1 for top1, _ in part])}, {statistics.mean(far for _, far in part):.3f}" for part in found
            ]
            bits = f"W{weight_bits}A{activation_bits}"
            row = [bits, name, "yes" if correct else "no", *cells, f"{statistics.mean(times):.1f}", str(len(seeds))]
            print(f"| {' | '.join(row)} |", flush=True)


def seconds_of(name: str, names: list[str]) -> None:
    """Prints how long each method takes for one of torchvision's networks with random weights, on noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = load(f"torchvision:{name}", pretrained=False)
    graph = as_teacher(network).graph
    inputs = torch.from_numpy(np.random.default_rng(0).standard_normal((128, *network.input.shape), dtype=np.float32))
    for method in names:
        recipe = recipe_of(4, 8, method, 0)
        _, seconds = rounded(recipe, graph, inputs, correct=False)
        print(f"{name}, {method}: {seconds:.1f} s with {torch.get_num_threads()} threads", flush=True)


def main() -> None:
    """Makes the table, or the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--bits", nargs="*", default=[f"{weights},{activations}" for weights, activations in SETTINGS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tuning", action="store_true", help="judge on the images to tune on")
    parser.add_argument("--time", metavar="NETWORK", help="seconds for a network of torchvision in place of accuracy")
    options = parser.parse_args()
    if options.time:
        seconds_of(options.time, [name for name in options.methods if name != "adaround"])
    else:
        settings = [tuple(map(int, pair.split(","))) for pair in options.bits]
        accuracy(options.assets, options.seeds, options.methods, settings, options.tuning)


if __name__ == "__main__":
    main()
