"""Small ONNX files that describe something huge, or more of themselves: refused before anything grows."""

import time

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from reverie import models
from reverie.errors import ModelError

CONTRACT = {"mean": (0.5,), "std": (0.5,)}


def save(path, nodes, *stored, functions=(), shape=("n", 1, 8, 8)):
    """A file of these nodes from `image` to `y`; `stored` are tensors."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        list(stored),
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=list(functions))
    path.write_bytes(model.SerializeToString())
    return path


def refusal(error, path):
    began = time.perf_counter()
    with pytest.raises(error) as caught:
        models.load(f"onnx:{path}", **CONTRACT)
    assert time.perf_counter() - began < 5
    return str(caught.value).removeprefix(f"onnx:{path}: ")


def chain(depth, fan):
    """Functions, each of which calls the one before it `fan` times."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return [
        helper.make_function(
            "local",
            f"f{level}",
            ["x"],
            ["o0"],
            [
                helper.make_node(f"f{level - 1}" if level else "Identity", ["x"], [f"o{copy}"], domain="local" if level else "")
                for copy in range(fan)
            ],
            imports,
        )
        for level in range(depth)
    ]


def integers(name, *values):
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def test_functions_of_functions_are_counted_before_they_are_written_out(tmp_path):
    path = save(tmp_path / "net.onnx", [helper.make_node("f39", ["image"], ["y"], domain="local")], functions=chain(40, 2))
    assert path.stat().st_size < 10_000
    assert refusal(ModelError, path) == "the network must have at most 200000 nodes with its functions written out, got 1.1e+12"


def test_however_many_they_are_their_number_can_be_told(tmp_path):
    path = save(tmp_path / "net.onnx", [helper.make_node("f399", ["image"], ["y"], domain="local")], functions=chain(400, 10))
    assert refusal(ModelError, path) == "the network must have at most 200000 nodes with its functions written out, got 1e+18"


def test_a_function_that_calls_itself_is_refused(tmp_path):
    first, second = chain(2, 1)
    first.node[0].op_type, first.node[0].domain = "f1", "local"
    path = save(tmp_path / "net.onnx", [helper.make_node("f1", ["image"], ["y"], domain="local")], functions=[first, second])
    assert refusal(ModelError, path).startswith("functions must not call themselves, got 'f")


def test_a_stored_tensor_that_no_memory_holds_is_refused(tmp_path):
    huge = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[10**6, 10**6])
    path = save(tmp_path / "net.onnx", [helper.make_node("MatMul", ["image", "w"], ["y"])], huge)
    assert refusal(ModelError, path) == (
        "stored tensors must have at most 268435456 values, got 1000000 x 1000000 in 'w'; export the network again"
    )


def test_a_stored_tensor_of_a_negative_size_is_refused(tmp_path):
    odd = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-1, 8])
    path = save(tmp_path / "net.onnx", [helper.make_node("MatMul", ["image", "w"], ["y"])], odd)
    assert "got -1 x 8 in 'w'" in refusal(ModelError, path)


def test_a_huge_input_is_refused(tmp_path):
    path = save(tmp_path / "net.onnx", [helper.make_node("Relu", ["image"], ["y"])], shape=("n", 1, 100_000, 100_000))
    assert refusal(ModelError, path) == (
        "the input must have at most 50331648 values, got 1 x 100000 x 100000; give a smaller --input-size"
    )


@pytest.mark.parametrize("batch", [4097, 2**40])
def test_a_batch_that_nobody_has_is_refused(tmp_path, batch):
    path = save(tmp_path / "net.onnx", [helper.make_node("Relu", ["image"], ["y"])], shape=(batch, 1, 8, 8))
    assert refusal(ModelError, path) == f"the batch must be free, or 1 to 4096, got {batch}; export it with a free batch"


def test_a_bias_of_integers_is_refused(tmp_path):
    nodes = [helper.make_node("Flatten", ["image"], ["f"]), helper.make_node("Gemm", ["f", "w", "b"], ["y"])]
    matrix = numpy_helper.from_array(np.ones((64, 3), np.float32), "w")
    path = save(tmp_path / "net.onnx", nodes, matrix, integers("b", 1, 2, 3))
    assert refusal(ModelError, path) == "Gemm 'y': Gemm must be of floating-point data, got integers"


LARGE = "tensors must have at most 268435456 values for two images, got {}; give a smaller input size"


@pytest.mark.parametrize(
    ("nodes", "stored", "message"),
    [
        (
            [helper.make_node("Expand", ["image", "s"], ["e"]), helper.make_node("Relu", ["e"], ["y"])],
            integers("s", 1, 10_000_000, 8, 8),
            "Expand 'e': " + LARGE.format("2 x 10000000 x 8 x 8"),
        ),
        (
            [helper.make_node("Pad", ["image", "s"], ["y"])],
            integers("s", 0, 0, 0, 0, 0, 0, 100_000, 100_000),
            "Pad 'y': " + LARGE.format("2 x 1 x 100008 x 100008"),
        ),
        (
            [helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("Add", ["image", "c"], ["y"])],
            integers("s", 100_000, 100_000),
            "ConstantOfShape 'c': sizes and indices must be at most 4194304 in one array, got 1e+10; export the network again",
        ),
        (
            [helper.make_node("Conv", ["image", "s"], ["y"], pads=[50_000] * 4)],
            numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "s"),
            "Conv 'y': " + LARGE.format("2 x 1 x 100008 x 100008"),
        ),
    ],
)
def test_an_operator_that_makes_something_huge_is_refused_before_it_is_computed(tmp_path, nodes, stored, message):
    assert refusal(ModelError, save(tmp_path / "net.onnx", nodes, stored)).startswith(message)
