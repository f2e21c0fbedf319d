"""Arrays: the units are right, and adapters give each image once, as the tool indexes it."""

import numpy as np
import pytest
import torch
from tests.formats.test_conformance import CONTRACT, some_images

from reverie.formats import calibration, write
from reverie.formats.modelopt import ModelOpt
from reverie.formats.onnxruntime import OnnxRuntime, Reader
from reverie.formats.tflite import TfLite


@pytest.mark.parametrize(("units", "black", "white"), [("pixels", 0, 1), ("levels", 0, 255)])
def test_black_and_white_are_the_ends_of_the_units(tmp_path, units, black, white):
    low, high = CONTRACT.bounds(torch.zeros(1))
    ends = torch.stack([low.expand(3, 4, 6), high.expand(3, 4, 6)])
    images = some_images(inputs=ends, labels=torch.tensor([0, 1]), sources=())
    write(OnnxRuntime(units=units), images, CONTRACT, 10, tmp_path / "a")
    array = np.load(tmp_path / "a" / "inputs.npy")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[0], black, atol=1e-4)
    np.testing.assert_allclose(array[1], white, atol=1e-4)


def test_inputs_are_the_very_numbers_that_the_network_takes(tmp_path):
    images = some_images()
    write(ModelOpt(), images, CONTRACT, 10, tmp_path / "a")
    assert np.array_equal(np.load(tmp_path / "a" / "inputs.npy"), images.inputs.numpy())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["inputs.npy"]


def test_tflite_has_its_channels_last_one_image_at_a_time(tmp_path):
    images = some_images()
    write(TfLite(), images, CONTRACT, 10, tmp_path / "a")
    stored = np.load(tmp_path / "a" / "inputs.npy")
    given = [item for (item,) in calibration("tflite", images)()]
    assert [item.shape for item in given] == [(1, 4, 6, 3)] * 5
    assert np.array_equal(np.concatenate(given), stored)
    # Row 1, column 2 of the third image's second channel, said in either order.
    assert stored[2, 1, 2, 1] == images.inputs[2, 1, 1, 2]


def test_mct_goes_through_all_images_anew_at_every_call():
    images = some_images()
    generate = calibration("mct", images, batch=2)
    for _ in range(2):
        batches = list(generate())
        assert [[item.shape for item in batch] for batch in batches] == [[(2, 3, 4, 6)], [(2, 3, 4, 6)], [(1, 3, 4, 6)]]
        assert np.array_equal(np.concatenate([item for (item,) in batches]), images.inputs.numpy())


def test_onnx_runtime_gets_every_batch_then_none_and_can_start_again():
    images = some_images()
    reader = Reader(images.inputs.numpy(), "x", batch=3)
    for _ in range(2):
        batches = [reader.get_next(), reader.get_next()]
        assert reader.get_next() is None
        assert reader.get_next() is None
        assert np.array_equal(np.concatenate([batch["x"] for batch in batches]), images.inputs.numpy())
        reader.rewind()


def test_onnx_runtime_takes_it_for_a_calibration_data_reader():
    quantization = pytest.importorskip("onnxruntime.quantization", reason="ONNX Runtime is not installed (extra 'onnx')")
    assert isinstance(calibration("onnxruntime", some_images(), input_name="x"), quantization.CalibrationDataReader)


@pytest.mark.parametrize("target", ["aimet", "torchao"])
@pytest.mark.parametrize("more", [(), (None,)])
def test_a_model_is_shown_every_image_once_and_no_gradient(target, more):
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            seen.append(x)

    images = some_images()
    calibration(target, images, batch=2)(Model(), *more)
    assert [len(batch) for batch in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), images.inputs)
