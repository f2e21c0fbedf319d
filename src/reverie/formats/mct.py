"""Sony's Model Compression Toolkit for PyTorch: a `representative_data_gen` of network inputs, float32 NCHW.

from calibration import inputs, representative_dataset
mct.ptq.pytorch_post_training_quantization(model, representative_data_gen=representative_dataset(inputs, batch=32))
"""

from dataclasses import dataclass
from typing import ClassVar

from reverie.formats._adapters import representative_dataset
from reverie.formats._arrays import Arrays


@dataclass(frozen=True, kw_only=True)
class Mct(Arrays):
    """Has the settings of all arrays."""

    adapter: ClassVar = staticmethod(representative_dataset)


METHOD = Mct
