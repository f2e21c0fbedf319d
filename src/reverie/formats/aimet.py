"""Qualcomm's AIMET for PyTorch: a callback that computes encodings from network inputs, float32 NCHW.

    from calibration import forward_pass, inputs
    sim.compute_encodings(forward_pass(inputs))

AIMET calls it with the model, or with the model and `forward_pass_callback_args`, which are not needed.
"""

from dataclasses import dataclass
from typing import ClassVar

from reverie.formats._adapters import forward_pass
from reverie.formats._arrays import Arrays


@dataclass(frozen=True, kw_only=True)
class Aimet(Arrays):
    """Has the settings of all arrays."""

    adapter: ClassVar = staticmethod(forward_pass)


METHOD = Aimet
