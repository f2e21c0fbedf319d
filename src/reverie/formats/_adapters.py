"""Adapters that two tools share. Each becomes a script of its own (`_arrays.py`), so it uses nothing from outside itself but NumPy."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float


def representative_dataset(
    inputs: Float[np.ndarray, "count _ _ _"], *, batch: int = 1
) -> Callable[[], Iterator[list[Float[np.ndarray, "batch _ _ _"]]]]:
    """A function whose every call goes through all images anew and yields lists of one batch, as networks of one input take them.

    Args:
        inputs: As the network takes them.
        batch: Images at once; the last batch may be smaller.
    """

    def batches() -> Iterator[list[np.ndarray]]:
        for start in range(0, len(inputs), batch):
            yield [inputs[start : start + batch]]

    return batches


def forward_pass(inputs: Float[np.ndarray, "count _ _ _"], *, batch: int = 32) -> Callable[..., None]:
    """A callback that shows a PyTorch model every image, without gradients, where the model's parameters are.

    Args:
        inputs: As the network takes them.
        batch: Images at once; the last batch may be smaller.
    """
    import torch

    def show(model: Any, _: object = None) -> None:
        device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), "cpu")
        with torch.no_grad():
            for start in range(0, len(inputs), batch):
                model(torch.tensor(inputs[start : start + batch], device=device))

    return show
