"""Patches times weights are what the layer answers, whatever its strides, paddings and groups."""

import pytest
import torch
from torch import nn

from reverie.graph.capture import capture
from reverie.graph.operators import layers
from reverie.graph.patches import answers, patches, position_count

CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), (4, 9, 7)),
    "padded, strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 7)),
    "each way different": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (4, 9, 7)),
    "same, even kernel, dilated": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 1)), (4, 9, 7)),
    "valid": (nn.Conv2d(4, 6, 2, padding="valid"), (4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 5)),
    "depthwise, two channels of each": (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (4, 6, 5)),
    "one dimension": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
    "one dimension, same": (nn.Conv1d(4, 6, 4, padding="same"), (4, 11)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear over tokens": (nn.Linear(5, 3), (7, 5)),
}


@pytest.mark.parametrize("picked", [None, [3, 0, 3]], ids=["everywhere", "some positions"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_patches_times_the_weight_are_the_layers_answers(kind, picked):
    module, shape = CONVOLUTIONS[kind]
    graph = capture(nn.Sequential(module), shape)
    (layer,) = layers(graph)
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = module(inputs)
    everywhere = position_count(layer, outputs)
    positions = torch.arange(everywhere) if picked is None else torch.tensor(picked) % everywhere
    x = patches(layer, inputs, tuple(module.weight.shape[2:]), positions)
    y = answers(layer, outputs, x.shape[1], positions)
    assert x.shape[1] == getattr(module, "groups", 1)
    made = module.weight.detach().reshape(x.shape[1], -1, x.shape[2]) @ x
    if module.bias is not None:
        made = made + module.bias.detach().view(1, x.shape[1], -1, 1)
    torch.testing.assert_close(made, y)
    channel_last = outputs if isinstance(module, nn.Linear) else outputs.movedim(1, -1)
    torch.testing.assert_close(y.flatten(1, 2).mT, channel_last.reshape(3, everywhere, -1)[:, positions])
