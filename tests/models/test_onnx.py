"""ONNX files: they become the network that they were made of, whichever way; and whatever is wrong with one is said in one line."""

import os
import warnings
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from torch import nn
from torch.nn import functional as F
from torch.onnx import TrainingMode

import reverie
from reverie import models
from reverie.errors import ConfigError, ModelError
from reverie.graph.capture import capture
from reverie.graph.operators import BATCH_NORM
from reverie.images import Images
from reverie.images.store import load_images

CONTRACT = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
KEPT = {"dynamo": False, "training": TrainingMode.PRESERVE, "do_constant_folding": False}
FREE = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
WAYS = {
    "traced, opset 11": KEPT | {"opset_version": 11},
    "traced, opset 13, batch free": KEPT | {"opset_version": 13, "input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}},
    "traced, opset 17": KEPT | {"opset_version": 17},
    "for training": KEPT | {"opset_version": 17, "training": TrainingMode.TRAINING},
    "exported, opset 18": {"dynamo": True, "optimize": False, "opset_version": 18},
    "exported, opset 21, batch free": {"dynamo": True, "optimize": False, "opset_version": 21} | FREE,
}
FOLDED = {"dynamo": True, "opset_version": 18} | FREE


class Parts(nn.Module):
    """What mobile and residual networks are made of, in one block of each kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        )
        self.shuffled = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.depthwise(x)
        x = x * self.squeeze(x)
        a, b = x.chunk(2, dim=1)
        x = torch.cat([b, F.gelu(a)], 1)
        n, c, h, w = x.shape
        x = self.shuffled(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
        x = F.pad(self.pool(x)[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        return self.head(self.drop(x.mean((2, 3))))


def parts():
    torch.manual_seed(0)
    module = Parts()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            # Exporters store equal tensors once, and share them.
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 1.5)
    return module.eval()


def write(module, path, *, shape=(3, 16, 16), **way):
    batch = 2 if "dynamic_shapes" in way or "dynamic_axes" in way else 1
    with warnings.catch_warnings():
        # The exporters of torch warn of themselves.
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(batch, *shape),), path, verbose=False, external_data=False, **way)
    module.eval()
    return path


@pytest.fixture(scope="module")
def written(tiny_cnn, tmp_path_factory):
    """Exporting takes a second, so it is done once."""
    path = tmp_path_factory.mktemp("written") / "tiny.onnx"
    return write(tiny_cnn().module, path, **WAYS["exported, opset 21, batch free"]).read_bytes()


@pytest.fixture
def tiny(written, tiny_cnn, tmp_path):
    """The trained small network in a file with its batch norms, and what it was made of."""
    path = tmp_path / "tiny.onnx"
    path.write_bytes(written)
    return path, tiny_cnn()


@pytest.fixture
def folded(tiny_cnn, tmp_path):
    """The same as exporters write it if nothing is said."""
    return write(tiny_cnn().module, tmp_path / "folded.onnx", **FOLDED)


def refusal(error, path, **options):
    with pytest.raises(error) as caught:
        models.load(f"onnx:{path}", **(CONTRACT | options))
    assert str(caught.value).startswith(f"onnx:{path}: ")
    return str(caught.value).removeprefix(f"onnx:{path}: ")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way == "traced, opset 17" else pytest.mark.slow) for way in WAYS]
)
def test_a_file_becomes_the_network_it_was_made_of(way, tmp_path):
    module = parts()
    network = models.load(str(write(module, tmp_path / "parts.onnx", **WAYS[way])), **CONTRACT)
    assert (network.input.shape, network.classes, network.module.training) == ((3, 16, 16), 5, False)
    ours, theirs = (capture(part, (3, 16, 16)) for part in (network.module, module))
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert statistics(ours) == statistics(theirs)


def statistics(graph):
    return [graph.get_buffer(node.args[3].target).tolist() for node in graph.graph.nodes if node.target is BATCH_NORM]


@pytest.mark.parametrize("way", ["traced, opset 17", "exported, opset 18"])
def test_layers_have_the_names_they_had(way, tmp_path):
    module = parts()
    network = models.load(f"onnx:{write(module, tmp_path / 'parts.onnx', **WAYS[way])}", **CONTRACT)
    kept = {key: value for key, value in module.state_dict().items() if "num_batches" not in key and "shuffled.2" not in key}
    state = network.module.state_dict()
    assert not [key for key, value in kept.items() if not torch.equal(state[key], value)]


def test_a_file_from_elsewhere_with_channels_last_and_probabilities(tmp_path):
    """As converters from TensorFlow write: transposes, padding that is not symmetrical, MatMul and Add, Softmax."""
    generator = np.random.default_rng(0)
    shapes = {"k": (8, 3, 3, 3), "s": (8,), "o": (8,), "m": (8,), "v": (8,), "d": (8, 1, 3, 3), "w": (8, 6), "b": (6,)}
    stored = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    stored |= {"v": stored["v"] ** 2 + 0.1, "low": np.float32(0), "high": np.float32(6)}
    nodes = [
        helper.make_node("Transpose", ["image"], ["a"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["a", "k"], ["c"], name="net/conv/Conv2D", auto_pad="SAME_UPPER", strides=[2, 2]),
        helper.make_node("BatchNormalization", ["c", "s", "o", "m", "v"], ["n"], epsilon=1e-3),
        helper.make_node("Clip", ["n", "low", "high"], ["r"]),
        helper.make_node("Conv", ["r", "d"], ["e"], group=8, pads=[0, 0, 1, 1], strides=[2, 2]),
        helper.make_node("Transpose", ["e"], ["f"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["f"], ["g"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["g", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["l"]),
        helper.make_node("Softmax", ["l"], ["p"]),
    ]
    path = save(tmp_path, nodes, stored, shape=("n", 16, 12, 3), output="p", opset=13)
    network = models.load(f"onnx:{path}", **CONTRACT)
    assert network.input.shape == (3, 16, 12)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(4, 3, 16, 12)
    (probabilities,) = session.run(None, {"image": x.permute(0, 2, 3, 1).numpy()})
    torch.testing.assert_close(network.module(x).softmax(1), torch.from_numpy(probabilities), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(network.module(x), torch.from_numpy(probabilities), atol=0.1)
    assert {"net.conv.weight", "linear.bias"} & set(network.module.state_dict()) == {"net.conv.weight"}


def test_external_data_beside_the_file_is_read(tiny, tmp_path):
    path, _ = tiny
    (tmp_path / "sub").mkdir()
    model = onnx.load(path)
    onnx.save_model(model, tmp_path / "sub" / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    assert models.load(f"onnx:{tmp_path / 'sub' / 'net.onnx'}", **CONTRACT).fingerprint == (
        models.load(f"onnx:{path}", **CONTRACT).fingerprint
    )


def test_the_network_can_be_loaded_again_with_the_options_it_keeps(tiny):
    network = models.load(str(tiny[0]), resize=20, **CONTRACT)
    again = models.load(network.name, **network.options)
    assert (again.fingerprint, again.input) == (network.fingerprint, network.input)
    assert network.input.resize == 20


def test_a_file_of_an_old_opset_is_converted(tiny_cnn, tmp_path):
    network = tiny_cnn()
    path = write(network.module, tmp_path / "old.onnx", **KEPT, opset_version=9)
    x = network.held_out().inputs[:5]
    torch.testing.assert_close(models.load(str(path), **CONTRACT).module(x), network.module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "weights", "side"),
    [("CifarResNet", "cifar10/resnet20.pth", 32), ("MobileNetV1", "imagenet/mobilenet_v1_025_224.pth", 224)],
)
def test_real_networks_go_through_a_file(assets, tmp_path, factory, weights, side):
    options = {"input_size": side, "classes": 10 if side == 32 else 1000, "weights": assets / "nets" / weights, **CONTRACT}
    original = models.load(f"{assets / 'models.py'}:{factory}", **options)
    x = torch.randn(2, 3, side, side)
    answer = original.module(x).detach()
    for way in ("traced, opset 11", "exported, opset 18"):
        path = write(original.module, tmp_path / "network.onnx", shape=(3, side, side), **WAYS[way])
        network = models.load(str(path), **CONTRACT)
        graph = capture(network.module, network.input.shape)
        assert float((graph(x) - answer).abs().max() / answer.abs().max()) < 1e-4
        kinds = [
            sum(node.target is BATCH_NORM for node in each.graph.nodes)
            for each in (graph, capture(original.module, (3, side, side)))
        ]
        assert kinds[0] == kinds[1] > 0


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_a_file_and_compares_it_on_synthesized_images(tiny, tmp_path):
    path, original = tiny
    network = models.load(str(path), **CONTRACT)
    seen = []
    watched = replace(network, reference=lambda inputs: seen.append(inputs) or network.reference(inputs))
    recipe = reverie.read_recipe("zeroq", {"images": 16, "held_out": 8, "synthesis.steps": 30, "estimate_images": 0})
    run = reverie.run(recipe, watched, output=tmp_path / "run", evaluation=original.held_out())
    assert run.metrics["parity"]["max_code_difference"] <= 1
    assert run.metrics["exported"]["top1"] > run.metrics["full_precision"]["top1"] - 0.02 > 0.9
    (synthesized,) = seen
    assert torch.equal(synthesized, load_images(run.path / "images.safetensors").inputs[:8])


def test_a_network_that_answers_otherwise_than_its_file_is_refused(tiny):
    network = models.load(str(tiny[0]), **CONTRACT)
    network.module.get_submodule("0").weight.data[0] *= 1.01
    with pytest.raises(ModelError) as caught:
        network.check_reference(tiny[1].held_out(), "patterns")
    before, _, after = str(caught.value).partition(", got ")
    assert before == (
        f"onnx:{tiny[0]}: the converted network must answer as the file does in ONNX Runtime, up to 0.0001 of the largest answer"
    )
    assert 1e-4 < float(after.split()[0]) < 0.1
    assert after.endswith(" on patterns; use the network's own code, path/to/file.py:FACTORY")
    network.module.get_submodule("0").weight.data[0] /= 1.01
    network.check_reference(Images(inputs=torch.randn(3, 3, 32, 32)), "patterns of another size")
    with pytest.raises(
        ModelError, match=r"in ONNX Runtime, \(\d+, 7\), got \(\d+, 3\) on patterns; use the network's own code"
    ):
        replace(network, reference=lambda x: torch.zeros(len(x), 7)).check_reference(tiny[1].held_out(), "patterns")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mean": (0.5,), "std": (0.5,)},
            "mean must have one value for each channel of the input (?, 3, 16, 16), got 1; give one for each",
        ),
        ({"std": (0.5,)}, "InputContract.std must have one value per channel (3), got 1"),
        ({"input_size": 32}, "input_size must be 16 x 16, which is all that the file takes, got 32 x 32; leave it out"),
        ({"classes": 10}, "classes must be 3, which the file gives, got 10; leave it out"),
        ({"weights": "net.pth"}, "got the option 'weights'; it takes classes, input_size, interpolation, mean, resize, std"),
    ],
)
def test_a_contract_that_is_not_the_files_is_refused(tiny, options, message):
    assert refusal(ConfigError, tiny[0], **options) == message


def test_what_the_file_does_not_say_is_asked_for(tiny):
    with pytest.raises(ConfigError) as caught:
        models.load(str(tiny[0]))
    assert str(caught.value) == f"{tiny[0]}: mean, std must be given, got nothing; its file does not say them"


def test_a_size_that_the_file_leaves_open_is_asked_for(tiny_cnn, tmp_path):
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    path = write(tiny_cnn().module, tmp_path / "free.onnx", **KEPT, input_names=["x"], dynamic_axes=axes)
    assert refusal(ConfigError, path) == "input_size must be given, got nothing; the file leaves height and width open"
    assert models.load(f"onnx:{path}", input_size=(24, 20), **CONTRACT).input.shape == (3, 24, 20)


def save(folder, nodes, stored, *, shape=("n", 3, 8, 8), output="y", opset=17, kind=TensorProto.FLOAT, inputs=(), outputs=()):
    """A file of hand-made nodes from `image` to `output`."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", kind, shape), *inputs],
        [helper.make_tensor_value_info(output, kind, [None, None]), *outputs],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("my.domain", 1), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "net.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    return path


def value(name, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, ["n", 3])


RELU = [helper.make_node("Relu", ["image"], ["y"])]
CUSTOM = [
    helper.make_node("Swirl", ["image"], ["a"], domain="my.domain"),
    helper.make_node("FusedConv", ["a"], ["b"], domain="com.microsoft"),
    helper.make_node("Swirl", ["b"], ["y"], domain="my.domain"),
]
BRANCH = helper.make_graph([helper.make_node("Relu", ["image"], ["t"])], "branch", [], [value("t")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"nodes": CUSTOM},
            "operators must be of the ONNX standard, got com.microsoft.FusedConv (1), my.domain.Swirl (2); "
            "export the network without them",
        ),
        (
            {
                "nodes": [helper.make_node("If", ["c"], ["y"], then_branch=BRANCH, else_branch=BRANCH)],
                "stored": {"c": np.array(True)},
            },
            "the network must have no control flow, got If (1); export it with fixed shapes and in evaluation mode",
        ),
        (
            {"nodes": [helper.make_node("LRN", ["image"], ["y"], size=3)]},
            "operators must be among those that Reverie converts, got LRN (1); use the network's own code, path/to/file.py:FACTORY",
        ),
        (
            {"nodes": RELU, "inputs": (value("mask"),)},
            "the network must have one input, got 2 ('image', 'mask'); export it with one image in, logits out",
        ),
        (
            {"nodes": [*RELU, helper.make_node("Exp", ["y"], ["z"])], "outputs": (value("z"),)},
            "the network must have one output, got 2 ('y', 'z'); export it with one image in, logits out",
        ),
        ({"nodes": RELU, "kind": TensorProto.FLOAT16}, "the input must be float32, got float16; export the network in float32"),
        ({"nodes": RELU, "kind": TensorProto.UINT8}, "the input must be float32, got uint8; export the network in float32"),
        (
            {
                "nodes": [helper.make_node("Cast", ["w"], ["v"], to=1), helper.make_node("Conv", ["image", "v"], ["y"])],
                "stored": {"w": np.zeros((3, 3, 1, 1), np.float16)},
            },
            "weights must be float32, got float16 in 'w'; export the network in float32",
        ),
        (
            {"nodes": RELU, "shape": ("n", 3)},
            "the input must have 4 axes (batch, channels, height, width), got 2; export it for images",
        ),
        ({"nodes": RELU}, "the network must give (n, classes) logits, got (n, 3, 8, 8); export it as a classifier"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, arguments, message):
    assert refusal(ModelError, save(tmp_path, **{"stored": {}, **arguments})) == message


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert refusal(ConfigError, tmp_path / "no.onnx") == "must be an ONNX file, got nothing there; check the path"
    assert refusal(ConfigError, tmp_path) == "must be an ONNX file, got a folder; check the path"


def test_a_damaged_file_is_refused(tiny, tmp_path):
    whole, path = tiny[0].read_bytes(), tmp_path / "damaged.onnx"
    for damaged in (whole[: len(whole) // 2], whole[:-7], bytes([whole[0] ^ 0x07]) + whole[1:], os.urandom(2000)):
        path.write_bytes(damaged)
        assert (
            refusal(ConfigError, path) == "must be a whole ONNX file, got one that cannot be parsed; export or fetch it again"
        )
    for empty in (b"", whole[:2]):
        path.write_bytes(empty)
        assert refusal(ConfigError, path) == (
            "must be a whole ONNX file, got one without nodes or without an opset; export or fetch it again"
        )


def test_a_tensor_of_another_size_than_it_says_is_refused(tiny):
    model = onnx.load(tiny[0])
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "0.weight"]
    tensor.raw_data = tensor.raw_data[:-4]
    tiny[0].write_bytes(model.SerializeToString())
    assert refusal(ConfigError, tiny[0]) == (
        "must be a valid ONNX file, got 'TensorProto (tensor name: 0.weight) raw_data size (860 bytes) is too small for the declared "
        "shape and type (864 bytes required).'; export or fetch it again"
    )


def with_external(path, location, **entries):
    """Rewrites the file so that one tensor's data is said to be at `location`."""
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "0.weight"]
    external_data_helper.set_external_data(tensor, location, **entries)
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return data


@pytest.mark.parametrize(
    "location", ["../data.bin", "sub/../../data.bin", "..\\data.bin", "C:\\data.bin", "/etc/hostname", "", "data.bin\0"]
)
def test_external_data_outside_of_the_files_folder_is_refused(tiny, location):
    with_external(tiny[0], location)
    assert refusal(ConfigError, tiny[0]) == (
        f"external data of '0.weight' must lie in the file's own folder, got {location!r}; "
        "put it there and save the file again with onnx.save_model"
    )


def test_external_data_behind_a_link_is_refused(tiny, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.bin"
    outside.write_bytes(with_external(tiny[0], "data.bin"))
    (tiny[0].parent / "data.bin").symlink_to(outside)
    assert refusal(ConfigError, tiny[0]) == (
        f"external data of '0.weight' must lie in the file's own folder, got 'data.bin', a link to {str(outside)!r}; "
        "put it there and save the file again with onnx.save_model"
    )


def test_external_data_that_is_missing_or_too_short_is_refused(tiny):
    data = with_external(tiny[0], "data.bin", offset=0, length=864)
    assert refusal(ConfigError, tiny[0]) == (
        "external data 'data.bin' of '0.weight' must lie beside the file, got nothing there; fetch both files"
    )
    (tiny[0].parent / "data.bin").write_bytes(data[:-4])
    assert refusal(ConfigError, tiny[0]) == (
        "external data 'data.bin' must hold bytes 0 to 864 for '0.weight', got 860 bytes; "
        "fetch it again, with the file that belongs to it"
    )


def test_folded_batch_norms_are_recognised_and_what_helps_is_said(folded):
    network = models.load(str(folded), **CONTRACT)
    with pytest.raises(ModelError) as caught:
        reverie.run(reverie.read_recipe("zeroq"), network, output=folded.parent / "run")
    assert str(caught.value) == (
        f"onnx:{folded}: zeroq needs a batch norm with running statistics, got none but 3 convolutions with a bias, into which exporters "
        "fold them, and then what images are made from is lost; export it with batch norms (torch.onnx.export(..., optimize=False)), "
        "or give --capsule with a file that `reverie capsule` made of this network where labelled images are, or real images with "
        "--calibration --images 0 --set held_out=0, of which --recipe squant needs a few"
    )
    assert not (folded.parent / "run").exists()
