"""The estimate of what quantizing one tensor costs (`recovery/sensitivity.py`), beside quantizing one tensor after the other.

    python benchmarks/sensitivity.py --assets ../shared/assets

ResNet-20 (CIFAR-10), 64 of 128 ZeroQ images. Prints seconds of both and Spearman's rank correlation of their divergences, over all widths
and within each; weights are corrected for their means in both.
"""

import argparse
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, fx
from torch.nn import functional

from reverie import load_network
from reverie.checkpoints import Folder
from reverie.graph.operators import LINEARS
from reverie.graph.placement import Student
from reverie.grid import Grid, fake_quantize
from reverie.images import evenly
from reverie.observers import Observer, tensor_qparams, weight_qparams
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recipes import read
from reverie.recovery.ranges import watch_tensors
from reverie.recovery.sensitivity import measure
from reverie.stages import as_teacher, student_of

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (2, 3, 4, 5, 6, 8)


@torch.no_grad()
def one_by_one(
    teacher: fx.GraphModule, student: Student, inputs: Tensor, images: Tensor, activations: Observer, weights: Observer
) -> dict[tuple[str, str, int], float]:
    """Divergence of the answer when one tensor is quantized, executing all that comes after it."""
    whole = fx.Interpreter(teacher, garbage_collect_values=False)
    logits = whole.run(images)
    known, values = functional.log_softmax(logits, dim=1), dict(whole.env)
    watches = watch_tensors(teacher, student.activations, torch.split(inputs, 64), activations)

    def divergence(node: fx.Node, value: Tensor) -> float:
        behind, frontier = set(), [node]
        while frontier:
            readers = set(frontier.pop().users) - behind
            behind |= readers
            frontier += readers
        before = {other: kept for other, kept in values.items() if other not in behind} | {node: value}
        ours = functional.log_softmax(fx.Interpreter(teacher).run(images, initial_env=before), dim=1)
        return float(functional.kl_div(ours, known, reduction="batchmean", log_target=True))

    found = {}
    nodes = {node.name: node for node in teacher.graph.nodes}
    for bits in WIDTHS:
        for name, layer in student.layers.items():
            node, weight = nodes[name], student.graph.get_buffer(layer.weight)
            error = fake_quantize(weight, *weight_qparams(weight, weights, Grid(bits), symmetric=True), Grid(bits)) - weight
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            moved = node.target(args[0], error, None, *args[3:], **kwargs)
            moved = moved - moved.mean([0] if node.target in LINEARS else [0, 2, 3], keepdim=True)
            found["weight", name, bits] = divergence(node, values[node] + moved)
        for name, watch in watches.items():
            grid = Grid(bits, signed=False)
            value = fake_quantize(values[nodes[name]], *tensor_qparams(watch, grid), grid)
            found["activation", name, bits] = divergence(nodes[name], value)
    return found


def main() -> None:
    """Prints both times and the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    assets = parser.parse_args().assets
    network = load_network(
        f"{assets}/models.py:CifarResNet",
        weights=assets / "nets/cifar10/resnet20.pth",
        input_size=32,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classes=10,
    )
    recipe, teacher = read("adaround"), as_teacher(network)
    checkpoints = Folder(ROOT / "build" / "sensitivity")
    images = recipe.synthesis(teacher, recipe.images, seed=Seed(0, ("images",)), checkpoints=checkpoints, progress=Silent())
    reference, student = student_of(teacher.graph, recipe.quantization)
    began = time.perf_counter()
    methods = {"activations": recipe.activations, "weights": recipe.weights}
    given = {"images": 64, "probes": 4, "seed": Seed(0), "progress": Silent()}
    parts = measure(reference, student, images.inputs, WIDTHS, **methods, **given)
    estimated = {(part.kind, part.name, bits): value for part in parts for bits, value in part.divergence.items()}
    between = time.perf_counter()
    exact = one_by_one(reference, student, images.inputs, images.inputs[evenly(len(images), 64)], **methods)
    print(f"estimated {between - began:.1f} s, one by one {time.perf_counter() - between:.1f} s")
    for kind in ("weight", "activation"):
        for widths in (WIDTHS, *((bits,) for bits in WIDTHS)):
            keys = [key for key in exact if key[0] == kind and key[2] in widths]
            rank = spearmanr([estimated[key] for key in keys], [exact[key] for key in keys]).statistic
            print(f"{kind}s, {', '.join(map(str, widths))} bits: {rank:.3f}")


if __name__ == "__main__":
    main()
