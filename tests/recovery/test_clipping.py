"""Excited images reach the extremes of the activations that batch-norm-matched images miss, and set the ranges."""

import pytest
import torch

from reverie.checkpoints import Folder, Forgetful
from reverie.errors import ConfigError
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.operators import AVERAGES, CLIPPING, LINEARS
from reverie.graph.placement import place
from reverie.graph.taps import tap
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.clipping import Clipping, clip_activations, excite
from reverie.synthesis import Teacher
from reverie.synthesis._losses import total_variation
from reverie.synthesis.zeroq import ZeroQ

FAST = Clipping(images=48, steps=60)


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    network = tiny_cnn()
    return Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)


def excited(teacher, settings=FAST, seed=0, checkpoints=None):
    return excite(teacher, settings, seed=Seed(seed), checkpoints=checkpoints or Forgetful(), progress=Silent())


def matched(teacher, seed=0):
    return ZeroQ(steps=60)(teacher, 48, seed=Seed(seed), checkpoints=Forgetful(), progress=Silent()).inputs


def upper_ends(teacher, inputs):
    """Of the pooled features and the logits: the largest value of each channel, averaged over channels."""
    names = [node.name for node in teacher.graph.graph.nodes if node.target in AVERAGES | LINEARS]
    with torch.no_grad():
        return torch.stack([values.flatten(1).amax(0).mean() for values in tap(teacher.graph, names)(inputs).values()])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_excited_images_reach_further_than_images_that_match_batch_norms(teacher, seed):
    ours, theirs = excited(teacher, seed=seed), matched(teacher, seed=seed)
    labels = torch.arange(48) % teacher.classes
    logits = teacher.logits(ours)
    assert torch.equal(logits.argmax(1), labels)
    assert logits.gather(1, labels[:, None]).mean() > 2 * teacher.logits(theirs).amax(1).mean()
    assert (upper_ends(teacher, ours) > 1.08 * upper_ends(teacher, theirs)).all()


def test_pixels_are_valid_and_labels_cycle_over_the_classes_across_batches(teacher):
    images = excited(teacher, Clipping(images=7, batch=2, steps=60))
    assert images.shape == (7, *teacher.input.shape)
    low, high = teacher.input.bounds(images)
    assert ((images >= low) & (images <= high)).all()
    assert teacher.logits(images).argmax(1).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_variation_term_smooths(teacher):
    rough, smooth = (excited(teacher, Clipping(images=8, steps=40, variation_weight=weight)) for weight in (0.0, 1.0))
    assert total_variation(smooth) < 0.8 * total_variation(rough)


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_teacher_alone(teacher):
    before = {name: tensor.clone() for name, tensor in teacher.graph.state_dict().items()}
    settings = Clipping(images=6, steps=5, batch=4)
    assert torch.equal(excited(teacher, settings), excited(teacher, settings))
    assert not torch.equal(excited(teacher, settings), excited(teacher, settings, seed=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.graph.state_dict().items())


def test_a_killed_excitation_goes_on_to_the_same_images(teacher, tmp_path):
    class Killed(Exception):
        pass

    class Dying(Folder):
        def save(self, name, part):
            super().save(name, part)
            raise Killed

    settings = Clipping(images=6, steps=5, batch=4)
    with pytest.raises(Killed):
        excited(teacher, settings, checkpoints=Dying(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["excited-0-unfinished.safetensors"]
    assert torch.equal(excited(teacher, settings, checkpoints=Folder(tmp_path)), excited(teacher, settings))


@pytest.mark.parametrize("percentile", [100.0, 99.0, 90.0])
def test_ranges_are_the_percentiles_of_the_full_precision_values(teacher, percentile):
    inputs = excited(teacher, Clipping(images=16, steps=20))
    reference = fold_batch_norms(teacher.graph)
    student = place(reference, "integer", weight_bits=4, activation_bits=8, end_bits=8)
    clip_activations(reference, student, inputs, Clipping(percentile=percentile), progress=Silent())
    with torch.no_grad():
        values = tap(reference, student.activations)(inputs)
    behind_relu = {node.name for node in reference.graph.nodes if node.target in CLIPPING}
    assert behind_relu & set(student.activations)
    for name, quantizer in student.activations.items():
        assert quantizer.calibrated
        grid, flat = quantizer.grid, values[name].flatten()
        low = (grid.quant_min - quantizer.zero_point) * quantizer.scale
        high = (grid.quant_max - quantizer.zero_point) * quantizer.scale
        expected = torch.quantile(flat, percentile / 100)
        # Half a step by rounding the zero point; below the maximum, what a sample of the values tells.
        tolerance = 0.51 * quantizer.scale + (0.0 if percentile == 100.0 else 0.05 * expected.abs())
        assert abs(high - expected) <= tolerance
        if name in behind_relu:
            assert low == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": -1}, "images must be at least 0, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be at least 1e-09, got 0.0"),
        ({"variation_weight": -1.0}, "variation_weight must be at least 0, got -1.0"),
        ({"percentile": 50.0}, "percentile must be 75 to 100, got 50.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        Clipping(**settings)
    assert str(refused.value) == message


def test_exciting_no_images_is_refused(teacher):
    with pytest.raises(ConfigError) as refused:
        excited(teacher, Clipping())
    assert str(refused.value) == "images must be at least 1, got 0"
