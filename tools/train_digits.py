"""Trains `embedded:digits` and writes src/reverie/models/digits.safetensors.

    OMP_NUM_THREADS=1 python tools/train_digits.py

The last epoch is what is kept: the held-out part chooses nothing. One seed decides the weights and the order of the images;
with one thread and the versions of constraints.txt the same bytes come out.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from reverie.models.embedded import DIGITS_INPUT, DIGITS_WEIGHTS, DigitsNet, digits_images

EPOCHS = 60
BATCH = 32
PEAK_LEARNING_RATE = 0.05
WEIGHT_DECAY = 1e-4
MAX_ROTATION = math.radians(12)
MAX_SHIFT = 0.125  # of half the width
MAX_ZOOM = 0.1


def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, shifted and zoomed a little; what comes in at the edges is black."""
    count = len(inputs)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, zoom = uniform(MAX_ROTATION), 1 + uniform(MAX_ZOOM)
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    matrix = torch.stack([cosine, -sine, uniform(MAX_SHIFT), sine, cosine, uniform(MAX_SHIFT)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(inputs.shape), align_corners=False)
    black = DIGITS_INPUT.bounds(inputs)[0]
    return F.grid_sample(inputs - black, grid, align_corners=False) + black


def train(seed: int, epochs: int) -> DigitsNet:
    """A trained network in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = DigitsNet()
    images = digits_images("train")
    assert images.labels is not None
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.SGD(module.parameters(), PEAK_LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(module(augment(images.inputs[chosen], generator)), images.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return module.eval()


@torch.no_grad()
def accuracy(module: DigitsNet) -> float:
    """Share of the held-out images read correctly."""
    images = digits_images("held out")
    assert images.labels is not None
    return float((module(images.inputs).argmax(1) == images.labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    module = train(options.seed, options.epochs)
    state = {key: value for key, value in module.state_dict().items() if not key.endswith("num_batches_tracked")}
    options.output.write_bytes(save(state))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(f"{options.output}: {parameters} parameters, held-out accuracy {accuracy(module):.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
