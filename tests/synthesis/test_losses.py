"""Terms of the losses against computations of their own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from reverie.graph.batch_norm import Observed, Statistics, batch_norms
from reverie.graph.capture import capture
from reverie.synthesis._losses import deep_layers, pooled, running, statistics_distance


@pytest.fixture(scope="module")
def network(tiny_cnn):
    return tiny_cnn()


@pytest.fixture(scope="module")
def graph(network):
    return capture(network.module, network.input.shape)


@pytest.fixture
def inputs():
    return torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def read_by_hooks(module, inputs):
    """Every `nn.BatchNorm2d` with its input, in the order in which they run."""
    seen = []
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda norm, given, _: seen.append((norm, given[0]))) for norm in norms]
    module(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_batch_norm_statistics_loss_is_the_literatures(network, graph, inputs):
    pixels = inputs.clone().requires_grad_()
    layers = [
        functional.mse_loss(x.mean(dim=(0, 2, 3)), norm.running_mean)
        + functional.mse_loss(x.var(dim=(0, 2, 3), unbiased=False), norm.running_var)
        for norm, x in read_by_hooks(network.module, pixels)
    ]
    expected = sum(layers) / len(layers)
    (slope,) = torch.autograd.grad(expected, pixels)
    ours = statistics_distance(Observed(graph)(pixels)[1], *running(batch_norms(graph)), range(3))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, pixels)[0], slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item())


def test_only_the_layers_asked_for_count(graph, inputs):
    _, statistics = Observed(graph)(inputs)
    targets = running(batch_norms(graph))
    single = [statistics_distance(statistics, *targets, range(layer, layer + 1)) for layer in range(3)]
    torch.testing.assert_close(statistics_distance(statistics, *targets, range(1, 3)), (single[1] + single[2]) / 2)


def test_the_loss_is_zero_at_its_targets_and_its_slope_is_that_of_squares(graph, inputs):
    _, statistics = Observed(graph)(inputs)
    assert statistics_distance(statistics, statistics.mean, statistics.variance, range(3)).item() == 0
    means = [mean + 0.5 for mean in statistics.mean]
    assert statistics_distance(statistics, means, statistics.variance, range(3)).item() == pytest.approx(0.25, rel=1e-4)


def test_what_is_observed_is_what_the_batch_norm_itself_would_remember(network, graph, inputs):
    _, statistics = Observed(graph)(inputs)
    seen = read_by_hooks(network.module, inputs)
    assert len(seen) == len(statistics.mean) == 3
    for (norm, x), mean, variance in zip(seen, statistics.mean, statistics.variance, strict=True):
        own = nn.BatchNorm2d(norm.num_features, momentum=1.0).train()
        own(x.detach())
        positions = x.numel() / x.shape[1]
        torch.testing.assert_close(mean, own.running_mean, rtol=1e-4, atol=1e-5)
        # A batch norm remembers the unbiased variance.
        torch.testing.assert_close(variance, own.running_var * (positions - 1) / positions, rtol=1e-4, atol=1e-6)


def test_statistics_of_samples_pool_to_those_of_their_batch(graph, inputs):
    _, batch = Observed(graph, "batch")(inputs)
    joined = pooled(Observed(graph, "sample")(inputs)[1])
    for ours, theirs in zip((*joined.mean, *joined.variance), (*batch.mean, *batch.variance), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_pooling_by_hand():
    # Two samples, means 0 and 2, variances 1 and 3: mean 1, variance 2 + 1.
    joined = pooled(Statistics((torch.tensor([[0.0], [2.0]]),), (torch.tensor([[1.0], [3.0]]),)))
    assert joined.mean[0].tolist() == [1.0]
    assert joined.variance[0].tolist() == [3.0]


@pytest.mark.parametrize(("count", "start"), [(20, 8), (27, 12), (52, 24), (53, 25)])
def test_deep_layers_of_the_literatures_networks(count, start):
    assert deep_layers(count) == range(start, count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_in_a_tiny_network_nearly_all_layers_are_deep(count):
    assert deep_layers(count) == range(1 if count == 5 else 0, count)
