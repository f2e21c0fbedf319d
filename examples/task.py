"""What the examples share: a trained network, images for its calibration, and how much of its accuracy a quantized copy keeps.

--network   any network that loads by its name alone; default embedded:digits
--images    images.safetensors of `reverie synthesize`; default: makes 64 now
--evaluate  a folder of labelled images; default: those that the network brings along
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import reverie
from reverie.images.folder import read_folder
from reverie.models import _torchvision_import

# Some tools import torchvision, which beside a CPU-only torch needs help; so they are imported after this file.
with contextlib.suppress(reverie.ModelError):
    _torchvision_import.torchvision()

Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Task:
    """A network, images to calibrate with, and labelled images to judge with."""

    network: reverie.Network
    images: reverie.Images
    evaluation: reverie.Images

    def accuracy(self, predict: Predict) -> float:
        """The share of the labelled images whose class has the largest logit."""
        batches = self.evaluation.inputs.split(100)
        answers = np.concatenate([predict(batch.numpy()).argmax(axis=1) for batch in batches])
        return float((answers == self.evaluation.labels.numpy()).mean())

    def compare(self, tool: str, quantize: Callable[[reverie.Network, reverie.Images, Path], Predict]) -> None:
        """Prints the accuracy of the network and of its quantized copy."""
        with tempfile.TemporaryDirectory() as folder:
            quantized = self.accuracy(quantize(self.network, self.images, Path(folder)))
        print(f"{self.network.name}, {len(self.evaluation)} images, calibrated with {len(self.images)} synthetic ones")
        print(f"full precision  {100 * self.accuracy(full_precision(self.network)):.2f} %")
        print(f"{tool:<14}  {100 * quantized:.2f} %")


def parse() -> Task:
    """The task that the command line describes."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--network", default="embedded:digits")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--evaluate", type=Path)
    options = parser.parse_args()
    network = reverie.load_network(options.network)
    if options.evaluate is not None:
        evaluation = read_folder(options.evaluate, network.input, network.classes, require_labels=True)
    else:
        evaluation = network.held_out()
    return Task(network, images_for(network) if options.images is None else reverie.load_images(options.images), evaluation)


def images_for(network: reverie.Network, count: int = 64) -> reverie.Images:
    """Synthetic images, made by the default recipe."""
    from reverie.pipeline import run_synthesis

    with tempfile.TemporaryDirectory() as folder:
        run = run_synthesis(reverie.read_recipe("zeroq", {"images": count}), network, output=folder)
        return reverie.load_images(run.path / "images.safetensors")


def full_precision(network: reverie.Network) -> Predict:
    """The network itself, on arrays."""

    def predict(inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network.module(torch.from_numpy(inputs)).numpy()

    return predict


def write_onnx(network: reverie.Network, path: Path) -> None:
    """The network in full precision as an ONNX file, batch free, with the input `input`."""
    example = torch.zeros(2, *network.input.shape)
    torch.onnx.export(
        network.module,
        (example,),
        path,
        input_names=["input"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
