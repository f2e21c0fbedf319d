"""Programs of `torch.export`: their codes, and that nothing is called an integer kernel which is none."""

import numpy as np
import pytest
import torch

from reverie.errors import ExportError
from reverie.export import _verify as verify
from reverie.export.torch import Torch as Exporter
from reverie.runtimes.torch import Torch

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def program(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "network.pt2"
    Exporter()(small[1], SHAPE, path)
    return path


def test_every_tensor_is_found_and_has_the_codes_of_the_student(small, program):
    _, quantized, _, images = small
    parity = verify.measure_parity(quantized, program, torch.from_numpy(images), runtime=Torch())
    verify.assert_parity(parity)
    assert parity.runtime == "torch"
    assert parity.per_tensor.keys() == quantized.activations.keys()
    assert parity.unrounded == ()
    assert parity.differing_share < 1e-3
    assert parity.top1_agreement == 1


def test_codes_are_those_of_the_right_tensor(small, program):
    _, quantized, _, images = small
    logits, codes = Torch().probe(program, ["x"])(images)
    assert codes.keys() == {"x"}
    grid = quantized.activations["x"]
    expected = np.clip(np.rint(images / grid.scale.numpy()) + grid.zero_point.numpy(), 0, 255)
    assert np.abs(codes["x"].astype(int) - expected).max() <= 1
    assert np.array_equal(logits, Torch().open(program)(images))


def test_uncompiled_no_layer_is_an_integer_kernel(small, program):
    assert Torch().float_layers(program, small[1].layers) == list(small[1].layers)
    with pytest.raises(ExportError, match=r"^torch: all 3 layers must run as integers, got 3 in float: first, second, head; "):
        verify.assert_integer(program, small[1], runtime=Torch())
    assert Exporter.device == "torch.compile on x86"


def test_the_threads_of_the_process_stay_as_they_were(small, program):
    before = torch.get_num_threads()
    Torch().open(program, threads=before + 1)(small[3])
    assert torch.get_num_threads() == before


def test_a_tensor_that_is_not_there_is_named(program):
    with pytest.raises(ExportError) as caught:
        Torch().probe(program, ["nowhere"])
    assert str(caught.value) == (
        f"{program}: must hold the tensor 'nowhere', got none; compare a file with the network it was written from"
    )


@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_a_file_that_breaks_off_is_named(program, keep, tmp_path):
    path = tmp_path / "network.pt2"
    path.write_bytes(program.read_bytes()[:keep])
    with pytest.raises(ExportError, match=rf"^{path}: must be a whole archive, got .*; export it again$"):
        Torch().open(path)


def test_images_of_another_shape_are_refused(program):
    with pytest.raises(ExportError, match=r"^torch: it must run the network, got .*; try another version of torch$"):
        Torch().open(program)(np.zeros((1, 1, 8, 8), np.float32))
