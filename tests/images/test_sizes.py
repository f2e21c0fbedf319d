"""Images smaller than the network's own, from which it learns as well."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from reverie.errors import ConfigError
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import load_images
from reverie.pipeline import run
from reverie.recipe import read
from reverie.stages import as_teacher, learning_view

QUICK = {"images": 16, "held_out": 8, "estimate_images": 0, "synthesis.steps": 20, "synthesis.batch": 8, "image_scale": 0.5}


def test_a_contract_is_scaled_with_its_margin():
    contract = InputContract(channels=3, height=224, width=160, mean=(0.5,) * 3, std=(0.25,) * 3, resize=256)
    half = contract.scaled(0.5)
    assert (half.shape, half.resize, half.mean) == ((3, 112, 80), 128, contract.mean)
    assert contract.scaled(1.0) == contract


def test_in_another_size_an_image_keeps_its_means_and_loses_its_answers():
    blocks = torch.arange(16.0).view(1, 1, 4, 4)
    images = Images(inputs=blocks.repeat_interleave(2, 2).repeat_interleave(2, 3), logits=torch.zeros(1, 3), sources=("real",))
    half = images.resized(4, 4)
    # Away from the edges the antialiasing filter weighs the pixels around as much on both sides.
    assert torch.allclose(half.inputs[..., 1:3, 1:3], blocks[..., 1:3, 1:3], atol=1e-5)
    assert half.logits is None and half.sources == ("real",)
    assert images.resized(8, 8) is images


def test_a_student_learns_from_small_images_and_is_judged_in_the_networks_size(tiny_cnn, tmp_path):
    network = tiny_cnn()
    real = network.held_out().evenly(8)
    recipe = read("adaround", QUICK | {"reconstruction.iterations": 20, "quantization.weight_bits": 4})
    done = run(recipe, network, output=tmp_path / "run", calibration=real, evaluation=network.held_out())
    assert load_images(done.path / "images.safetensors").inputs.shape == (16, 3, 8, 8)
    assert done.metrics["images"]["source"] == {"zeroq": 16, "real": 8}
    assert done.metrics["agreement"]["synthetic"]["images"] == 8
    assert done.metrics["exported"]["top1"] > 0.9
    assert done.metrics["parity"]["max_code_difference"] <= 1


def test_without_others_the_small_images_prove_the_file(tiny_cnn, tmp_path):
    done = run(read("zeroq", QUICK | {"held_out": 0}), tiny_cnn(), output=tmp_path / "run")
    assert done.metrics["parity"]["top1_agreement"] == 1.0


def test_budgets_of_bits_are_about_the_networks_own_images(tiny_cnn, tmp_path):
    pytest.importorskip("scipy")
    spent = []
    for scale in (1.0, 0.5):
        wanted = QUICK | {"image_scale": scale, "mixed_precision.bit_operations": 64.0, "mixed_precision.images": 8}
        done = run(read("zeroq", wanted), tiny_cnn(), output=tmp_path / f"{scale:g}")
        told = done.metrics["mixed_precision"]
        spent.append([tensor["elements"] for tensor in told["tensors"]])
    assert spent[0] == spent[1]


def test_a_network_that_takes_one_size_only_is_named(tiny_cnn):
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 3)).eval()
    teacher = as_teacher(replace(tiny_cnn(), module=flat))
    with pytest.raises(ConfigError) as error:
        learning_view(read("zeroq", QUICK), teacher)
    assert str(error.value) == "image_scale must be 1 for tiny, which does not take images of 8 x 8, got 0.5; leave it out"


def test_a_generator_makes_one_size(tiny_cnn):
    with pytest.raises(ConfigError) as error:
        learning_view(read("gdfq", {"image_scale": 0.5}), as_teacher(tiny_cnn()))
    assert (
        str(error.value) == "image_scale must be 1 with gdfq, whose generator makes all sets of images, got 0.5; leave it out"
    )
