import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from reverie.errors import ExportError
from reverie.export import _verify as verify
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.observers.minmax import MinMax
from reverie.progress import Silent
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.report.measure import latency
from reverie.runtimes.onnxruntime import OnnxRuntime

SOUND = verify.Parity(
    runtime="onnxruntime",
    max_code_difference=1,
    differing_share=0.001,
    logit_error=1e-7,
    top1_agreement=0.98,
    untied_disagreements=1,
    max_logit_difference=0.5,
    images=100,
    per_tensor={"stem": verify.TensorParity(1, 0.002, 5000), "add": verify.TensorParity(0, 0.0, 5000)},
)


@pytest.fixture
def w4a4(written):
    """An integer model with 4-bit weights and activations, and its file."""
    return written(4, 4, 8)


def damaged(path, name, change, folder):
    """A copy of a file with one stored tensor changed."""
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    values = onnx.numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(values).astype(values.dtype), name))
    onnx.save(model, folder / "damaged.onnx")
    return folder / "damaged.onnx"


def doubled_in_one_channel(scale):
    scale[0] *= 2
    return scale


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("relu_grid.scale", lambda scale: scale * 2),
        ("relu_grid.scale", lambda scale: scale * 1.3),
        ("expand.weight_scale", doubled_in_one_channel),
        ("expand.bias_codes", lambda codes: codes + 2000),
        ("bounded.weight_codes", lambda codes: -codes),
        ("clamp_grid.high", lambda high: np.full_like(high, 15)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_caught(tensor, change, w4a4, images, tmp_path):
    network, path = w4a4
    path = damaged(path, tensor, change, tmp_path)
    with pytest.raises(ExportError, match=r"codes in onnxruntime and in the student must be at most 1 step apart"):
        verify.assert_parity(verify.measure_parity(network, path, images))


@pytest.mark.parametrize(
    ("bits", "tensor", "change"),
    [
        ((4, 4, 8), "expand.bias_codes", lambda codes: codes + 3),
        ((4, 4, 8), "bounded.bias_codes", lambda codes: codes - 3),
        ((8, 8, 8), "expand.bias_codes", lambda codes: codes + 100),
        ((4, 4, 8), "expand.weight_scale", lambda scale: scale * 1.01),
        ((8, 8, 8), "expand.weight_scale", lambda scale: scale * 1.01),
        ((8, 8, 8), "relu_grid.scale", lambda scale: scale * 1.01),
        ((8, 8, 8), "head.weight_scale", lambda scale: scale * 1.01),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_small_damage_is_caught_too(bits, tensor, change, written, images, tmp_path):
    network, path = written(*bits)
    path = damaged(path, tensor, change, tmp_path)
    with pytest.raises(
        ExportError, match=r"must be at most 1 step apart|at most 1% of the codes|^logits: onnxruntime must compute"
    ):
        verify.assert_parity(verify.measure_parity(network, path, images))


@pytest.mark.parametrize("tensor", ["head.weight_scale", "head.bias_codes"])
def test_damage_behind_the_last_codes_is_caught_at_the_logits(tensor, w4a4, images, tmp_path):
    network, path = w4a4
    path = damaged(path, tensor, lambda values: values * 2, tmp_path)
    with pytest.raises(ExportError, match=r"^logits: onnxruntime must compute them from the last codes"):
        verify.assert_parity(verify.measure_parity(network, path, images))


def test_differences_of_rounding_pass():
    verify.assert_parity(SOUND)


def test_the_message_about_codes_names_the_worst_tensor():
    worst = SOUND.per_tensor | {"add": verify.TensorParity(7, 0.25, 5000)}
    with pytest.raises(ExportError) as caught:
        verify.assert_parity(replace(SOUND, max_code_difference=7, per_tensor=worst))
    assert str(caught.value) == (
        "add: codes in onnxruntime and in the student must be at most 1 step apart, got 7 steps, 25.00% of the values differ; "
        "the file does not say what was quantized, please report it"
    )


def test_the_message_about_the_share_of_codes_names_the_tensor_unless_it_is_small():
    with pytest.raises(ExportError) as caught:
        verify.assert_parity(replace(SOUND, per_tensor=SOUND.per_tensor | {"add": verify.TensorParity(1, 0.03, 1000)}))
    assert str(caught.value) == (
        "add: at most 1% of the codes in onnxruntime and in the student must differ, got 3.00%; "
        "the file does not say what was quantized, please report it"
    )
    verify.assert_parity(replace(SOUND, per_tensor=SOUND.per_tensor | {"add": verify.TensorParity(1, 0.03, 80)}))


def test_the_message_about_logits_says_how_wrong_they_are():
    with pytest.raises(ExportError) as caught:
        verify.assert_parity(replace(SOUND, logit_error=0.25))
    assert str(caught.value) == (
        "logits: onnxruntime must compute them from the last codes to 9.8e-04 of the largest, got 2.5e-01; "
        "the file does not say what was quantized, please report it"
    )


def test_the_message_about_classes_counts_them():
    with pytest.raises(ExportError) as caught:
        verify.assert_parity(replace(SOUND, untied_disagreements=6))
    assert str(caught.value) == (
        "logits: onnxruntime and the student must give the same class on 95% of the images, ties not counted, "
        "got 6 other classes on 100 images; the file does not say what was quantized, please report it"
    )


def test_a_file_whose_tensors_are_mostly_hidden_proves_nothing():
    hidden = replace(SOUND, unseen=("stem_2", "relu"), unrounded=("add_2",))
    verify.assert_parity(replace(hidden, unseen=("relu",)))
    verify.assert_parity(hidden)
    with pytest.raises(ExportError) as caught:
        verify.assert_parity(replace(hidden, unseen=("stem_2", "relu", "head", "relu_2")))
    assert str(caught.value) == (
        "codes: onnxruntime must show those of 50% of the tensors without computing otherwise, got 4 of 7 hidden; "
        "try another version of onnxruntime"
    )


class Turned(OnnxRuntime):
    """ONNX Runtime with the logits of other classes."""

    def open(self, path, *, threads=1):
        session = super().open(path, threads=threads)
        return lambda images: np.roll(session(images), 1, axis=1)

    def probe(self, path, names, *, threads=1):
        probe = super().probe(path, names, threads=threads)

        def answer(images):
            logits, codes = probe(images)
            return np.roll(logits, 1, axis=1), codes

        answer.unrounded = probe.unrounded
        return answer


@pytest.mark.parametrize("bits", [(8, 8, 8), (4, 4, 8), (2, 2, None)], ids=str)
def test_a_difference_is_no_excuse_for_itself(bits, written, images):
    network, path = written(*bits)
    parity = verify.measure_parity(network, path, images, runtime=Turned())
    assert parity.untied_disagreements >= 0.9 * len(images)
    with pytest.raises(
        ExportError, match=r"^logits: test_verify and the student must give the same class on 95% of the images"
    ):
        # Otherwise the local check is there first.
        verify.assert_parity(replace(parity, logit_error=0.0))


def test_nothing_but_a_runtime_and_a_target_needs_the_libraries_of_onnx():
    script = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'ml_dtypes'): sys.modules[name] = None\n"
        "import reverie, reverie.pipeline, reverie.export._certificate, reverie.export.torch, reverie.report.metrics\n"
        "from reverie import runtimes\n"
        "try: runtimes.load('onnxruntime')\n"
        "except reverie.ConfigError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.startswith("runtime 'onnxruntime': must be installed, got no module 'onnx")


def test_messages_name_the_runtime():
    with pytest.raises(ExportError, match=r"^logits: openvino must compute them"):
        verify.assert_parity(replace(SOUND, runtime="openvino", logit_error=0.25))


class Merging:
    """ONNX Runtime that pretends not to see a tensor, as if it were merged into a sum."""

    library, reads = "onnxruntime", frozenset({".onnx"})

    def __init__(self, hidden):
        self.hidden = hidden

    def open(self, path, *, threads=1):
        return OnnxRuntime().open(path, threads=threads)

    def probe(self, path, names, *, threads=1):
        probe = OnnxRuntime().probe(path, [name for name in names if name != self.hidden], threads=threads)
        return replace(probe, unrounded=frozenset({self.hidden}))

    def float_layers(self, path, layers):
        return list(layers)


def test_what_a_runtime_leaves_unrounded_is_compared_unrounded(written, images):
    network, path = written(8, 8, 8)
    parity = verify.measure_parity(network, path, images, runtime=Merging("expand"))
    assert parity.unrounded == ("expand",)
    assert parity.per_tensor.keys() == network.activations.keys() - {"expand"}
    # ONNX Runtime does round it, so the sum behind it, and nothing else, differs from the sum of what was not rounded.
    shares = {name: tensor.differing_share for name, tensor in parity.per_tensor.items()}
    assert shares.pop("relu_2") > 0.05
    assert max(shares.values()) < 1e-3
    assert parity.max_code_difference == 1


def test_layers_left_in_float_are_named(w4a4, float_file):
    network, path = w4a4
    assert OnnxRuntime().float_layers(path, network.layers) == []
    with pytest.raises(ExportError) as caught:
        verify.assert_integer(float_file, network)
    assert str(caught.value) == (
        "onnxruntime: all 7 layers must run as integers, got 7 in float: "
        "stem, down, depthwise, expand, left, bounded, head; "
        "the file is right but slow, another version of onnxruntime may fuse them"
    )


def test_a_file_of_another_network_is_refused(w4a4, float_file, images):
    network, _ = w4a4
    with pytest.raises(ExportError) as caught:
        verify.measure_parity(network, float_file, images)
    first = next(iter(network.activations))
    assert str(caught.value) == (
        f"{float_file}: must hold the tensor {first!r}, got none; compare a file with the network it was written from"
    )


def test_a_file_that_onnxruntime_cannot_load_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError) as caught:
        OnnxRuntime().open(path)
    assert str(caught.value) == (
        f"onnxruntime: it must load {path}, got '[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : "
        f"Load model from {path} failed:Protobuf parsing failed.'; try another version of onnxruntime"
    )


def test_latency_is_measured_for_every_file_with_ordered_quartiles(w4a4, float_file):
    _, path = w4a4
    sessions = {name: OnnxRuntime().open(file) for name, file in (("fp32", float_file), ("quantized", path))}
    measured = latency(sessions, (3, 16, 16), batch=2, repeats=8, warmup=1)
    assert measured.keys() == {"fp32", "quantized"}
    for value in measured.values():
        assert 0 < value.lower_quartile <= value.median <= value.upper_quartile


@pytest.mark.parametrize("flat", [True, False])
def test_a_convolution_that_writes_the_logits_is_an_integer_kernel_too(flat, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 6)] + [torch.nn.Flatten()] * flat
    graph = capture(torch.nn.Sequential(*layers).eval(), (3, 8, 8))
    student = place(graph, "integer", weight_bits=4, activation_bits=4, end_bits=8)
    assert {quantizer.grid.bits for quantizer in student.activations.values()} == {8}
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate_activations(graph, student, inputs, MinMax(), batch=4, progress=Silent())
    calibrate_weights(student, MinMax())
    quantized = finish(student)
    Onnx()(quantized, (3, 8, 8), tmp_path / "network.onnx")
    verify.assert_integer(tmp_path / "network.onnx", quantized)
