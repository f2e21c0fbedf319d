"""ONNX Runtime's own `quantize_static`, calibrated with synthetic images: pip install -e '.[onnx,digits]'

python examples/calibrate_onnxruntime.py
"""

from pathlib import Path

import numpy as np
import onnxruntime
import task
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

import reverie


def quantize(network: reverie.Network, images: reverie.Images, folder: Path) -> task.Predict:
    """8 bits, the settings that x86 likes best: unsigned activations, signed weights per channel."""
    task.write_onnx(network, folder / "network.onnx")
    quantize_static(
        folder / "network.onnx",
        folder / "network.int8.onnx",
        reverie.calibration("onnxruntime", images, input_name="input"),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    session = onnxruntime.InferenceSession(folder / "network.int8.onnx", providers=["CPUExecutionProvider"])

    def predict(inputs: np.ndarray) -> np.ndarray:
        return session.run(None, {"input": inputs})[0]

    return predict


if __name__ == "__main__":
    task.parse().compare("ONNX Runtime", quantize)
