"""Networks from the caller's own Python file: CIFAR's ResNet-20 for real, and every way such a file can be wrong."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from reverie import models
from reverie.errors import ConfigError, ModelError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR = {"input_size": 32, "classes": 10, **IMAGENET}
SMALL = {"input_size": 8, "mean": (0.5,), "std": (0.5,), "classes": 2}
NETWORK = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear({size}, 2))\n"


@pytest.fixture(scope="module")
def cifar(assets):
    """The module that reads CIFAR-10's mosaics."""
    spec = importlib.util.spec_from_file_location("assets_models", assets / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, text, name="net.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return f"{folder / name}:make"


def refusal(error, name, **options):
    with pytest.raises(error) as caught:
        models.load(name, **(SMALL | options))
    return str(caught.value)


@pytest.mark.slow
def test_resnet20_reads_cifar10_as_well_as_its_authors_measured(assets, cifar):
    weights = assets / "nets" / "cifar10" / "resnet20.pth"
    network = models.load(f"{assets / 'models.py'}:CifarResNet", weights=weights, **CIFAR)
    pixels, labels = cifar.cifar10("test")
    with torch.no_grad():
        right = network.module(network.input.normalize(pixels[:1000].float() / 255)).argmax(1) == labels[:1000]
    # 91.73 % on all 10,000; three standard errors of 1,000 images are 2.6 points.
    assert abs(float(right.float().mean()) - 0.9173) < 0.026


def test_a_network_may_take_raw_pixels(assets, cifar):
    weights = assets / "nets" / "cifar10" / "mlperf_tiny_resnet8.pth"
    options = CIFAR | {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    network = models.load(f"{assets / 'models.py'}:TinyResNet8", weights=weights, **options)
    pixels, labels = cifar.cifar10("test")
    with torch.no_grad():
        right = network.module(network.input.normalize(pixels[:1000].float() / 255)).argmax(1) == labels[:1000]
    assert abs(float(right.float().mean()) - 0.8719) < 0.032


def test_the_weights_of_another_network_are_refused(assets):
    name, weights = f"{assets / 'models.py'}:CifarResNet", assets / "nets" / "cifar10" / "resnet32.pth"
    with pytest.raises(ModelError) as caught:
        models.load(name, weights=weights, **CIFAR)
    assert str(caught.value) == (
        f"{name}: {weights}: weights must fit the architecture, "
        "got an unknown 'layer1.3.conv1.weight' (16, 16, 3, 3) (and 59 more); use the weights of this very network"
    )


def test_the_network_is_in_evaluation_mode_and_has_the_contract_that_was_said(tmp_path):
    network = models.load(write(tmp_path, NETWORK.format(size=96)), **(SMALL | {"input_size": (8, 12)}))
    assert not network.module.training
    assert network.input.shape == (1, 8, 12)
    assert network.classes == 2


def test_the_options_are_kept_so_that_json_can_hold_them_and_the_network_be_loaded_again(tmp_path):
    name, weights = write(tmp_path, NETWORK.format(size=64)), tmp_path / "w.safetensors"
    save_file({"1.weight": torch.ones(2, 64), "1.bias": torch.zeros(2)}, weights)
    network = models.load(name, weights=weights, **SMALL)
    assert json.loads(json.dumps(network.options))["weights"] == str(weights)
    assert models.load(name, **network.options).fingerprint == network.fingerprint


def test_files_with_neighbours_of_the_same_name_do_not_meet(tmp_path):
    text = "from blocks import SIZE\nfrom parts.head import head\ndef make():\n    return head(SIZE)\n"
    head = "from torch import nn\ndef head(size):\n    return nn.Sequential(nn.Flatten(), nn.Linear(size, 2))\n"
    path = list(sys.path)
    for folder, size in ((tmp_path / "one", 64), (tmp_path / "two", 16)):
        name = write(folder, text)
        write(folder, f"SIZE = {size}\n", "blocks.py")
        write(folder / "parts", head, "head.py")
        side = int(size**0.5)
        assert models.load(name, **(SMALL | {"input_size": side})).module[1].in_features == size
    assert sys.path == path
    assert not {"blocks", "parts", "parts.head", "net"} & set(sys.modules)


def test_a_saved_model_finds_its_class_beside_the_network_where_its_code_may_run(tmp_path):
    layers = "from torch import nn\nclass Head(nn.Linear):\n    pass\n"
    text = "from torch import nn\nfrom layers import Head\ndef make():\n    return nn.Sequential(nn.Flatten(), Head(64, 2))\n"
    write(tmp_path, layers, "layers.py")
    name, weights = write(tmp_path, text), tmp_path / "whole.pt"
    script = f"import torch, net\ntorch.manual_seed(1)\ntorch.save(net.make(), {str(weights)!r})\n"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with pytest.raises(ConfigError, match="Unsupported global"):
        models.load(name, weights=weights, **SMALL)
    network = models.load(name, weights=weights, execute_weights=True, **SMALL)
    torch.manual_seed(1)
    assert torch.equal(network.module[1].weight, torch.nn.Linear(64, 2).weight)
    assert "layers" not in sys.modules


def test_a_model_that_a_script_saved_is_found_in_the_script(tmp_path):
    text = (
        "import torch\nfrom torch import nn\nclass Head(nn.Linear):\n    pass\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), Head(64, 2))\n"
        "if __name__ == '__main__':\n    torch.manual_seed(1)\n    torch.save(make(), 'whole.pt')\n"
    )
    name = write(tmp_path, text)
    subprocess.run([sys.executable, "net.py"], cwd=tmp_path, check=True)
    network = models.load(name, weights=tmp_path / "whole.pt", execute_weights=True, **SMALL)
    torch.manual_seed(1)
    assert torch.equal(network.module[1].weight, torch.nn.Linear(64, 2).weight)
    assert not hasattr(sys.modules["__main__"], "Head")


def test_leave_to_execute_needs_weights(tmp_path):
    name = write(tmp_path, NETWORK.format(size=64))
    assert refusal(ConfigError, name, execute_weights=True) == (
        f"{name}: weights must be given with execute_weights, got none; leave it out, or name the file that it is for"
    )


def test_a_second_load_sees_the_changed_file(tmp_path):
    assert models.load(write(tmp_path, NETWORK.format(size=64)), **SMALL).module[1].in_features == 64
    name = write(tmp_path, NETWORK.format(size="10 * 10"))
    assert models.load(name, **(SMALL | {"input_size": 10})).module[1].in_features == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_library\n", "the file must run, got ModuleNotFoundError: No module named 'no_such_library'; {try_it}"),
        ("def make(:\n", "the file must run, got SyntaxError: invalid syntax (net.py, line 1); {try_it}"),
        ("def make():\n    raise OSError('no\\nluck')\n", "the factory must give a network, got OSError: no luck"),
        ("def make():\n    return 3\n", "the factory must give an nn.Module, got a int; return the network itself"),
        (
            NETWORK.format(size=65),
            "the network must take inputs of shape (1, 8, 8), "
            "got RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x64 and 65x2)",
        ),
        (
            "from torch import nn\ndef make():\n    return nn.Flatten()\n",
            "the network must give (1, 2) logits for one image, got (1, 64); set classes or the factory right",
        ),
    ],
)
def test_a_file_that_gives_no_such_network_is_refused(tmp_path, text, message):
    name = write(tmp_path, text)
    assert refusal(ModelError, name) == f"{name}: {message.format(try_it='try it with python net.py')}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def made():\n    pass\n", "unknown factory 'make'; choose one of made, or did you mean 'made'?"),
        ("from torch import nn\n", "unknown factory 'make'; net.py defines none"),
        ("make = 3\n", "the factory must be callable, got a int"),
        (
            "def make(depth, *, width, scale=1):\n    pass\n",
            "the factory must take no arguments, got one that needs depth, width; write a function that fills them in",
        ),
    ],
)
def test_a_factory_that_cannot_be_called_is_refused(tmp_path, text, message):
    name = write(tmp_path, text)
    assert refusal(ConfigError, name) == f"{name}: {message}"


def test_a_missing_file_is_refused(tmp_path):
    name = f"{tmp_path / 'net.py'}:make"
    assert refusal(ConfigError, name) == f"{name}: {tmp_path / 'net.py'} must be a Python file, got nothing there"


def test_a_file_without_a_factory_is_refused():
    assert refusal(ConfigError, "net.py") == "a network from a file must be path/to/file.py:FACTORY, got 'net.py'"


def test_weights_are_checked_before_the_file_is_run(tmp_path):
    name = write(tmp_path, "raise SystemExit\n")
    message = f"{name}: {tmp_path / 'w.pth'}: weights must be an existing file, got nothing there"
    assert refusal(ConfigError, name, weights=tmp_path / "w.pth") == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"std": (0.5, 0.5)}, "mean and std must have one value for each channel, got 1 and 2"),
        ({"input_size": 0}, "InputContract.height must be at least 1, got 0"),
    ],
)
def test_an_impossible_input_is_refused(tmp_path, options, message):
    name = write(tmp_path, NETWORK.format(size=64))
    assert refusal(ConfigError, name, **options) == f"{name}: {message}"
