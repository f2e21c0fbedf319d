"""Each planted fault is found in the tensor where it was planted, and a healthy network has none."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.conftest import TINY_CLASSES, TINY_INPUT, patterns
from torch import nn

from reverie import remedies, stages
from reverie.models import Network
from reverie.progress import Silent
from reverie.recipes import read
from reverie.report import diagnosis
from reverie.report.tensor_errors import Errors, TensorError, measure

CHANNEL = 5


def network_of(module):
    return Network(name="planted", module=module.eval(), input=TINY_INPUT, classes=TINY_CLASSES)


def plant_channel_(module):
    """One channel 1,000 times as large, and the layer behind it 1,000 times as small there."""
    with torch.no_grad():
        for parameter in (module[4].weight, module[4].bias):
            parameter[CHANNEL] *= 1000
        module[6].weight[:, CHANNEL] /= 1000
    return module


class Concatenation(nn.Module):
    """The tiny CNN with its second layer in halves, the first 100 times as large and made up for behind."""

    def __init__(self, module):
        super().__init__()
        self.head, self.tail = module[:3], module[6:]
        self.large, self.small = (copy.deepcopy(module[3:5]) for _ in range(2))
        with torch.no_grad():
            for part, half in ((self.large, slice(0, 8)), (self.small, slice(8, 16))):
                part[0].weight = nn.Parameter(part[0].weight[half])
                part[1].weight, part[1].bias = (nn.Parameter(each[half].clone()) for each in (part[1].weight, part[1].bias))
                part[1].running_mean, part[1].running_var = part[1].running_mean[half], part[1].running_var[half]
            self.large[1].weight *= 100
            self.large[1].bias *= 100
            self.tail[0].weight[:, :8] /= 100

    def forward(self, x):
        x = self.head(x)
        return self.tail(torch.cat([self.large(x).relu(), self.small(x).relu()], dim=1))


def diagnosed(module, images, recipe, spoil=lambda quantized: None):
    """What is found, as (fault, kind, tensor), and the findings."""
    teacher = stages.as_teacher(network_of(module))
    reference, quantized = remedies.calibrated(recipe, teacher, images, Silent())
    spoil(quantized)
    errors = measure(reference, quantized, images.evenly(64).inputs, progress=Silent())
    findings = diagnosis.find(errors, reference, recipe)
    return {(finding.fault, finding.kind, finding.tensor) for finding in findings}, findings


@pytest.fixture(scope="module")
def images():
    return patterns(128, seed=2)


def test_a_healthy_network_has_no_faults(tiny_cnn, images):
    assert diagnosed(tiny_cnn().module, images, read("zeroq"))[1] == []


def test_an_outlier_channel_is_found_and_equalization_named(tiny_cnn, images):
    found, findings = diagnosed(plant_channel_(tiny_cnn().module), images, read("zeroq"))
    assert ("outlier channel", "activation", "_5_relu") in found
    (finding,) = [finding for finding in findings if finding.tensor == "_5_relu"]
    assert finding.cause.startswith(f"channel {CHANNEL} is ")
    assert finding.settings == ("quantization.equalize=true",)
    assert finding is findings[0]


def test_an_outlier_value_is_found_and_a_percentile_named(tiny_cnn, images):
    spoiled = images.inputs.clone()
    spoiled[0, 0, 3, 3] = 300.0
    recipe = read("zeroq", {"activations.method": "minmax"})
    found, findings = diagnosed(tiny_cnn().module, replace(images, inputs=spoiled), recipe)
    assert ("outliers", "activation", "input_1") in found
    (finding,) = [finding for finding in findings if finding.tensor == "input_1"]
    assert finding.settings == ("activations.method=percentile", "activations.percentile=99.9")


def test_unbalanced_operands_of_a_concatenation_are_found(tiny_cnn, images):
    found, findings = diagnosed(Concatenation(tiny_cnn().module), images, read("zeroq"))
    assert ("unbalanced operands", "activation", "cat") in found
    (finding,) = [finding for finding in findings if finding.tensor == "cat"]
    assert finding.cause.startswith("relu_4 is ") and " times as large as relu_5, which is 0." in finding.cause


def test_a_saturated_range_is_found(tiny_cnn, images):
    def spoil(quantized):
        quantized.activations["_5_relu"].scale.div_(8)

    found, findings = diagnosed(tiny_cnn().module, images, read("zeroq"), spoil)
    assert found == {("saturation", "activation", "_5_relu")}
    assert findings[0].settings == ("activations.method=minmax",)


def test_a_dead_grid_is_found(tiny_cnn, images):
    def spoil(quantized):
        quantized.activations["_5_relu"].scale.mul_(64)

    found, findings = diagnosed(tiny_cnn().module, images, read("zeroq"), spoil)
    assert found == {("dead grid", "activation", "_5_relu")}
    assert "of 256 codes are used" in findings[0].cause


def test_ranges_of_a_weight_that_are_too_wide_are_found(tiny_cnn, images):
    recipe = read("zeroq", {"weights.method": "minmax"})
    module = tiny_cnn().module
    with torch.no_grad():
        # One weight of each channel that the network hardly feels, for its input is next to nothing.
        module[3].weight[:, 0, 0, 0] = 30.0
        module[1].weight[0], module[1].bias[0] = 1e-4, -1e-5
    found, findings = diagnosed(module, images, recipe)
    assert any(name == "_3" and kind == "weight" and fault in ("outliers", "outlier channel") for fault, kind, name in found)
    assert findings


def told(tiny_cnn, overrides, **facts):
    """What is found in a tensor of which this was measured, beside a healthy one."""
    given = {
        "name": "_5_relu",
        "kind": "activation",
        "bits": 4,
        "alone": 0.1,
        "without": 0.3,
        "sqnr": 15.0,
        "student_sqnr": 14.0,
    }
    shared = {"clipped": 0.0, "clipping": 0.0, "codes": 16}
    healthy = TensorError(**given | shared | {"name": "_2_relu", "alone": 1e-5})
    errors = Errors((healthy, TensorError(**given | shared | facts)), 0.4, 0.9, 64)
    recipe = read("zeroq", {"quantization.activation_bits": 4, "quantization.weight_bits": 4} | overrides)
    reference, _ = stages.student_of(stages.as_teacher(tiny_cnn()).graph, recipe.quantization)
    return diagnosis.find(errors, reference, recipe)


WEIGHT = {"kind": "weight", "name": "_6"}
SATURATED = {"clipped": 0.02, "clipping": 0.9}
OUTLYING = {"bulk": 0.1}
CHANNEL_WISE = {"channel": 5, "channel_ratio": 40.0}


@pytest.mark.parametrize(
    ("overrides", "facts", "fault", "settings"),
    [
        ({}, {}, "few bits", ("bits.activations={_5_relu=8}",)),
        ({"quantization.activation_bits": 2}, {"bits": 2}, "few bits", ("bits.activations={_5_relu=4}",)),
        ({"quantization.end_bits": 6}, {"bits": 6}, "few bits", ("bits.activations={_5_relu=8}",)),
        ({"bits.activations": {"_2_relu": 6}}, {}, "few bits", ("bits.activations={_2_relu=6,_5_relu=8}",)),
        ({}, WEIGHT, "few bits", ("rounding.method=adaround",)),
        ({"rounding.method": "adaround"}, WEIGHT, "few bits", ("bits.weights={_6=8}",)),
        ({}, SATURATED, "saturation", ("activations.method=minmax",)),
        ({"activations.percentile": 99.0}, SATURATED, "saturation", ("activations.percentile=99.99",)),
        ({"activations.method": "minmax"}, SATURATED, "saturation", ("images=128",)),
        ({}, WEIGHT | SATURATED, "saturation", ("weights.method=minmax",)),
        ({}, OUTLYING, "outliers", ("activations.method=percentile", "activations.percentile=99.9")),
        ({"activations.percentile": 99.9}, OUTLYING, "outliers", ("activations.method=mse",)),
        ({"clipping.images": 8}, OUTLYING, "outliers", ("clipping.images=0",)),
        (
            {"weights.method": "minmax"},
            WEIGHT | {"narrower": 0.5, "narrower_gain": 4.0},
            "outliers",
            ("weights.method=mse",),
        ),
        ({}, CHANNEL_WISE, "outlier channel", ("quantization.equalize=true",)),
        ({}, WEIGHT | CHANNEL_WISE, "outlier channel", ("quantization.equalize=true",)),
        ({"quantization.equalize": True}, CHANNEL_WISE, "outlier channel", ("bits.activations={_5_relu=8}",)),
        ({"quantization.placement": "literature"}, CHANNEL_WISE, "outlier channel", ("bits.activations={_5_relu=8}",)),
    ],
)
def test_a_cure_is_what_the_recipe_does_not_do_yet(tiny_cnn, overrides, facts, fault, settings):
    (finding,) = told(tiny_cnn, overrides, **facts)
    assert (finding.fault, finding.settings) == (fault, settings)


@pytest.mark.parametrize(
    "facts",
    [
        {"alone": 1e-6, **OUTLYING},
        {"alone": 5e-3},
        {"bulk": 0.26, "filled": 0.26, "channel": 3, "channel_ratio": 9.9, "clipped": 0.004, "clipping": 1.0, "alone": 5e-3},
        {"operands": ("a", "b"), "operand_ratio": 50.0, "operand_steps": 2.1, "alone": 5e-3},
    ],
)
def test_what_costs_nothing_or_is_within_bounds_is_no_finding(tiny_cnn, facts):
    assert told(tiny_cnn, {}, **facts) == []


def test_eight_bits_cannot_be_more(tiny_cnn):
    (finding,) = told(tiny_cnn, {"quantization.activation_bits": 8}, bits=8)
    assert finding.settings == ()
    assert finding.cure == "it has 8 bits already; keep this layer in full precision outside of the network"
