"""torchao's PT2E: the calibration loop between `prepare_pt2e` and `convert_pt2e`, on network inputs, float32 NCHW.

from calibration import forward_pass, inputs
prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
forward_pass(inputs)(prepared)
quantized = convert_pt2e(prepared)
"""

from dataclasses import dataclass
from typing import ClassVar

from reverie.formats._adapters import forward_pass
from reverie.formats._arrays import Arrays


@dataclass(frozen=True, kw_only=True)
class TorchAO(Arrays):
    """Has the settings of all arrays."""

    adapter: ClassVar = staticmethod(forward_pass)


METHOD = TorchAO
