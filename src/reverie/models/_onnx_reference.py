"""What ONNX Runtime answers for the file itself: the truth that a converted network is held to."""

import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from onnxruntime.capi import onnxruntime_pybind11_state as runtime  # type: ignore[import-untyped]
from torch import Tensor

from reverie.errors import ModelError

_FAILURES = (
    runtime.EPFail,
    runtime.Fail,
    runtime.InvalidArgument,
    runtime.InvalidGraph,
    runtime.InvalidProtobuf,
    runtime.NotImplemented,
    runtime.RuntimeException,
)
# Errors reach the user as exceptions; without this they are printed as well.
_SILENT = 4


class OnnxReference:
    """Executes `model` in ONNX Runtime on the CPU, as it is written: without optimizations.

    Args:
        model: As `_onnx_file.read` gives it.
        channels_last: It takes `(n, height, width, channels)`.

    Raises:
        ModelError: ONNX Runtime does not load it.
    """

    def __init__(self, model: onnx.ModelProto, *, channels_last: bool) -> None:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = _SILENT
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        (self._input,) = model.graph.input
        self._channels_last = channels_last
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
        except _FAILURES as error:
            raise ModelError(f"ONNX Runtime must load the file, got {_one_line(error)}; export it again") from error

    def __call__(self, inputs: Float[Tensor, "count channels height width"]) -> Tensor:
        """Its answers, on the CPU.

        Raises:
            ModelError: ONNX Runtime cannot execute the file.
        """
        arranged = (inputs.permute(0, 2, 3, 1) if self._channels_last else inputs).cpu().contiguous()
        batch = self._input.type.tensor_type.shape.dim[0]
        # A file for batches of one size takes no others: the last one is filled up.
        size = batch.dim_value if batch.HasField("dim_value") else len(arranged)
        missing = -len(arranged) % size
        filled = torch.cat([arranged, arranged[:1].expand(missing, *arranged.shape[1:])])
        try:
            answers = [
                torch.from_numpy(self._session.run(None, {self._input.name: part.numpy()})[0])
                for part in torch.split(filled, size)
            ]
        except _FAILURES as error:
            raise ModelError(f"ONNX Runtime must execute the file, got {_one_line(error)}; check the input size") from error
        answer = torch.cat(answers)
        return answer[: len(arranged)] if missing else answer


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
