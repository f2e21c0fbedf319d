"""Readers of files that somebody else may have written: whatever is in them, they answer, or refuse in one of our errors.

The same examples every time; `benchmarks/fuzz.py` looks at ten thousand more, in processes with limits.
"""

import io
import json
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from reverie import models, recipes
from reverie.checkpoints import Folder
from reverie.errors import ReverieError
from reverie.export._packed import read_packed
from reverie.images.folder import read_folder
from reverie.images.store import load_images
from reverie.models import InputContract, _weights
from reverie.recipe import Recipe
from reverie.runs import read_record
from reverie.synthesis._capsule import load_capsule

GREY = InputContract(channels=1, height=4, width=4, mean=(0.5,), std=(0.5,))
EVERY_TIME = settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RECORD = {
    "reverie": "0.1.0",
    "identity": {"network": "0123"},
    "versions": {"torch": "2.13.0", "threads": 1},
    "earlier_versions": [],
    "facts": {"network": "embedded:digits", "options": {}, "sha256": {"network.safetensors": "0123"}},
    "stages": {"capture": {"seconds": 1.0}},
    "complete": True,
}


def bytes_of(write):
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def saved(tensors, about):
    return save(tensors, {"reverie": json.dumps(about)})


PACKED = saved(
    {
        "w.codes": torch.zeros(2, dtype=torch.uint8),
        "w.scale": torch.ones(2),
        "w.zero_point": torch.zeros(2, dtype=torch.int32),
        "x.scale": torch.ones(()),
        "x.zero_point": torch.zeros((), dtype=torch.int32),
    },
    {
        "format": "reverie packed 1",
        "placement": "integer",
        "layers": {"conv": {"weight": "w", "bias": None, "shape": [2, 2], "bits": 4, "source": "x"}},
        "tensors": {"x": 8},
        "facts": {"reverie.network": "x"},
    },
)
IMAGES = saved(
    {"inputs": torch.zeros(2, 1, 4, 4), "labels": torch.zeros(2, dtype=torch.long)},
    {"sources": ["a", "b"], "provenance": {"method": "x"}},
)
CAPSULE = saved(
    {
        "count": torch.ones(2, dtype=torch.long),
        "correct": torch.ones(2, dtype=torch.bool),
        "n.mean": torch.ones(2, 3),
        "n.variance": torch.ones(2, 3),
    },
    {"format": "reverie capsule 1", "names": ["n"], "fingerprint": "0123"},
)
CHECKPOINT = save({"codes": torch.arange(6)}, {"reverie": json.dumps({"run": "aaaa", "sha256": "0" * 64})})


def small_onnx():
    """A convolution with its batch norm, and a classifier."""
    make, number = onnx.helper, onnx.numpy_helper.from_array
    values = {
        "w": np.ones((2, 1, 3, 3)),
        "one": np.ones(2),
        "zero": np.zeros(2),
        "fc": np.ones((2, 3)),
        "bias": np.zeros(3),
    }
    nodes = [
        make.make_node("Conv", ["x", "w"], ["a"]),
        make.make_node("BatchNormalization", ["a", "one", "zero", "zero", "one"], ["b"]),
        make.make_node("Relu", ["b"], ["c"]),
        make.make_node("GlobalAveragePool", ["c"], ["d"]),
        make.make_node("Flatten", ["d"], ["e"]),
        make.make_node("Gemm", ["e", "fc", "bias"], ["y"]),
    ]
    ends = [make.make_tensor_value_info(name, 1, shape) for name, shape in (("x", ["n", 1, 6, 6]), ("y", ["n", 3]))]
    stored = [number(value.astype(np.float32), name) for name, value in values.items()]
    graph = make.make_graph(nodes, "small", ends[:1], ends[1:], stored)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8).SerializeToString()


PICTURE = np.arange(16, dtype=np.uint8).reshape(4, 4)
STATE = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}

# Where a whole file goes, and what reads it there.
READERS = {
    "recipe.toml": (recipes.to_toml(recipes.read("brecq")).encode(), lambda path: recipes.read(str(path))),
    "network.safetensors": (PACKED, read_packed),
    "images.safetensors": (IMAGES, load_images),
    "capsule.safetensors": (CAPSULE, load_capsule),
    "run.json": (json.dumps(RECORD).encode(), lambda path: read_record(path.parent)),
    "a.png": (bytes_of(lambda file: Image.fromarray(PICTURE).save(file, "png")), lambda path: pictures(path.parent)),
    "a.jpg": (bytes_of(lambda file: Image.fromarray(PICTURE).save(file, "jpeg")), lambda path: pictures(path.parent)),
    "labels.csv": (b"file,label\nb.png,1\n", lambda path: pictures(path.parent)),
    "a.npz": (
        bytes_of(lambda file: np.savez(file, images=PICTURE[None, ..., None], labels=np.array([1]))),
        lambda path: pictures(path),
    ),
    "net.pt": (bytes_of(lambda file: torch.save(STATE, file)), _weights.read),
    "part.safetensors": (CHECKPOINT, lambda path: Folder(path.parent, "aaaa").load("part")),
    "net.onnx": (small_onnx(), lambda path: models.load(str(path), mean=(0.5,), std=(0.25,))),
    "net.pth": (bytes_of(lambda file: torch.save(STATE, file, _use_new_zipfile_serialization=False)), _weights.read),
}


def pictures(path):
    return read_folder(path, GREY, 3, require_labels=False)


def read(reader, path):
    """Whether `path` was read; any error but ours is the test's."""
    before = sorted(path.parent.iterdir())
    try:
        reader(path)
    except ReverieError as error:
        assert str(error)
        return False
    finally:
        assert sorted(path.parent.iterdir()) == before
    return True


@st.composite
def damage(draw, length):
    """Edits of a file of that many bytes: place, how many are taken out, what is put in."""
    places = st.integers(0, length)
    taken = st.sampled_from([0, 1, 1, 1, 2, 4, 8, length])
    put = st.one_of(
        st.binary(max_size=8),
        st.sampled_from(
            [b"\xff" * 8, b"\0" * 8, b"-1", b"9" * 20, b"null", b"[" * 300, b'"', b"NaN", b"\n", struct.pack("<q", 2**62)]
        ),
    )
    return draw(st.lists(st.tuples(places, taken, put), min_size=1, max_size=3))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(tmp_path, name):
    whole, reader = READERS[name]
    path = tmp_path / name
    if name == "labels.csv":
        (tmp_path / "b.png").write_bytes(READERS["a.png"][0])
    path.write_bytes(whole)
    # The hash in the checkpoint is one of nothing.
    assert read(reader, path) == (name != "part.safetensors")

    @EVERY_TIME
    @given(damage(len(whole)))
    def damaged(edits):
        data = whole
        for place, taken, put in edits:
            data = data[:place] + put + data[place + taken :]
        path.write_bytes(data)
        read(reader, path)

    damaged()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def edited(value, path, put):
    """`value` with `put` at the place that the numbers in `path` lead to."""
    if not path or not isinstance(value, dict | list) or not value:
        return put
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = edited(value[key], path[1:], put)
    return changed


@pytest.mark.parametrize("name", ["network.safetensors", "images.safetensors", "capsule.safetensors", "run.json"])
def test_json_that_says_something_else_is_read_or_refused(tmp_path, name):
    whole, reader = READERS[name]
    path = tmp_path / name
    size = 8 + int.from_bytes(whole[:8], "little") if name.endswith(".safetensors") else 0
    stated = json.loads(json.loads(whole[8:size])["__metadata__"]["reverie"]) if size else json.loads(whole)

    @EVERY_TIME
    @given(st.lists(st.integers(0, 9), max_size=4), JSON)
    def says(places, put):
        text = json.dumps(edited(stated, places, put))
        if size:
            header = json.loads(whole[8:size])
            header["__metadata__"]["reverie"] = text
            told = json.dumps(header).encode()
            path.write_bytes(len(told).to_bytes(8, "little") + told + whole[size:])
        else:
            path.write_text(text)
        read(reader, path)

    says()


@EVERY_TIME
@given(
    st.sampled_from(sorted(recipes.tables(Recipe()))),
    st.text(max_size=8),
    JSON | st.dates() | st.lists(st.integers(), max_size=2),
)
def test_any_value_in_a_recipe_is_taken_or_refused(table, key, value):
    for tables in ({table: value}, {table: {key: value}}, {table: {"method": value}}, {key: value}):
        try:
            recipes.from_tables(tables)
        except ReverieError as error:
            assert str(error)


@EVERY_TIME
@given(st.dictionaries(st.text(max_size=12), st.binary(max_size=20), max_size=3), st.booleans())
def test_any_archive_is_read_or_refused(tmp_path, members, as_weights):
    path = tmp_path / ("net.pt" if as_weights else "a.npz")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name or "_"), data)
    read(_weights.read if as_weights else pictures, path)
