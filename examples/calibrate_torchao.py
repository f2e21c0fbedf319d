"""torchao's PT2E for x86, calibrated with synthetic images: pip install -e '.[torchao,digits]'

    python examples/calibrate_torchao.py

The accuracy is that of the converted graph as PyTorch executes it; `torch.compile` lowers the same graph to int8 kernels.
"""

from pathlib import Path

import numpy as np
import task
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import reverie


def quantize(network: reverie.Network, images: reverie.Images, folder: Path) -> task.Predict:
    """8 bits, the quantizer's defaults for x86. Writes nothing into `folder`."""
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(network.module, (images.inputs[:2],), dynamic_shapes=(batch,))
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantizer)
    reverie.calibration("torchao", images)(prepared)
    converted = convert_pt2e(prepared)

    def predict(inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return converted(torch.from_numpy(inputs)).numpy()

    return predict


if __name__ == "__main__":
    task.parse().compare("torchao", quantize)
