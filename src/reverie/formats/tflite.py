"""TensorFlow Lite's converter: a `representative_dataset` of network inputs, float32 NHWC, one image at a time.

    from calibration import inputs, representative_dataset
    converter.representative_dataset = representative_dataset(inputs)

A Keras network that normalizes by itself takes "pixels" or "levels" (`units`). Not here: networks that were converted from
PyTorch with their channels first; `onnxruntime` and `mct` have arrays in that order.
"""

from dataclasses import dataclass
from typing import ClassVar

from reverie.formats._adapters import representative_dataset
from reverie.formats._arrays import Arrays


@dataclass(frozen=True, kw_only=True)
class TfLite(Arrays):
    """Has the settings of all arrays."""

    adapter: ClassVar = staticmethod(representative_dataset)
    channels_last: ClassVar = True


METHOD = TfLite
