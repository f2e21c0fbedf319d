"""Quantizers while the network around them learns: scales that are learned, ranges that follow, and what settles."""

from functools import partial

import pytest
import torch

from reverie.graph.quantizers import ActivationQuantizer, BiasQuantizer, Dropping, WeightQuantizer
from reverie.grid import Grid, fake_quantize
from reverie.observers import weight_qparams
from reverie.observers.minmax import MinMax


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activation():
    quantizer = ActivationQuantizer(Grid(4, signed=False))
    quantizer.set_qparams(torch.tensor(0.2), torch.tensor(3, dtype=torch.int32))
    return quantizer


def ends(weight, symmetric=True):
    return weight_qparams(weight, MinMax(), Grid(3), symmetric=symmetric)


def weight_quantizer(weight):
    quantizer = WeightQuantizer(Grid(3), weight)
    quantizer.set_qparams(*ends(weight))
    return quantizer


def parts():
    """Each kind of quantizer with a tensor for it, and how it is settled."""
    source, weight = activation(), normals(4, 3, 2, 2)
    layer = weight_quantizer(weight)
    return {"activation": (source, normals(5, 6), source.settle), "weight": (layer, weight, lambda: layer.settle(weight))}


KINDS = ["activation", "weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_learning_a_scale_begins_where_the_scale_is(kind):
    quantizer, x, _ = parts()[kind]
    before = quantizer(x)
    parameter = quantizer.learn_scale()
    assert parameter.shape == quantizer.scale.shape
    assert parameter.requires_grad
    assert list(quantizer.parameters()) == [parameter]
    assert torch.equal(quantizer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_learned_scale_is_relative_to_the_scale(kind):
    quantizer, x, _ = parts()[kind]
    parameter = quantizer.learn_scale()
    quantizer(x).square().sum().backward()
    scale = quantizer.scale.clone().requires_grad_()
    fake_quantize(x, scale, quantizer.zero_point, quantizer.grid).square().sum().backward()
    torch.testing.assert_close(parameter.grad, scale.grad * scale.detach())
    assert not quantizer.scale.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_settled_scale_is_what_was_learned_to_the_bit(kind):
    quantizer, x, settle = parts()[kind]
    scale, zero_point = quantizer.scale.clone(), quantizer.zero_point.clone()
    parameter = quantizer.learn_scale()
    with torch.no_grad():
        parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view(parameter.shape))
    learned = quantizer(x).detach()
    assert torch.equal(quantizer.scale, scale)
    settle()
    assert torch.equal(quantizer.scale, scale * parameter.detach().exp())
    assert torch.equal(quantizer.zero_point, zero_point)
    assert torch.equal(quantizer(x), learned)
    assert quantizer.log_gain is None
    assert not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}
    # There is nothing left to settle.
    settle()
    assert torch.equal(quantizer(x), learned)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_can_be_learned_again(kind):
    quantizer, _, settle = parts()[kind]
    scale = quantizer.scale.clone()
    for _ in range(2):
        quantizer.learn_scale().data.fill_(1.0)
        settle()
    torch.testing.assert_close(quantizer.scale, scale * torch.tensor(2.0).exp())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_that_follows_is_that_of_the_weight_at_each_call(symmetric):
    weight = normals(4, 3, 2, 2)
    quantizer = weight_quantizer(weight)
    quantizer.follow(partial(ends, symmetric=symmetric))
    for factor in (1.0, 3.0, 0.5):
        moved = (factor * weight + 0.1).requires_grad_()
        value = quantizer(moved)
        scale, zero_point = ends(moved, symmetric)
        assert torch.equal(quantizer.scale, scale)
        assert torch.equal(quantizer.zero_point, zero_point)
        assert torch.equal(value, fake_quantize(moved, scale, zero_point, quantizer.grid))
        value.sum().backward()
        # Nothing is clipped but what rounding at the ends puts outside, and the range itself carries no gradient.
        assert set(moved.grad.unique().tolist()) <= {0.0, 1.0}
        assert moved.grad.mean() > 0.8
        assert not quantizer.scale.requires_grad


def test_a_range_that_followed_settles_on_the_last_weight_and_stays_there():
    weight = normals(4, 3, 2, 2)
    quantizer = weight_quantizer(weight)
    quantizer.follow(ends)
    quantizer(weight)
    quantizer.settle(2 * weight)
    scale, _ = ends(2 * weight)
    quantizer(5 * weight)
    assert torch.equal(quantizer.scale, scale)


def test_settling_a_fixed_range_changes_nothing():
    weight = normals(4, 3, 2, 2)
    quantizer = weight_quantizer(weight)
    scale = quantizer.scale.clone()
    quantizer.settle(5 * weight)
    assert torch.equal(quantizer.scale, scale)


def test_codes_once_set_are_the_answer_whatever_the_weight():
    weight = normals(4, 3, 2, 2)
    quantizer = weight_quantizer(weight)
    before = quantizer(weight)
    quantizer.set_codes(quantizer.final_codes(weight).float())
    quantizer.follow(ends)
    scale = quantizer.scale.clone()
    assert torch.equal(quantizer(5 * weight), before)
    assert torch.equal(quantizer.scale, scale)


def test_a_bias_is_put_on_the_grid_of_the_scales_as_they_are_learned():
    weight, bias = normals(4, 3, 2, 2), normals(4, seed=1).requires_grad_()
    source, layer = activation(), weight_quantizer(weight)
    quantizer = BiasQuantizer(source, layer)
    step = source.scale * layer.scale.flatten()
    assert torch.equal(quantizer(bias), bias + (torch.round(bias / step) * step - bias))
    gains = source.learn_scale(), layer.learn_scale()
    for gain in gains:
        gain.data.fill_(0.3)
    learned = quantizer(bias)
    torch.testing.assert_close(quantizer.scale(), step * torch.tensor(0.6).exp())
    learned.sum().backward()
    # Straight through to the bias, nothing to the scales.
    assert torch.equal(bias.grad, torch.ones(4))
    assert gains[0].grad is None and gains[1].grad is None
    source.settle()
    layer.settle(weight)
    assert torch.equal(quantizer(bias), learned)
    assert torch.equal(quantizer.final_codes(bias), torch.round(bias / quantizer.scale()).to(torch.int32))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_so_many_values_pass_unquantized_and_all_are_quantized_once_it_is_settled(share):
    quantizer, x = activation(), normals(100, 100)
    levels = quantizer(x)
    quantizer.drop(Dropping(share, torch.Generator().manual_seed(0)))
    first, second = quantizer(x), quantizer(x)
    assert bool(((first == x) | (first == levels)).all())
    assert (first == x).float().mean().item() == pytest.approx(share, abs=0.02)
    assert not torch.equal(first, second)
    quantizer.settle()
    assert torch.equal(quantizer(x), levels)


def test_the_gradient_goes_where_each_value_came_from():
    first, second = (normals(6, 7, seed=seed).requires_grad_() for seed in (0, 1))
    out = Dropping(0.5, torch.Generator().manual_seed(0)).mix(first, second)
    out.sum().backward()
    taken = out == first
    assert torch.equal(first.grad, taken.float())
    assert torch.equal(second.grad, 1 - taken.float())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_with_values_dropped_are_those_of_the_written_out_mixture(layout):
    def answer(written_out):
        quantizer, x = activation(), normals(4, 3, 5, 6).contiguous(memory_format=layout).requires_grad_()
        gain = quantizer.learn_scale()
        if written_out:
            keep = Dropping(0.5, torch.Generator().manual_seed(1)).keep(x)
            out = x * (1 - keep) + quantizer(x) * keep
        else:
            quantizer.drop(Dropping(0.5, torch.Generator().manual_seed(1)))
            out = quantizer(x)
        (out * normals(4, 3, 5, 6, seed=2)).sum().backward()
        return out.detach(), x.grad, gain.grad

    for ours, theirs in zip(answer(False), answer(True), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_dropped_differs_from_call_to_call_and_lies_in_memory_as_the_values_do():
    dropping, values = (
        Dropping(0.3, torch.Generator().manual_seed(0)),
        normals(8, 4, 16, 16).contiguous(memory_format=torch.channels_last),
    )
    first, second = dropping.keep(values), dropping.keep(values)
    assert first.stride() == values.stride()
    # Independent draws agree where both keep (0.49) or both drop (0.09).
    assert (first == second).float().mean().item() == pytest.approx(0.58, abs=0.02)
    assert first.mean().item() == pytest.approx(0.7, abs=0.02)


def test_the_scale_of_codes_and_of_a_rounder_is_learned_with_them():
    weight = normals(4, 3, 2, 2)
    quantizer = weight_quantizer(weight)
    gain = quantizer.learn_scale()
    with torch.no_grad():
        gain.fill_(0.1)
    quantizer.set_codes(quantizer.final_codes(weight).float())
    out = quantizer(weight)
    torch.testing.assert_close(out, quantizer.codes * quantizer.scale * torch.tensor(0.1).exp())
    out.sum().backward()
    torch.testing.assert_close(gain.grad, out.detach().sum((1, 2, 3), keepdim=True))
