"""Statistics at batch-norm inputs: the ones training would have recorded, with the gradients of the plain formula."""

import copy

import pytest
import torch
from torch import nn

from reverie.graph.batch_norm import Observed, batch_norms, normalize_and_observe
from reverie.graph.capture import capture

# Float32 sums of a few hundred values.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)
    )
    module.append(nn.BatchNorm1d(5))
    for part in module:
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.fixture
def inputs():
    return torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def seen_by_batch_norms(network, inputs):
    """What each batch norm receives in evaluation mode, by running the modules one after another."""
    seen = []
    with torch.no_grad():
        for part in network:
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                seen.append(inputs)
            inputs = part(inputs)
    return seen


def test_batch_norms_are_listed_with_what_they_remember(network):
    found = batch_norms(capture(network, (3, 8, 8)))
    assert [(norm.name, norm.tensor) for norm in found] == [
        ("_1_batch_norm", "_0"),
        ("_4_batch_norm", "_3"),
        ("_7_batch_norm", "_6"),
    ]
    for norm, part in zip(found, (network[1], network[4], network[7]), strict=True):
        assert torch.equal(norm.mean, part.running_mean)
        assert torch.equal(norm.variance, part.running_var)


def test_batch_statistics_are_those_that_training_mode_would_record(network, inputs):
    logits, statistics = Observed(capture(network, (3, 8, 8)))(inputs)
    torch.testing.assert_close(logits, network(inputs), **CLOSE)
    for x, mean, variance in zip(seen_by_batch_norms(network, inputs), statistics.mean, statistics.variance, strict=True):
        recording = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(x.shape[1], momentum=1.0)
        recording(x)
        count = x.numel() // x.shape[1]
        torch.testing.assert_close(mean, recording.running_mean, **CLOSE)
        # A batch norm remembers the unbiased variance.
        torch.testing.assert_close(variance, recording.running_var * (count - 1) / count, **CLOSE)


def test_sample_statistics_are_those_of_every_image_alone(network, inputs):
    logits, statistics = Observed(capture(network, (3, 8, 8)), level="sample")(inputs)
    torch.testing.assert_close(logits, network(inputs), **CLOSE)
    for x, mean, variance in zip(seen_by_batch_norms(network, inputs), statistics.mean, statistics.variance, strict=True):
        positions = x.flatten(2) if x.dim() == 4 else x.unsqueeze(2)
        torch.testing.assert_close(mean, positions.mean(2), **CLOSE)
        torch.testing.assert_close(variance, positions.var(2, correction=0), **CLOSE)


def test_a_batch_norm_that_ends_the_network_still_gives_the_logits(inputs):
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)).eval()
    logits, statistics = Observed(capture(module, (3, 8, 8)))(inputs)
    torch.testing.assert_close(logits, module(inputs), **CLOSE)
    assert len(statistics.mean) == 1


def plain(x, mean, variance, weight, bias, epsilon, per_sample):
    """The same by the formula of the module docstring."""
    over = [axis for axis in range(x.dim()) if axis >= 2 or (axis == 0 and not per_sample)]
    if not over:
        observed = x, x - x.detach() - (x - x.detach())
    else:
        center = x.mean(over, keepdim=True)
        observed = x.mean(over), (x - center).square().mean(over)
    return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=epsilon), *observed


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 2, 4), (5, 2)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradients_equal_those_of_the_plain_formula(shape, per_sample, affine):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    mean, variance = torch.randn(2, dtype=torch.double), torch.rand(2, dtype=torch.double) + 0.5
    weight, bias = (torch.randn(2, dtype=torch.double) for _ in range(2)) if affine else (None, None)
    rest = (mean, variance, weight, bias, 1e-5, per_sample)
    assert torch.autograd.gradcheck(lambda x: normalize_and_observe(x, *rest), (x,))
    ours, theirs = normalize_and_observe(x, *rest), plain(x, *rest)
    cotangents = [torch.randn_like(part) for part in ours]
    for part, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(part, other)
    # Each output alone, then all together: the backward pass skips what nobody asked for.
    for chosen in ([0], [1], [2], [0, 1, 2]):
        (gradient,) = torch.autograd.grad([ours[i] for i in chosen], x, [cotangents[i] for i in chosen], retain_graph=True)
        (expected,) = torch.autograd.grad([theirs[i] for i in chosen], x, [cotangents[i] for i in chosen], retain_graph=True)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_observing_leaves_the_teacher_alone_and_shares_its_weights(network, inputs, level):
    graph = capture(network, (3, 8, 8))
    nodes = [(node.name, node.target) for node in graph.graph.nodes]
    kept = copy.deepcopy(graph.state_dict())
    observed = Observed(graph, level)
    pixels = inputs.clone().requires_grad_()
    logits, statistics = observed(pixels)
    (logits.sum() + sum(part.sum() for part in statistics.mean + statistics.variance)).backward()
    assert bool((pixels.grad != 0).any())
    assert [(node.name, node.target) for node in graph.graph.nodes] == nodes
    assert all(torch.equal(value, kept[key]) for key, value in graph.state_dict().items())
    assert not graph.training
    shared = {tensor.data_ptr() for tensor in graph.buffers()}
    assert {tensor.data_ptr() for tensor in observed.buffers()} <= shared
