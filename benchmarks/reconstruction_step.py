"""What a step of block reconstruction costs, against a bare forward and backward of the same block at the same batch.

    python benchmarks/reconstruction_step.py --assets ASSETS
    python benchmarks/reconstruction_step.py --windows          whole images against windows, MobileNetV2 at 224 px

Both in one process, taking turns; medians. The bare step is that of the full-precision block with a gradient for every weight; the
step of reconstruction draws its batch, mixes dropped values in, quantizes weights and tensors with learned scales, and updates all.
"""

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from reverie.checkpoints import Forgetful
from reverie.graph.capture import capture
from reverie.graph.extract import extract
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import place
from reverie.graph.units import find_units
from reverie.models import load
from reverie.observers.mse import Mse
from reverie.observers.percentile import Percentile
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.recovery.reconstruction import Reconstruction, round_weights
from reverie.rounding.adaround import AdaRound

STEPS = 40


class Watch(Silent):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    if options.windows:
        compare_windows()
        return
    if options.assets is None:
        parser.error("--assets is needed for ResNet-20")
    sys.path.insert(0, str(options.assets))
    import models

    reference = fold_batch_norms(capture(models.cifar_net("resnet20"), (3, 32, 32)))
    inputs = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    units = find_units(reference, "block")
    rows = {"adaround": {}, "qdrop": {"learned_ranges": True, "drop": 0.5}}
    rows["genie_m"] = rows["qdrop"] | {"learned_steps": True}
    floors = {unit.name: floor(reference, unit, inputs, options.batch) for unit in units}
    print(f"ResNet-20, batch {options.batch}, {torch.get_num_threads()} threads; ms a step (times the bare step)")
    print(f"{'block':20}{'bare':>8}" + "".join(f"{name:>18}" for name in rows))
    found = {name: steps(reference, inputs, len(units), settings | {"batch": options.batch}) for name, settings in rows.items()}
    for number, unit in enumerate(units):
        cells = "".join(f"{1000 * found[n][number]:10.1f} ({found[n][number] / floors[unit.name]:.2f} x)" for n in rows)
        print(f"{unit.name:20}{1000 * floors[unit.name]:8.1f}{cells}")
    whole = sum(floors.values())
    print(f"{'all':20}{1000 * whole:8.1f}" + "".join(f"{1000 * sum(v):10.1f} ({sum(v) / whole:.2f} x)" for v in found.values()))


def floor(reference, unit, inputs, batch) -> float:
    """Seconds of a forward and backward of the full-precision block."""
    from reverie.graph.taps import tap

    module, sources = extract(reference, unit)
    values = tap(reference, [*sources, unit.output])(inputs[:batch].contiguous(memory_format=torch.channels_last))
    weights = [buffer.requires_grad_() for buffer in module.buffers()]
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        distance = torch.nn.functional.mse_loss(module(*(values[name] for name in sources)), values[unit.output] + 0.1)
        torch.autograd.grad(distance, weights, allow_unused=True)
        times.append(time.perf_counter() - start)
    for weight in weights:
        weight.requires_grad_(False)
    return statistics.median(times[5:])


def compare_windows() -> None:
    """Milliseconds of a qdrop step, and how many positions of the answer it learns from."""
    network = load("package:mobilenet_v2")
    reference = fold_batch_norms(capture(network.module, network.input.shape))
    units = find_units(reference, "block")
    inputs = torch.randn(32, *network.input.shape, generator=torch.Generator().manual_seed(0))
    qdrop = {"learned_ranges": True, "drop": 0.2}
    rows = {"12 whole": {"batch": 12}, "32 whole": {"batch": 32}, "32, 10 x 10": {"batch": 32, "window": 10}}
    found = {name: steps(reference, inputs, len(units), qdrop | settings, count=12) for name, settings in rows.items()}
    print(f"MobileNetV2, {torch.get_num_threads()} threads; ms a step")
    print(f"{'block':30}" + "".join(f"{name:>14}" for name in rows))
    for number, unit in enumerate(units):
        print(f"{unit.name:30}" + "".join(f"{1000 * part[number]:14.1f}" for part in found.values()))
    print(f"{'all':30}" + "".join(f"{1000 * sum(part):14.1f}" for part in found.values()))


def steps(reference, inputs, units, settings, count=STEPS) -> list[float]:
    """Seconds of a step in each unit, medians of `count`."""
    student = place(reference, "integer", weight_bits=4, activation_bits=4, end_bits=8)
    calibrate_activations(reference, student, inputs, Percentile(percentile=99.9), batch=64, progress=Silent())
    calibrate_weights(student, Mse())
    watch = Watch()
    chosen = Reconstruction(unit="block", iterations=count, **settings)
    round_weights(reference, student, inputs, AdaRound(), chosen, seed=Seed(0), checkpoints=Forgetful(), progress=watch)
    parts = [watch.times[first : first + count] for first in range(0, count * units, count)]
    return [statistics.median(b - a for a, b in pairwise(part[5:])) for part in parts]


if __name__ == "__main__":
    main()
