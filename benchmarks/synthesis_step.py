"""What a synthesis step costs beside a bare forward and backward of the same network.

    python benchmarks/synthesis_step.py --assets ../shared/assets

Bare is the user's own module in evaluation mode, weights frozen, forward and backward to the input, in the faster of the
two memory layouts; ours is a whole step of `zeroq`: statistics, loss, gradient, Adam, clamp. Both alternate in one process.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from reverie.checkpoints import Forgetful
from reverie.graph.capture import capture
from reverie.models import InputContract, load
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.synthesis import Teacher
from reverie.synthesis.zeroq import ZeroQ

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def resnet20(assets: Path) -> tuple[nn.Module, InputContract]:
    """The CIFAR-10 ResNet-20 of the assets."""
    spec = importlib.util.spec_from_file_location("assets_models", assets / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mean, std = module.CIFAR_PREP["resnet20"]
    return module.cifar_net("resnet20"), InputContract(channels=3, height=32, width=32, mean=mean, std=std)


def compare(name: str, module: nn.Module, contract: InputContract, batch: int, steps: int, rounds: int) -> None:
    """Prints one row."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    teacher = Teacher(capture(module, contract.shape), contract, 10, name)
    method = ZeroQ(batch=batch, steps=steps, swing=False)
    bare = {layout: [] for layout in LAYOUTS}
    ours = []

    def one_bare(memory_format: torch.memory_format) -> float:
        pixels = torch.randn(batch, *contract.shape).contiguous(memory_format=memory_format).requires_grad_()
        began = time.perf_counter()
        for _ in range(steps):
            torch.autograd.grad(module(pixels).sum(), pixels)
        return (time.perf_counter() - began) / steps

    def one_ours() -> float:
        began = time.perf_counter()
        method(teacher, batch, seed=Seed(0), checkpoints=Forgetful(), progress=Silent())
        return (time.perf_counter() - began) / steps

    for turn in range(-1, rounds):
        times = {layout: one_bare(memory_format) for layout, memory_format in LAYOUTS.items()}
        mine = one_ours()
        if turn >= 0:
            for layout in LAYOUTS:
                bare[layout].append(times[layout])
            ours.append(mine)
    floor = min(statistics.median(values) for values in bare.values())
    step = statistics.median(ours)
    layouts = ", ".join(f"{layout} {1000 * statistics.median(values):.0f} ms" for layout, values in bare.items())
    print(f"| {name}, batch {batch} | {layouts} | {1000 * step:.0f} ms | {step / floor:.2f} x |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| network | bare forward + backward | zeroq step | ratio |\n|---|---|---|---|")
    compare("ResNet-20, 32 px", *resnet20(options.assets), batch=64, steps=20, rounds=options.rounds)
    network = load("package:mobilenet_v2")
    compare("MobileNetV2, 224 px", network.module, network.input, batch=16, steps=5, rounds=options.rounds)


if __name__ == "__main__":
    main()
