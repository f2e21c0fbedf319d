"""NVIDIA's ModelOpt for ONNX: a `.npy` of network inputs, float32 NCHW, which its command reads by itself.

    python -m modelopt.onnx.quantization --onnx_path net.onnx --quantize_mode int8 --calibration_data_path DIR/inputs.npy

It takes one image at a time where the graph's batch is free.
"""

from dataclasses import dataclass

from reverie.formats._arrays import Arrays


@dataclass(frozen=True, kw_only=True)
class ModelOpt(Arrays):
    """Has the settings of all arrays."""


METHOD = ModelOpt
