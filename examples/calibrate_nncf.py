"""NNCF's `quantize` for OpenVINO, calibrated with synthetic images: pip install -e '.[nncf,digits]'

python examples/calibrate_nncf.py
"""

from pathlib import Path

import nncf
import numpy as np
import openvino
import task
import torch

import reverie


def quantize(network: reverie.Network, images: reverie.Images, folder: Path) -> task.Predict:
    """8 bits, NNCF's defaults; it compiles for this machine's CPU."""
    example = torch.zeros(1, *network.input.shape)
    model = openvino.convert_model(network.module, example_input=example, input=[-1, *network.input.shape])
    quantized = nncf.quantize(model, reverie.calibration("nncf", images), subset_size=len(images))
    compiled = openvino.compile_model(quantized, "CPU")

    def predict(inputs: np.ndarray) -> np.ndarray:
        return compiled(inputs)[0]

    return predict


if __name__ == "__main__":
    task.parse().compare("OpenVINO", quantize)
