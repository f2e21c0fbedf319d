"""Qualcomm's AIMET, calibrated with synthetic images: pip install -e '.[digits]' aimet-torch

python examples/calibrate_aimet.py
"""

import copy
from pathlib import Path

import numpy as np
import task
import torch

import reverie


def quantize(network: reverie.Network, images: reverie.Images, folder: Path) -> task.Predict:
    """8 bits, AIMET's defaults, in its own simulation. Writes nothing into `folder`."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    prepared = prepare_model(copy.deepcopy(network.module))
    fold_all_batch_norms(prepared, (1, *network.input.shape))
    simulation = QuantizationSimModel(prepared, images.inputs[:1])
    simulation.compute_encodings(reverie.calibration("aimet", images))

    def predict(inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return simulation.model(torch.from_numpy(inputs)).numpy()

    return predict


if __name__ == "__main__":
    task.parse().compare("AIMET", quantize)
