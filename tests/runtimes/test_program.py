"""A `.pt2` file from somebody else is data: whatever in it PyTorch would execute is left out or refused."""

import io
import json
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from reverie.errors import ConfigError, ExportError
from reverie.export.torch import Torch as Exporter
from reverie.runtimes._program import inert
from reverie.runtimes.torch import Torch

SHAPE = (3, 8, 8)
MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS, INPUTS = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"


@pytest.fixture(scope="module")
def members(small, tmp_path_factory):
    """The archive's members by name, the model's JSON decoded."""
    path = tmp_path_factory.mktemp("program") / "network.pt2"
    Exporter()(small[1], SHAPE, path)
    with zipfile.ZipFile(path) as archive:
        found = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return found


@pytest.fixture
def packed(members, tmp_path):
    """Packs the members, some of them changed, into a file."""

    def pack(**changed):
        path = tmp_path / "network.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (members | changed.pop("members", {})).items():
                archive.writestr(f"archive/{name}", data)
        return path

    return pack


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(thing):
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


def test_what_is_loaded_answers_as_the_file_does(small, packed):
    images = small[3]
    expected = torch.export.load(packed()).module()(torch.from_numpy(images)).detach().numpy()
    assert np.array_equal(Torch().open(packed())(images), expected)


def test_sample_inputs_are_left_out_where_torch_would_execute_them(small, packed, tmp_path):
    mark = tmp_path / "executed"
    path = packed(members={INPUTS: saved({"x": Touch(mark)})})
    torch.export.load(path)
    assert mark.exists()
    mark.unlink()
    assert Torch().open(path)(small[3]).shape[0] == len(small[3])
    assert not mark.exists()


def program(members, change):
    model = json.loads(members[MODEL])
    change(model)
    return {MODEL: json.dumps(model)}


def first(model):
    return model["graph_module"]["graph"]["nodes"][0]


def structure(text, model):
    model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = text


def size(text, model):
    model["graph_module"]["graph"]["sym_int_values"]["sym"] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}


CODE = "__import__('pathlib').Path('{mark}').touch()"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda model: first(model).update(target="torch.os.system"), "target 'torch.os.system'"),
        (lambda model: first(model).update(target="_operator.methodcaller"), "target '_operator.methodcaller'"),
        (
            lambda model: first(model)["inputs"].append({"name": "file", "arg": {"as_string": "/etc/passwd"}}),
            "as_string '/etc/passwd'",
        ),
        (partial(size, "open('/tmp/x')"), "expr_str \"open('/tmp/x')\""),
        (
            partial(structure, '[1, {"type": "collections.defaultdict"}]'),
            'in_spec \'[1, {"type": "collections.defaultdict"}]\'',
        ),
        (lambda model: first(model)["outputs"][0]["as_tensor"].update(name="x=exit()"), "name 'x=exit()'"),
        (lambda model: model["graph_module"]["graph"]["tensor_values"].update({"a b": {}}), " 'a b'"),
    ],
)
def test_a_string_that_could_be_code_is_refused(members, packed, change, got):
    with pytest.raises(ConfigError) as caught:
        inert(packed(members=program(members, change)))
    assert str(caught.value) == f"must hold only what Reverie writes, got {got}, which torch might execute; export it again"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda model: model.update(guards_code=["exit()"]), "guards_code"),
        (lambda model: first(model).update(metadata={"source_fn_stack": "x,torch.os.system"}), "metadata"),
        (lambda model: first(model)["inputs"][0].update(arg={"as_operator": "torch.os.system"}), "as_operator"),
    ],
)
def test_a_graph_of_more_than_operators_is_refused(members, packed, change, key):
    with pytest.raises(ConfigError) as caught:
        inert(packed(members=program(members, change)))
    assert str(caught.value) == f"must be a graph of plain operators, got {key}, which torch might execute; export it again"


@pytest.mark.parametrize("name", ["data/aotinductor/model/model.so", "data/weights/model.pt", "data/constants/opaque_obj_0"])
def test_a_member_that_torch_would_load_as_code_is_refused(packed, name):
    with pytest.raises(ConfigError) as caught:
        inert(packed(members={name: b"code"}))
    assert str(caught.value) == f"must hold only what Reverie writes, got {name!r}, which torch might execute; export it again"


def test_a_pickled_weight_is_refused_and_not_executed(members, packed, tmp_path):
    mark, config = tmp_path / "executed", json.loads(members[WEIGHTS])
    next(iter(config["config"].values()))["use_pickle"] = True
    path = packed(members={WEIGHTS: json.dumps(config), "data/weights/weight_0": saved(Touch(mark))})
    with pytest.raises(ExportError) as caught:
        Torch().open(path)
    assert str(caught.value) == f"{path}: must hold its weights as plain numbers, got 'weight_0' pickled; export it again"
    assert not mark.exists()


def test_an_opaque_constant_is_refused_and_not_executed(packed, tmp_path):
    mark = tmp_path / "executed"
    config = {"config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    path = packed(members={CONSTANTS: json.dumps(config), "data/constants/opaque_obj_0": pickle.dumps(Touch(mark))})
    with pytest.raises(ExportError, match=r"which torch might execute; export it again$"):
        Torch().open(path)
    assert not mark.exists()


def test_a_weight_that_is_larger_than_its_bytes_is_refused(members, packed):
    config = json.loads(members[WEIGHTS])
    payload = next(iter(config["config"].values()))
    payload["tensor_meta"]["sizes"] = [{"as_int": 10**12}]
    name = payload["path_name"]
    with pytest.raises(ConfigError) as caught:
        inert(packed(members={WEIGHTS: json.dumps(config), f"data/weights/{name}": b""}))
    assert str(caught.value) == f"must hold [1000000000000] numbers in {name!r}, got 0 bytes; export it again"


def test_a_weight_of_fewer_bytes_than_its_type_takes_is_one_error_and_nothing_else(members, packed, capfd):
    payloads = json.loads(members[WEIGHTS])["config"].values()
    # Scales: four bytes each.
    name = next(f"data/weights/{payload['path_name']}" for payload in payloads if payload["tensor_meta"]["dtype"] == 7)
    path = packed(members={name: members[name][:-4]})
    with pytest.raises(ExportError, match=rf"^torch: it must load {path}, got .*; try another version of torch$"):
        Torch().open(path)
    assert capfd.readouterr() == ("", "")


def test_two_members_of_one_name_are_refused(packed):
    path = packed()
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/models/model.json", "{}")
    with pytest.raises(ConfigError) as caught:
        inert(path)
    assert str(caught.value) == (
        "must be an archive with one member of each name, got several of 'archive/models/model.json'; pack it again"
    )
