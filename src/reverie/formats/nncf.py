"""NNCF, which quantizes for OpenVINO: an `nncf.Dataset` of network inputs, float32 NCHW.

    from calibration import dataset, inputs
    nncf.quantize(openvino.convert_model("net.onnx"), dataset(inputs), subset_size=len(inputs))

NNCF looks at the first 300 items unless told otherwise.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from reverie.formats._arrays import Arrays


def dataset(inputs: Float[np.ndarray, "count _ _ _"], *, batch: int = 1) -> Any:
    """An `nncf.Dataset` whose items are batches.

    Args:
        inputs: As the network takes them.
        batch: Images in an item; NNCF's bias correction wants 1.
    """
    import nncf

    return nncf.Dataset([inputs[start : start + batch] for start in range(0, len(inputs), batch)])


@dataclass(frozen=True, kw_only=True)
class Nncf(Arrays):
    """Has the settings of all arrays."""

    adapter: ClassVar = staticmethod(dataset)
    library: ClassVar = "nncf"


METHOD = Nncf
