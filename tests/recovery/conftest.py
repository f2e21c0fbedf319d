"""The trained small network as these tests take it: captured and folded."""

from collections.abc import Callable

import pytest
from torch import fx

from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.models import Network


@pytest.fixture(scope="module")
def teacher(tiny_cnn: Callable[[], Network]) -> fx.GraphModule:
    """Full precision, batch norms folded."""
    network = tiny_cnn()
    return fold_batch_norms(capture(network.module, network.input.shape))
