"""Images smaller than the network's own, from which it learns as well."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from reverie import budget, pipeline
from reverie.cli import main
from reverie.errors import ConfigError
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import load_images
from reverie.pipeline import run, run_synthesis
from reverie.progress import Silent
from reverie.recipes import read
from reverie.request import check
from reverie.stages import as_teacher
from reverie.synthesis import Teacher

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


def test_real_images_that_nothing_else_is_judged_on_are_judged_on_whole(tiny_cnn, tmp_path, monkeypatch):
    judged = {}

    def spy(*args, **kwargs):
        judged.update(args[4])
        return collect(*args, **kwargs)

    collect = pipeline.collect
    monkeypatch.setattr(pipeline, "collect", spy)
    real = tiny_cnn().held_out().evenly(16)
    settings = {"images": 0, "held_out": 0, "estimate_images": 0, "image_scale": 0.5}
    run(read("zeroq", settings), tiny_cnn(), output=tmp_path / "run", calibration=real)
    assert judged.keys() == {"calibration"} and judged["calibration"] is real


def test_images_are_compared_in_one_size_also_where_the_last_layer_reads_maps(tiny_cnn, tmp_path):
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    network = replace(tiny_cnn(), module=nn.Sequential(*layers).eval())
    recipe = read("zeroq", QUICK)
    done = run(recipe, network, output=tmp_path / "run", evaluation=network.held_out())
    dreams = run_synthesis(recipe, network, output=tmp_path / "dreams", calibration=network.held_out())
    for found in (done, dreams):
        assert set(found.metrics["images"]["separation"]) == {"zeroq", "real"}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_budgets_of_bits_are_about_the_networks_own_images(tiny_cnn, tmp_path, scale):
    pytest.importorskip("scipy")
    wanted = QUICK | {"image_scale": scale, "mixed_precision.effective_activation_bits": 5.0, "mixed_precision.images": 8}
    told = run(read("zeroq", wanted), tiny_cnn(), output=tmp_path / "run").metrics["mixed_precision"]
    tensors = [tensor for tensor in told["tensors"] if tensor["kind"] == "activation"]
    assert tensors[0]["elements"] == 3 * 16 * 16
    whole = sum(tensor["elements"] for tensor in tensors)
    assert told["effective_activation_bits"] == sum(tensor["elements"] * tensor["bits"] for tensor in tensors) / whole
    assert 4 < told["effective_activation_bits"] <= 5


def test_a_step_on_small_images_is_what_is_timed(tiny_cnn, monkeypatch):
    seen = []

    def timed(device, trial):
        arguments = (*trial.args, *trial.keywords.values())
        seen.extend(part.input.shape[1:] for part in arguments if isinstance(part, Teacher))
        return 1.0

    monkeypatch.setattr(budget, "_timed", timed)
    budget.step_costs(read("zeroq", QUICK), as_teacher(tiny_cnn()), None, progress=Silent())
    assert seen == [(8, 8), (16, 16)]


def test_a_network_that_takes_one_size_only_is_refused_and_leaves_the_folder_free(tiny_cnn, tmp_path):
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 3)).eval()
    network = replace(tiny_cnn(), module=flat)
    with pytest.raises(ConfigError) as error:
        run(read("zeroq", QUICK), network, output=tmp_path / "run")
    assert (
        str(error.value)
        == "image_scale must be 1 for tiny, which does not take images of 8 x 8, got 0.5; use --set image_scale=1"
    )
    run(read("zeroq", QUICK | {"image_scale": 1.0}), network, output=tmp_path / "run")


def test_a_generator_makes_one_size_and_that_is_known_before_the_network_is_looked_at(tiny_cnn):
    with pytest.raises(ConfigError) as error:
        check(read("gdfq", {"image_scale": 0.5}), tiny_cnn(), calibrated=False, device="cpu")
    assert (
        str(error.value)
        == "image_scale must be 1 with gdfq, whose generator makes all sets of images, got 0.5; use --set image_scale=1"
    )


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_scale_is_a_share(scale):
    with pytest.raises(ConfigError) as error:
        read("zeroq", {"image_scale": scale})
    assert str(error.value) == f"recipe zeroq: image_scale must be 0.01 to 1, got {scale}"


def test_a_file_is_made_again_from_a_run_with_small_images_and_diagnosed(tmp_path):
    out = str(tmp_path / "run")
    small = ["--set", "image_scale=0.75", "--images", "16", "--set", "synthesis.steps=10", "--set", "held_out=0"]
    assert main(["quantize", "embedded:digits", "--recipe", "zeroq", "--output", out, *small]) == 0
    assert main(["export", out, "--target", "onnx", "--output", str(tmp_path / "again.onnx")]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "run" / "network.onnx").read_bytes()
    assert main(["diagnose", out]) == 0
    assert load_images(tmp_path / "run" / "images.safetensors").inputs.shape == (16, 1, 24, 24)
