"""Weight files: what is read, what is refused, and how a file that does not fit is described."""

import importlib.util
import os
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from reverie import received
from reverie.errors import ConfigError, ModelError
from reverie.models import _weights, load
from reverie.models._torchvision_import import torchvision

OR_EXECUTE = ", or let its code run with --execute-weights if you trust the file"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return nn.Linear(3, 2).state_dict()


def message_of(path):
    with pytest.raises(ConfigError) as caught:
        _weights.read(path)
    return str(caught.value)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_pickled_state_dict_is_found_under_its_wrappings(tmp_path, state, wrap, prefix):
    path = tmp_path / "net.pth"
    torch.save(wrap({prefix + key: value for key, value in state.items()}), path)
    read = _weights.read(path)
    assert list(read) == ["weight", "bias"]
    assert torch.equal(read["weight"], state["weight"])


def test_safetensors_are_read(tmp_path, state):
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(state, path)
    assert torch.equal(_weights.read(path)["bias"], state["bias"])


def test_a_whole_model_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(nn.Linear(3, 2), path)
    assert message_of(path) == (
        f"{path}: weights must be a state dict of tensors alone, got a pickle that needs more "
        "(Unsupported global: GLOBAL torch.nn.modules.linear.Linear); save model.state_dict() in place of the model"
        + OR_EXECUTE
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "weights must be a state dict, got a list; save model.state_dict()"),
        (
            {"weight": torch.zeros(1), "epoch": 3},
            "weights must be a state dict of tensors alone, got a int at 'epoch'; "
            "save model.state_dict() alone, or as 'state_dict' or 'model'",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    assert message_of(path) == f"{path}: {message}"


def test_another_suffix_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    assert message_of(path) == f"{path}: weights must be a .safetensors, .pt or .pth file, got '.onnx'"


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "net.pth"
    assert message_of(path) == f"{path}: weights must be an existing file, got nothing there"


def test_damaged_files_are_refused_in_one_line(tmp_path, state):
    torch.save(state, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-40])
    assert not zipfile.is_zipfile(tmp_path / "cut.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "cut.safetensors").write_bytes(safetensors.torch.save(state)[:-4])
    for name in ("cut.pth", "empty.pth"):
        message = message_of(tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: must be a whole PyTorch file, got ")
        assert message.endswith("; fetch it again")
        assert "\n" not in message
    assert message_of(tmp_path / "cut.safetensors").startswith(
        f"{tmp_path / 'cut.safetensors'}: must be a whole safetensors file, got SafetensorError: "
    )


def test_weights_that_do_not_fit_are_described_by_the_first_difference_of_each_kind():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    state = module.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    other = {key: value for key, value in state.items() if not key.startswith("0.")}
    other |= {"stem.weight": torch.zeros(8, 3, 3, 3), "2.weight": torch.zeros(5, 8), "2.bias": torch.zeros(5)}
    with pytest.raises(ModelError) as caught:
        _weights.fit_(module, other)
    assert str(caught.value) == (
        "weights must fit the architecture, got no '0.weight' (8, 3, 3, 3) (and 1 more); an unknown 'stem.weight' (8, 3, 3, 3); "
        "'2.weight' (5, 8) for (2, 8) (and 1 more); use the weights of this very network"
    )
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_counters_that_old_checkpoints_lack_may_be_missing():
    source, target = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    source.running_mean = torch.arange(4.0)
    state = {key: value for key, value in source.state_dict().items() if key != "num_batches_tracked"}
    _weights.fit_(target, state)
    assert torch.equal(target.running_mean, torch.arange(4.0))


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_weight_file_is_refused_and_not_executed(tmp_path, state, zipped):
    mark, path = tmp_path / "executed", tmp_path / "net.pt"
    torch.save(dict(state) | {"more": Touch(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert message_of(path).endswith("; save model.state_dict() in place of the model" + OR_EXECUTE)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 3}])
def test_a_whole_model_is_read_where_its_code_may_run(tmp_path, wrap):
    path, model = tmp_path / "net.pt", nn.Sequential(nn.Linear(3, 2))
    torch.save(wrap(model), path)
    read = _weights.read(path, execute=True)
    assert list(read) == ["0.weight", "0.bias"]
    assert torch.equal(read["0.weight"], model[0].weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("execute", [False, True])
def test_torchscript_is_named_as_such(tmp_path, execute):
    path = tmp_path / "net.pt"
    torch.jit.script(nn.Linear(3, 2)).save(path)
    with pytest.raises(ConfigError) as caught:
        _weights.read(path, execute=execute)
    assert str(caught.value) == (
        f"{path}: weights must be a state dict, got a TorchScript archive; save state_dict() of the module that it was made of"
    )


def test_leave_to_execute_is_not_used_on_tensors_alone(tmp_path, state, monkeypatch):
    path = tmp_path / "net.pt"
    torch.save(state, path)
    asked, load = [], torch.load

    def watched(*arguments, **options):
        asked.append(options["weights_only"])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    assert torch.equal(_weights.read(path, execute=True)["bias"], state["bias"])
    assert asked == [True]


def test_code_that_does_not_run_is_described(tmp_path, state):
    path = tmp_path / "net.pt"
    torch.save(dict(state) | {"more": Touch(tmp_path / "nowhere" / "mark")}, path)
    with pytest.raises(ModelError) as caught:
        _weights.read(path, execute=True)
    assert str(caught.value) == (
        f"{path}: its code must run, got FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/nowhere/mark'; "
        "classes are found in the network's Python file and beside it, under the module names that they were saved with"
    )


def test_a_weight_file_that_blows_up_is_refused(tmp_path, state, monkeypatch):
    monkeypatch.setattr(received, "FREE_BYTES", 1000)
    path = tmp_path / "net.pt"
    torch.save(state, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
        bomb.writestr("archive/zeros", bytes(1 << 20))
    assert "is it a decompression bomb?" in message_of(path)


def test_a_tensor_that_is_no_plain_one_is_refused(tmp_path, state):
    path = tmp_path / "net.pt"
    torch.save(dict(state) | {"weight": torch.eye(3).to_sparse()}, path)
    assert message_of(path) == (
        f"{path}: weights must be dense tensors of real numbers, got another kind at 'weight'; save the network in full precision"
    )


def test_a_pipe_in_place_of_weights_does_not_keep_us_waiting(tmp_path):
    path = tmp_path / "net.pt"
    os.mkfifo(path)
    assert message_of(path) == f"{path}: must be a file, got a pipe; check the path"


def test_a_tampered_download_of_torchvision_is_not_executed(tmp_path, monkeypatch):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    models = torchvision().models
    mark, folder = tmp_path / "executed", tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save({"weights": Touch(mark)}, folder / Path(url).name)
    with pytest.raises(ModelError) as caught:
        load("torchvision:squeezenet1_1")
    assert str(caught.value) == (
        f"torchvision:squeezenet1_1: weights must be tensors alone, got a pickle that needs more; delete {Path(url).name} below "
        f"{tmp_path / 'hub'}, and run the same command again"
    )
    assert not mark.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
