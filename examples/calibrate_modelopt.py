"""NVIDIA's ModelOpt, calibrated with synthetic images: pip install -e '.[onnx,digits]' 'nvidia-modelopt[onnx]'

python examples/calibrate_modelopt.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import task

import reverie
from reverie.formats import write
from reverie.formats.modelopt import ModelOpt


def quantize(network: reverie.Network, images: reverie.Images, folder: Path) -> task.Predict:
    """int8 for TensorRT by ModelOpt's own command; executed by ONNX Runtime on the CPU."""
    task.write_onnx(network, folder / "network.onnx")
    write(ModelOpt(), images, network.input, network.classes, folder / "calibration")
    command = [sys.executable, "-m", "modelopt.onnx.quantization", "--quantize_mode", "int8", "--calibration_eps", "cpu"]
    command += ["--onnx_path", str(folder / "network.onnx"), "--output_path", str(folder / "network.int8.onnx")]
    command += ["--calibration_data_path", str(folder / "calibration" / "inputs.npy")]
    subprocess.run(command, check=True)
    session = onnxruntime.InferenceSession(folder / "network.int8.onnx", providers=["CPUExecutionProvider"])

    def predict(inputs: np.ndarray) -> np.ndarray:
        return session.run(None, {"input": inputs})[0]

    return predict


if __name__ == "__main__":
    task.parse().compare("ModelOpt", quantize)
