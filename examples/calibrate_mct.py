"""Sony's Model Compression Toolkit, calibrated with synthetic images: pip install -e '.[digits]' model-compression-toolkit

python examples/calibrate_mct.py
"""

from pathlib import Path

import numpy as np
import task
import torch

import reverie


def quantize(network: reverie.Network, images: reverie.Images, folder: Path) -> task.Predict:
    """8 bits, MCT's default target, its own quantized module. Writes nothing into `folder`."""
    import model_compression_toolkit as mct

    generate = reverie.calibration("mct", images, batch=32)
    quantized, _ = mct.ptq.pytorch_post_training_quantization(network.module, generate)

    def predict(inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return quantized(torch.from_numpy(inputs)).numpy()

    return predict


if __name__ == "__main__":
    task.parse().compare("MCT", quantize)
