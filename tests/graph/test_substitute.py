"""What a graph answers with another value somewhere is what the changed network answers."""

import copy

import torch
from torch import nn

from reverie.graph.capture import capture
from reverie.graph.substitute import answers_with


class Branching(nn.Module):
    """A shortcut, a tensor read twice and one that nobody reads again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x).relu()
        x = (self.second(x) + self.shortcut(x)).relu()
        return self.head(x.mean((2, 3)))


def test_each_answer_is_that_of_the_network_with_the_value_in_its_place():
    module = Branching().eval()
    graph = capture(module, (2, 6, 6))
    inputs = torch.randn(3, 2, 6, 6)
    layers = ("first", "second", "shortcut", "head")

    def doubled(node, values):
        return 2 * values[node]

    steps = []
    answer, answers = answers_with(graph, inputs, [(name, doubled) for name in layers], lambda: steps.append(1))
    assert torch.equal(answer, graph(inputs))
    assert len(steps) == len(answers) == 4
    for name, found in zip(layers, answers, strict=True):
        changed = copy.deepcopy(module)
        for parameter in getattr(changed, name).parameters():
            parameter.data.mul_(2)
        torch.testing.assert_close(found, changed(inputs).detach())


def test_a_node_may_be_asked_about_twice_and_its_sources_are_at_hand():
    module = Branching().eval()
    graph = capture(module, (2, 6, 6))
    inputs = torch.randn(3, 2, 6, 6)

    def without_bias(node, values):
        args = [values[source] for source in node.all_input_nodes[:2]]
        return nn.functional.conv2d(*args, padding=1)

    before = graph(inputs)
    _, (same, changed) = answers_with(graph, inputs, [("second", lambda node, values: values[node]), ("second", without_bias)])
    assert torch.equal(same, before)
    module.second.bias.data.zero_()
    torch.testing.assert_close(changed, module(inputs).detach())
    assert torch.equal(graph(inputs), before)
