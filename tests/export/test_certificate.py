"""The third opinion in a certificate: integers alone, beside what a runtime computes."""

import numpy as np
import onnx
import pytest
import torch

from reverie.export import _verify as verify
from reverie.export._certificate import oppose, refer
from reverie.export.onnx import Onnx
from reverie.export.portable import Portable
from reverie.export.tensorrt import TensorRT
from reverie.export.torch import Torch
from reverie.runtimes.onnxruntime import OnnxRuntime
from reverie.runtimes.torch import Torch as Runtime


@pytest.mark.parametrize("bits", [(8, 8, 8), (2, 2, None)], ids=str)
def test_the_reference_has_the_codes_of_onnxruntime(bits, written, images):
    network, path = written(*bits)
    opinion = oppose(refer(network, images), network, path, images, OnnxRuntime())
    assert (opinion.runtime, opinion.images, opinion.layers, opinion.float_layers) == ("onnxruntime", 50, 7, ())
    assert (opinion.max_code_difference, opinion.differing_share, opinion.top1_agreement) == (0, 0.0, 1.0)


@pytest.mark.parametrize("target", [Onnx, TensorRT, Portable])
def test_the_reference_has_the_codes_of_signed_grids_and_of_files_without_zero_points(
    target, patterns, quantizer, images, tmp_path
):
    network, path = quantizer(patterns, images, 8, 8, 8, symmetric=True), tmp_path / "network.onnx"
    target()(network, (3, 16, 16), path)
    answer = refer(network, images)
    assert any(int(codes.min()) < 0 for codes in answer.codes.values())
    opinion = oppose(answer, network, path, images, OnnxRuntime())
    # Both run freely: a sum that is half-way between two codes is rounded either way, and what reads it follows.
    assert opinion.max_code_difference <= 2
    assert opinion.differing_share < 1e-3
    assert opinion.top1_agreement >= 0.98


@pytest.mark.parametrize("bits", [(7, 7, 7), (4, 4, 7)], ids=str)
def test_the_reference_has_the_codes_of_files_that_count_from_zero(bits, quantized, images, tmp_path):
    network, path = quantized(*bits), tmp_path / "network.onnx"
    TensorRT()(network, (3, 16, 16), path)
    opinion = oppose(refer(network, images), network, path, images, OnnxRuntime())
    assert opinion.max_code_difference <= 2
    assert opinion.differing_share < 1e-3


@pytest.mark.parametrize(("damage", "differs"), [("bounded.weight_scale", True), ("head.weight_scale", False)])
def test_the_reference_does_not_agree_with_a_damaged_file(damage, differs, written, images, tmp_path):
    network, path = written(4, 4, 8)
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == damage]
    values = np.ascontiguousarray(-onnx.numpy_helper.to_array(tensor))
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    opinion = oppose(refer(network, images), network, tmp_path / "damaged.onnx", images, OnnxRuntime())
    assert (opinion.max_code_difference > 1, opinion.differing_share > 0) == (differs, differs)
    # Behind the head are logits and no codes.
    assert differs or opinion.top1_agreement < 1


def test_as_many_images_at_a_time_are_compared_as_were_found_undisturbed(written):
    network, path = written(4, 4, 8)
    many = torch.randn(70, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    sizes = []

    class Counting(OnnxRuntime):
        def open(self, path, *, threads=1):
            session = super().open(path, threads=threads)
            return lambda images: (sizes.append(len(images)), session(images))[1]

    opinion = oppose(refer(network, many), network, path, many, Counting())
    assert set(sizes) == {64, 6}
    assert (opinion.images, opinion.max_code_difference, opinion.top1_agreement) == (70, 0, 1.0)


def test_large_images_are_fewer(written):
    assert len(refer(written(4, 4, 8)[0], torch.zeros(3, 3, 512, 512)).logits) == 1


@pytest.mark.parametrize("bits", [(8, 8, 8), (4, 4, 8), (3, 5, 6), (2, 2, None)], ids=str)
def test_locally_no_code_of_onnxruntime_differs_from_the_student(bits, written, images):
    network, path = written(*bits)
    parity = verify.measure_parity(network, path, images)
    assert parity.per_tensor.keys() == network.activations.keys()
    assert (parity.max_code_difference, parity.differing_share) == (0, 0.0)


@pytest.mark.parametrize("bits", [(4, 4, 8), (2, 2, None)], ids=str)
def test_a_program_of_torch_keeps_the_names_of_tensors_that_are_padded_split_and_concatenated(
    bits, quantized, images, tmp_path
):
    network = quantized(*bits)
    Torch()(network, (3, 16, 16), tmp_path / "network.pt2")
    parity = verify.measure_parity(network, tmp_path / "network.pt2", images, runtime=Runtime())
    verify.assert_parity(parity)
    assert parity.per_tensor.keys() == network.activations.keys()
