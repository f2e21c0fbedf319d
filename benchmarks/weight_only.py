"""Linear layers as integer products, or with weights alone in 4 bits (MatMulNBits): which is faster in ONNX Runtime on this CPU.

    OMP_NUM_THREADS=1 python benchmarks/weight_only.py

A ViT-Tiny and a perceptron with random weights. Ours is the target `onnx`; weight-only is what ONNX Runtime's own quantizer makes of
the float file (blocks of 32, INT4 -> DequantizeLinear, which it fuses), with its products in float or in int8. Latencies alternate in one
process: median (smallest to largest), milliseconds, one thread.
"""

import itertools
import logging
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, QuantFormat
from torch import Tensor, nn

from reverie.export._onnx import export_float
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.models import _torchvision_import
from reverie.observers.minmax import MinMax
from reverie.progress import Silent
from reverie.recovery.ranges import calibrate_activations, calibrate_weights

IN_FLOAT, IN_INT8 = 0, 4


class Perceptron(nn.Module):
    """Three products; as `x @ W + b`, since weight-only files know MatMul and not Gemm."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 2048, 2048, 10)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = x.flatten(1).unsqueeze(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.squeeze(1)


def options(level: int | None) -> onnxruntime.SessionOptions:
    """One thread; `level` is how exactly MatMulNBits computes."""
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads, chosen.log_severity_level = 1, 4
    if level is not None:
        chosen.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return chosen


def products(file: Path, level: int | None) -> str:
    """What ONNX Runtime makes of the products."""
    chosen = options(level)
    chosen.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(file), chosen, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(chosen.optimized_model_filepath).graph.node)
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()) if "Gemm" in name or "MatMul" in name)


def compare(name: str, network: nn.Module, shape: tuple[int, ...], batches: tuple[int, ...], folder: Path) -> None:
    """Prints sizes, kernels and latencies of one network."""
    graph = fold_batch_norms(capture(network.eval(), shape))
    images, plain = torch.randn(2, *shape), folder / "float.onnx"
    export_float(graph, shape, plain)
    files: dict[str, tuple[Path, int | None]] = {"FP32": (plain, None)}
    for weights in (8, 4):
        student = place(graph, "integer", weight_bits=weights, activation_bits=8, end_bits=8)
        calibrate_activations(graph, student, images, MinMax(), batch=2, progress=Silent())
        calibrate_weights(student, MinMax())
        file = folder / f"w{weights}.onnx"
        Onnx()(finish(student), shape, file)
        files[f"W{weights}A8"] = (file, None)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(plain), block_size=32, is_symmetric=True, quant_format=QuantFormat.QDQ, op_types_to_quantize=("MatMul",)
    )
    quantizer.process()
    narrow = folder / "weight_only.onnx"
    quantizer.model.save_model_to_file(str(narrow), False)
    files |= {"W4 alone, in float": (narrow, IN_FLOAT), "W4 alone, in int8": (narrow, IN_INT8)}
    for kind, (file, level) in files.items():
        print(f"{name}: {kind}: {file.stat().st_size / 1e6:.2f} MB, {products(file, level)}")
    sessions = {
        kind: onnxruntime.InferenceSession(str(file), options(level), providers=["CPUExecutionProvider"])
        for kind, (file, level) in files.items()
    }
    for batch in batches:
        given = np.random.default_rng(0).standard_normal((batch, *shape), np.float32)
        times: dict[str, list[float]] = {kind: [] for kind in sessions}
        for _ in range(24):
            for kind, session in sessions.items():
                began = time.perf_counter()
                session.run(None, {session.get_inputs()[0].name: given})
                times[kind].append(1e3 * (time.perf_counter() - began))
        for kind, taken in times.items():
            kept = taken[2:]
            print(
                f"{name}, batch {batch}: {kind}: {statistics.median(kept):.2f} ({min(kept):.2f} to {max(kept):.2f})", flush=True
            )


def main() -> None:
    """Compares both networks."""
    # ONNX Runtime's quantizer tells of every node.
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = _torchvision_import.timm().create_model("vit_tiny_patch16_224")
    with tempfile.TemporaryDirectory() as folder:
        compare("perceptron", Perceptron(), (1, 28, 28), (1, 32), Path(folder))
        compare("ViT-Tiny", vit, (3, 224, 224), (1, 8), Path(folder))


if __name__ == "__main__":
    main()
