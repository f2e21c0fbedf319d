"""`models.load`: from a name to a network, and the one-line errors of every name that leads nowhere."""

import subprocess
import sys

import pytest
import torch

from reverie import models
from reverie.errors import ConfigError, ModelError
from reverie.models import Network


@torch.no_grad()
def accuracy(network: Network) -> float:
    assert network.held_out is not None
    images = network.held_out()
    return float((network.module(images.inputs).argmax(1) == images.labels).float().mean())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet18",
            "a network must be SOURCE:NAME with SOURCE one of embedded, onnx, package, timm, torchvision, "
            "or path/to/file.py:FACTORY, got 'resnet18'; did you mean 'timm:resnet18'?",
        ),
        (
            "embeded:digits",
            "unknown network source 'embeded'; choose one of embedded, onnx, package, timm, torchvision, or did you mean 'embedded'?",
        ),
        ("embedded:digit", "unknown embedded network 'digit'; choose one of digits, or did you mean 'digits'?"),
        (
            "package:mobilenet",
            "unknown package network 'mobilenet'; choose one of efficientnet_lite0, efficientnet_lite1, "
            "efficientnet_lite2, mobilenet_v2, or did you mean 'mobilenet_v2'?",
        ),
        ("net.py", "net.py: input_size, mean, std, classes must be given, got nothing; its file does not say them"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, message):
    with pytest.raises(ConfigError) as caught:
        models.load(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedded:digits", "embedded:digits: got the option 'weights'; it takes no options"),
        ("timm:resnet18", "timm:resnet18: got the option 'weights'; it takes pretrained"),
    ],
)
def test_an_option_that_the_source_does_not_take_is_refused(name, message):
    with pytest.raises(ConfigError) as caught:
        models.load(name, weights="net.pth")
    assert str(caught.value) == message


def test_weights_that_are_not_finite_are_refused(tiny_cnn):
    network = tiny_cnn()
    network.module[3].weight.data[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(ModelError) as caught:
        network.check_weights()
    assert str(caught.value) == (
        "tiny: weights must be finite, got 2 NaN or infinite values in '3.weight'; "
        "use a checkpoint from before the training diverged"
    )


def test_importing_the_sources_imports_none_of_their_libraries():
    program = (
        "import sys, reverie.models, reverie.models.embedded, reverie.models.timm, reverie.models.torchvision, "
        "reverie.models.package, reverie.models.file, reverie.models.onnx\n"
        "print(*{'timm', 'torchvision', 'sklearn', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "", "")


def test_the_tiny_cnn_has_learned_and_copies_are_independent(tiny_cnn):
    first, second = tiny_cnn(), tiny_cnn()
    first.module[0].weight.data.zero_()
    assert accuracy(second) > 0.95
    assert not second.module.training
    assert first.fingerprint != second.fingerprint
