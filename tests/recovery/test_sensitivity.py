"""The estimate of what quantizing one tensor costs, against quantizing it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from reverie.errors import ModelError
from reverie.graph.capture import capture
from reverie.graph.placement import place
from reverie.observers import rows, tensor_qparams, weight_qparams
from reverie.observers.minmax import MinMax
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.bias_correction import correct_biases
from reverie.recovery.sensitivity import measure

WIDTHS = (3, 4, 5, 6, 8)


def sensitivity(teacher, inputs, widths=WIDTHS, **settings):
    student = place(teacher, "integer", weight_bits=8, activation_bits=8)
    given = {"images": len(inputs), "probes": 8, "seed": Seed(0)} | settings
    found = measure(teacher, student, inputs, widths, activations=MinMax(), weights=MinMax(), progress=Silent(), **given)
    return {(part.kind, part.name): part for part in found}


def divergence(teacher, student, inputs):
    ours, known = (functional.log_softmax(graph(inputs), dim=1) for graph in (student.graph, teacher))
    return float(functional.kl_div(ours, known, reduction="batchmean", log_target=True))


@torch.no_grad()
def truth(teacher, inputs, kind, name, bits):
    """The divergence of a student in which nothing else is on a grid."""
    student = place(teacher, "integer", weight_bits=bits, activation_bits=bits)
    if kind == "weight":
        quantizer = student.weights[name]
        weight = student.graph.get_buffer(student.layers[name].weight)
        quantizer.set_qparams(*weight_qparams(weight, MinMax(), quantizer.grid, symmetric=True))
        correct_biases(teacher, student, inputs, progress=Silent())
    else:
        kept = {}

        class Keeping(torch.fx.Interpreter):
            def run_node(self, n):
                kept[n.name] = super().run_node(n)
                return kept[n.name]

        Keeping(teacher).run(inputs)
        watch, quantizer = MinMax().watch(), student.activations[name]
        watch.update(rows(kept[name]))
        quantizer.set_qparams(*tensor_qparams(watch, quantizer.grid))
    return divergence(teacher, student, inputs)


@pytest.fixture(scope="module")
def inputs(tiny_cnn):
    return tiny_cnn().held_out().inputs[:64]


def test_on_a_trained_network_it_orders_tensors_and_widths_as_quantizing_each_does(teacher, inputs):
    found = sensitivity(teacher, inputs)
    pairs = [
        (part.divergence[bits], truth(teacher, inputs, kind, name, bits))
        for (kind, name), part in found.items()
        for bits in WIDTHS
    ]
    estimates, truths = torch.tensor(pairs, dtype=torch.float64).log().T
    places = torch.stack([estimates.argsort().argsort(), truths.argsort().argsort()]).double()
    assert float(torch.corrcoef(places)[0, 1]) > 0.95
    # And of the same size, where it is small.
    small = truths < -5
    assert small.sum() > 10
    assert float((estimates - truths)[small].abs().median()) < 0.3


def test_of_a_linear_network_it_is_the_quadratic_form_itself():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    teacher = capture(module.eval(), (6,))
    inputs = torch.randn(40, 6)
    found = sensitivity(teacher, inputs, widths=(4,), probes=2000)
    with torch.no_grad():
        shares = teacher(inputs).softmax(dim=1)
        form = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]
        first = module[0].weight
        student = place(teacher, "integer", weight_bits=4, activation_bits=4)
        name, quantizer = next(iter(student.weights.items()))
        quantizer.set_qparams(*weight_qparams(first, MinMax(), quantizer.grid, symmetric=True))
        moved = inputs @ (quantizer(first) - first).T
        moved = (moved - moved.mean(dim=0)) @ module[1].weight.T
        expected = float(torch.einsum("ni,nij,nj->n", moved, form, moved).mean()) / 2
    assert found["weight", name].divergence[4] == pytest.approx(expected, rel=0.05)


def test_elements_are_those_of_the_weight_and_of_the_tensor_of_one_image(teacher, inputs):
    found = sensitivity(teacher, inputs, widths=(4,))
    assert {part.elements for (kind, _), part in found.items() if kind == "weight"} == {216, 1152, 2304, 48}
    activations = [part.elements for (kind, _), part in found.items() if kind == "activation"]
    assert activations[:3] == [768, 2048, 1024]


def test_it_is_the_same_every_time_and_leaves_everything_as_it_was(teacher, inputs):
    before, images = {name: value.clone() for name, value in teacher.state_dict().items()}, inputs.clone()
    assert sensitivity(teacher, inputs, images=20) == sensitivity(teacher, inputs, images=20)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(inputs, images) and not inputs.requires_grad


def test_values_that_are_not_finite_are_refused(teacher, inputs):
    broken = inputs.clone()
    broken[0, 0, 0, 0] = torch.inf
    with pytest.raises(
        ModelError, match=r"^input_1: values must be finite on every image, got a range that is not; check the weights"
    ):
        sensitivity(teacher, broken)
