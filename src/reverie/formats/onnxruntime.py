"""ONNX Runtime's `quantize_static`: a `CalibrationDataReader` of network inputs, float32 NCHW.

    from calibration import Reader, inputs
    quantize_static("net.onnx", "net.int8.onnx", Reader(inputs, "input"), per_channel=True, activation_type=QuantType.QUInt8)

ONNX Runtime takes for a reader whatever has `get_next`, so this one imports nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from reverie.formats._arrays import Arrays


class Reader:
    """Gives ONNX Runtime one batch after the other, and None after the last.

    Args:
        inputs: As the network takes them.
        input_name: Of the ONNX graph's input: `onnxruntime.InferenceSession(path).get_inputs()[0].name`.
        batch: Images at once; 1 suits a graph whose batch is fixed.
    """

    def __init__(self, inputs: Float[np.ndarray, "count _ _ _"], input_name: str, *, batch: int = 1) -> None:
        self.inputs = inputs
        self.input_name = input_name
        self.batch = batch
        self._start = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by the name of the input."""
        start = self._start
        self._start += self.batch
        return {self.input_name: self.inputs[start : start + self.batch]} if start < len(self.inputs) else None

    def rewind(self) -> None:
        """Starts again with the first image."""
        self._start = 0


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Arrays):
    """Has the settings of all arrays."""

    adapter: ClassVar = Reader


METHOD = OnnxRuntime
