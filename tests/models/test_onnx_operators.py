"""Every operator that is converted, with the attributes that change what it computes, against ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from reverie.errors import ModelError
from reverie.graph.capture import capture
from reverie.models._onnx_file import read
from reverie.models._onnx_module import OnnxModule
from reverie.models._onnx_operators import OPERATORS
from reverie.models._onnx_reference import OnnxReference

_GENERATOR = np.random.default_rng(0)


def floats(*shape):
    return _GENERATOR.standard_normal(shape).astype(np.float32)


def ints(*values):
    return np.array(values, dtype=np.int64)


def model_of(nodes, stored, *, opset, rank, shape=("n", 4, 9, 8)):
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def one(kind, *stored, opset=18, rank=4, first="x", **attributes):
    """A model of one node that reads x and then `stored`; None leaves an input out."""
    held = {f"c{index}": value for index, value in enumerate(stored) if value is not None}
    inputs = [first, *(f"c{index}" if value is not None else "" for index, value in enumerate(stored))]
    return model_of([helper.make_node(kind, inputs, ["y"], **attributes)], held, opset=opset, rank=rank)


def chain(*nodes, opset=18, rank=4, **stored):
    """A model of several nodes: (kind, inputs, outputs, attributes)."""
    made = [helper.make_node(kind, inputs, outputs, **attributes) for kind, inputs, outputs, attributes in nodes]
    return model_of(made, stored, opset=opset, rank=rank)


def positive(kind, **attributes):
    return chain(("Abs", ["x"], ["a"], {}), ("Add", ["a", "c"], ["b"], {}), (kind, ["b"], ["y"], attributes), c=floats(1) ** 2)


CASES = {
    "Abs": [one("Abs")],
    "Add": [one("Add", floats(1, 4, 1, 1)), one("Add", floats(1)), chain(("Add", ["x", "x"], ["y"], {}))],
    "AveragePool": [
        one("AveragePool", kernel_shape=[3, 2], strides=[2, 2]),
        one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 1]),
        one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        one("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1], count_include_pad=1),
        one("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, opset=19),
    ],
    "BatchNormalization": [one("BatchNormalization", floats(4), floats(4), floats(4), floats(4) ** 2, epsilon=1e-3)],
    "Cast": [one("Cast", to=TensorProto.FLOAT)],
    "CastLike": [chain(("CastLike", ["c", "x"], ["d"], {}), ("Mul", ["x", "d"], ["y"], {}), c=ints(3))],
    "Clip": [
        one("Clip", np.float32(-0.5), np.float32(0.7)),
        one("Clip", None, np.float32(0.7)),
        one("Clip", np.float32(-0.1)),
        one("Clip"),
    ],
    "Concat": [chain(("Relu", ["x"], ["a"], {}), ("Concat", ["x", "a"], ["y"], {"axis": 1}))],
    "Constant": [
        chain(("Constant", [], ["c"], {"value_floats": [1.0, 2.0]}), ("Constant", [], ["d"], {"value_float": 3.0}),
              ("Constant", [], ["e"], {"value_ints": [0, 4]}), ("Pad", ["x", "e", "d", "f"], ["a"], {}),
              ("Slice", ["a", "g", "h", "f"], ["b"], {}), ("Split", ["c", "i"], ["j", "k"], {}),
              ("Add", ["b", "k"], ["y"], {}), f=ints(3), g=ints(1), h=ints(12), i=ints(1, 1))
    ],
    "ConstantOfShape": [
        chain(("Shape", ["x"], ["s"], {"start": 1}), ("ConstantOfShape", ["s"], ["c"],
              {"value": numpy_helper.from_array(floats(1))}), ("Add", ["x", "c"], ["y"], {})),
        chain(("ConstantOfShape", ["s"], ["c"], {}), ("Add", ["x", "c"], ["y"], {}), s=ints(4, 1, 1)),
    ],
    "Conv": [
        one("Conv", floats(6, 4, 3, 3), floats(6), pads=[1, 0, 1, 0], strides=[2, 1]),
        one("Conv", floats(8, 1, 3, 3), group=4, dilations=[2, 2]),
        one("Conv", floats(6, 2, 3, 3), group=2, pads=[0, 0, 1, 1], strides=[2, 2]),
        one("Conv", floats(6, 4, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
        one("Conv", floats(6, 4, 3, 2), auto_pad="SAME_LOWER", strides=[2, 2]),
        one("Conv", floats(6, 4, 3, 2), auto_pad="VALID"),
        chain(("Reshape", ["x", "s"], ["a"], {}), ("Conv", ["a", "w"], ["y"], {"pads": [1, 1]}), rank=3,
              s=ints(0, 4, 72), w=floats(5, 4, 3)),
    ],
    "DepthToSpace": [one("DepthToSpace", blocksize=2, mode=mode) for mode in ("DCR", "CRD")],
    "Div": [one("Div", floats(1, 4, 1, 1)), one("Div", floats(1))],
    "Dropout": [one("Dropout")],
    "Elu": [one("Elu"), one("Elu", alpha=0.3)],
    "Equal": [chain(("Equal", ["c", "d"], ["e"], {}), ("Where", ["e", "x", "f"], ["y"], {}), c=ints(1), d=ints(2), f=floats(1))],
    "Erf": [one("Erf")],
    "Exp": [one("Exp")],
    "Expand": [one("Expand", ints(2, 1, 4, 1, 1), rank=5)],
    "Flatten": [one("Flatten", rank=2), one("Flatten", axis=2, rank=2), one("Flatten", axis=-1, rank=2)],
    "Floor": [one("Floor")],
    "Gather": [one("Gather", ints(2, 0), axis=1), one("Gather", np.array(1), axis=2, rank=3),
               one("Gather", np.array([[0, 1], [3, -1]]), axis=1, rank=5)],
    "Gelu": [one("Gelu", opset=20), one("Gelu", opset=20, approximate="tanh")],
    "Gemm": [
        chain(("Flatten", ["x"], ["a"], {}), ("Gemm", ["a", "w", "b"], ["y"], settings), rank=2,
              w=floats(*((5, 288) if settings.get("transB") else (288, 5))), b=bias)
        for settings, bias in (({"transB": 1}, floats(5)), ({"alpha": 0.5, "beta": 2.0}, floats(1, 5)), ({}, floats(1)))
    ] + [chain(("ReduceMean", ["x", "n"], ["a"], {"keepdims": 0}), ("Gemm", ["a", "a"], ["y"], {"transA": 1, "alpha": 0.1}), rank=2,
               n=ints(2, 3))],
    "GlobalAveragePool": [one("GlobalAveragePool")],
    "GlobalMaxPool": [one("GlobalMaxPool")],
    "HardSigmoid": [one("HardSigmoid"), one("HardSigmoid", alpha=1 / 6, beta=0.5)],
    "HardSwish": [one("HardSwish"), chain(("HardSigmoid", ["x"], ["a"], {"alpha": 1 / 6}), ("Mul", ["a", "x"], ["y"], {})),
                  chain(("HardSigmoid", ["x"], ["a"], {}), ("Mul", ["x", "a"], ["y"], {}))],
    "Identity": [one("Identity")],
    "LayerNormalization": [one("LayerNormalization", floats(8), floats(8)), one("LayerNormalization", floats(9, 8), axis=2)],
    "LeakyRelu": [one("LeakyRelu"), one("LeakyRelu", alpha=0.3)],
    "Log": [positive("Log")],
    "LogSoftmax": [one("LogSoftmax", axis=1), one("LogSoftmax", opset=11)],
    "MatMul": [
        one("MatMul", floats(8, 5)),
        chain(("Transpose", ["x"], ["a"], {"perm": [0, 1, 3, 2]}), ("MatMul", ["x", "a"], ["y"], {})),
        chain(("MatMul", ["x", "w"], ["a"], {}), ("Add", ["b", "a"], ["y"], {}), w=floats(8, 5), b=floats(5)),
        chain(("MatMul", ["x", "w"], ["a"], {}), ("Add", ["a", "a"], ["y"], {}), w=floats(8, 5)),
        chain(("MatMul", ["x", "w"], ["a"], {}), ("Add", ["a", "b"], ["c"], {}), ("Add", ["a", "c"], ["y"], {}),
              w=floats(8, 5), b=floats(5)),
    ],
    "Max": [chain(("Max", ["c", "x"], ["y"], {}), c=floats(1)), one("Max", floats(1)), one("Max", floats(4, 1, 1))],
    "MaxPool": [
        one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        one("MaxPool", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
        one("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        one("MaxPool", kernel_shape=[2, 2], dilations=[2, 1]),
    ],
    "Min": [chain(("Min", ["c", "x"], ["y"], {}), c=floats(1)), one("Min", floats(1)), one("Min", floats(4, 1, 1))],
    "Mish": [one("Mish")],
    "Mul": [one("Mul", floats(1, 4, 1, 1)), one("Mul", floats(1))],
    "Neg": [one("Neg")],
    "PRelu": [one("PRelu", floats(4, 1, 1)), one("PRelu", floats(1))],
    "Pad": [
        one("Pad", ints(0, 1, 2, 0, 0, 2, 0, 1), np.float32(0.5)),
        one("Pad", ints(0, 0, 2, 1, 0, 0, 1, 1), mode="reflect"),
        one("Pad", ints(0, 0, 2, 1, 0, 0, 1, 1), mode="edge"),
        one("Pad", ints(2, 1), None, ints(-1), opset=19),
    ],
    "Pow": [one("Pow", np.float32(2))],
    "Reciprocal": [positive("Reciprocal")],
    "ReduceMax": [one("ReduceMax", axes=[2, 3], opset=13), one("ReduceMax", ints(1), keepdims=0, rank=3)],
    "ReduceMean": [one("ReduceMean", axes=[2, 3], opset=11), one("ReduceMean", ints(-1), keepdims=0, rank=3)],
    "ReduceProd": [
        chain(("Shape", ["x"], ["s"], {"start": 1}), ("ReduceProd", ["s"], ["p"], {"keepdims": 1}),
              ("Concat", ["m", "p"], ["t"], {"axis": 0}), ("Reshape", ["x", "t"], ["y"], {}), rank=2, m=ints(-1))
    ],
    "ReduceSum": [one("ReduceSum", ints(2, 3)), one("ReduceSum", noop_with_empty_axes=1)],
    "Relu": [one("Relu")],
    "Reshape": [one("Reshape", ints(0, 2, -1, 4)), one("Reshape", ints(-1, 288), rank=2)],
    "SequenceAt": [
        chain(("SplitToSequence", ["x", "s"], ["q"], {"axis": 1}), ("SequenceAt", ["q", "i"], ["y"], {}), s=ints(1, 3), i=np.array(1))
    ],
    "Shape": [
        # The channel shuffle, as exporters write it.
        chain(("Shape", ["x"], ["s"], {}), ("Gather", ["s", "zero"], ["n"], {}), ("Gather", ["s", "one"], ["c"], {}),
              ("Div", ["c", "two"], ["h"], {}), ("Unsqueeze", ["n", "axes"], ["n1"], {}), ("Unsqueeze", ["h", "axes"], ["h1"], {}),
              ("Concat", ["n1", "twos", "h1", "rest"], ["t"], {"axis": 0}), ("Cast", ["t"], ["t7"], {"to": TensorProto.INT64}),
              ("Reshape", ["x", "t7"], ["y"], {}),
              rank=5, zero=np.array(0), one=np.array(1), two=np.array(2), axes=ints(0), twos=ints(2), rest=ints(9, 8))
    ],
    "Sigmoid": [one("Sigmoid"), chain(("Sigmoid", ["x"], ["a"], {}), ("Mul", ["x", "a"], ["y"], {}))],
    "Slice": [one("Slice", ints(1, -3), ints(9, 2**62), ints(2, 3), ints(2, 1)), one("Slice", ints(0, 1), ints(9, 3))],
    "Softmax": [one("Softmax", axis=1), one("Softmax", opset=11), one("Softmax", axis=2, opset=12)],
    "Softplus": [one("Softplus")],
    "Split": [
        chain(("Split", ["x"], ["a", "b"], {"axis": 1, "split": [1, 3]}), ("Add", ["a", "b"], ["y"], {}), opset=11),
        chain(("Split", ["x"], ["a", "b"], {"axis": 3, "num_outputs": 2}), ("Sub", ["a", "b"], ["y"], {})),
    ],
    "SplitToSequence": [
        chain(("SplitToSequence", ["x", "s"], ["q"], {"axis": 1}), ("SequenceAt", ["q", "i"], ["y"], {}), s=np.array(2), i=np.array(0))
    ],
    "Sqrt": [positive("Sqrt")],
    "Squeeze": [
        chain(("GlobalAveragePool", ["x"], ["a"], {}), ("Squeeze", ["a"], ["y"], {"axes": [2, 3]}), opset=11, rank=2),
        chain(("GlobalAveragePool", ["x"], ["a"], {}), ("Squeeze", ["a", "c"], ["y"], {}), c=ints(-1), rank=3),
    ],
    "Sub": [one("Sub", floats(1, 4, 1, 1)), one("Sub", floats(1))],
    "Sum": [chain(("Relu", ["x"], ["a"], {}), ("Sum", ["x", "a", "c"], ["y"], {}), c=floats(4, 1, 1))],
    "Swish": [],
    "Tanh": [one("Tanh")],
    "Transpose": [one("Transpose"), one("Transpose", perm=[0, 2, 3, 1])],
    "Unsqueeze": [one("Unsqueeze", axes=[0, 2], opset=11, rank=6), one("Unsqueeze", ints(-1, 1), rank=6)],
    "Where": [chain(("Where", ["c", "x", "d"], ["y"], {}), c=np.array([True, False, True, True]).reshape(4, 1, 1), d=floats(1))],
}  # fmt: skip


@pytest.mark.parametrize(
    "model", [pytest.param(model, id=f"{kind}{index}") for kind, models in CASES.items() for index, model in enumerate(models)]
)
def test_an_operator_computes_what_onnx_runtime_does(model):
    x = torch.from_numpy(floats(3, 4, 9, 8))
    module = OnnxModule(model, torch.zeros(2, 4, 9, 8))
    expected = OnnxReference(model, channels_last=False)(x)
    torch.testing.assert_close(module(x).detach(), expected[: len(module(x))], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Shape", "Reshape", "ReduceProd", "Expand", "Split"])
def test_sizes_stay_free_of_the_batch_that_was_traced(kind):
    for model in CASES[kind][:1]:
        x = torch.from_numpy(floats(5, 4, 9, 8))
        module = OnnxModule(model, torch.zeros(2, 4, 9, 8))
        assert torch.equal(capture(module, (4, 9, 8))(x), module(x))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_size_is_a_free_one(size, tmp_path):
    model = one("Flatten", rank=2)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(model, tmp_path / "network.onnx")
    model = read(tmp_path / "network.onnx")
    assert not model.graph.input[0].type.tensor_type.shape.dim[0].WhichOneof("value")
    x = torch.from_numpy(floats(3, 4, 9, 8))
    assert torch.equal(OnnxModule(model, torch.zeros(2, 4, 9, 8))(x), OnnxReference(model, channels_last=False)(x))


def logits_of(model, folder):
    onnx.save(model, folder / "network.onnx")
    return read(folder / "network.onnx")


def test_identities_behind_a_softmax_leave_with_it(tmp_path):
    model = chain(
        ("Flatten", ["x"], ["l"], {}),
        ("Softmax", ["l"], ["p"], {}),
        ("Identity", ["p"], ["i"], {}),
        ("Identity", ["i"], ["y"], {}),
        rank=2,
    )
    assert [node.op_type for node in logits_of(model, tmp_path).graph.node] == ["Flatten"]


def test_probabilities_that_are_moved_are_refused(tmp_path):
    model = chain(("Softmax", ["x"], ["p"], {"axis": 1}), ("Flatten", ["p"], ["y"], {}), rank=2)
    with pytest.raises(ModelError) as caught:
        logits_of(model, tmp_path)
    assert str(caught.value) == (
        "the network must give logits, got probabilities behind a Flatten; export it without its Softmax"
    )


def test_sparse_constants_are_refused_by_name(tmp_path):
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(floats(1), "held"), numpy_helper.from_array(ints(2)), [4])
    model = chain(("Constant", [], ["c"], {"sparse_value": sparse}), ("Add", ["x", "c"], ["y"], {}))
    with pytest.raises(ModelError) as caught:
        logits_of(model, tmp_path)
    assert str(caught.value) == "tensors must be stored whole, got sparse ones in 'c'; export it without"


@pytest.mark.parametrize("error", [StopIteration, AttributeError])
def test_an_operator_that_meets_another_kind_of_value_is_named(error, monkeypatch):
    def fails(*_):
        raise error("another kind")

    monkeypatch.setitem(OPERATORS, "Abs", fails)
    with pytest.raises(ModelError) as caught:
        OnnxModule(one("Abs"), torch.zeros(2, 4, 9, 8))
    assert str(caught.value) == (
        f"Abs 'y': must be used as Reverie converts it, got {error.__name__}: another kind; check the input size"
    )


def test_swish_is_x_times_its_sigmoid():
    # Of opset 24, which ONNX Runtime may not have yet.
    x = torch.from_numpy(floats(3, 4, 9, 8))
    for alpha in (1.0, 1.7):
        module = OnnxModule(one("Swish", opset=24, alpha=alpha), x)
        torch.testing.assert_close(module(x), x / (1 + torch.exp(-alpha * x)))


def test_every_operator_has_a_case():
    assert set(CASES) == set(OPERATORS)


def test_idioms_become_the_operators_they_were():
    def operators(model):
        graph = capture(OnnxModule(model, torch.zeros(2, 4, 9, 8)), (4, 9, 8))
        return [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]

    assert operators(CASES["Sigmoid"][1]) == ["silu.default"]
    assert operators(CASES["HardSwish"][1]) == ["hardswish.default"]
    assert operators(CASES["HardSwish"][2]) == ["mul.Tensor", "add.Tensor", "clamp.default", "mul.Tensor"]
    assert operators(CASES["MatMul"][2]) == ["linear.default"]
    assert operators(CASES["Clip"][0]) == ["clamp.default"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            one("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
            "AveragePool 'y': AveragePool must pad both sides alike or count the zeros, got pads [0, 0, 1, 1]",
        ),
        (
            one("Conv", floats(6, 5, 3, 3)),
            "Conv 'y': must be used as Reverie converts it, got RuntimeError: Given groups=1, weight of size [6, 5, 3, 3], expected "
            "input[2, 4, 9, 8] to have 5 channels, but got 4 channels instead; check the input size",
        ),
        (
            one("Cast", to=TensorProto.INT64),
            "Cast 'y': a Cast must keep floating-point data floating-point, got one to integers",
        ),
    ],
)
def test_a_use_that_is_not_converted_is_refused_with_its_node(model, message):
    with pytest.raises(ModelError) as caught:
        OnnxModule(model, torch.zeros(2, 4, 9, 8))
    assert str(caught.value) == message
