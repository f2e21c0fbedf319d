"""Parts of images magnified, from which the student learns."""

import pytest
import torch

from reverie import pipeline
from reverie.errors import ConfigError
from reverie.images import Images
from reverie.images.magnify import magnified_count, magnify
from reverie.images.mosaic import join
from reverie.images.store import load_images
from reverie.pipeline import run
from reverie.randomness import Seed
from reverie.recipe import read
from reverie.report import outcome
from reverie.stages import as_teacher

QUICK = {
    "images": 16,
    "held_out": 8,
    "estimate_images": 0,
    "synthesis.steps": 10,
    "synthesis.batch": 8,
    "export.method": "none",
}


def ramps(count, height=24, width=32):
    """Images whose channels are the pixel's column and row, in shares of the image from -1 to 1."""
    across = ((2 * torch.arange(width) + 1) / width - 1).expand(height, width)
    down = ((2 * torch.arange(height) + 1) / height - 1).unsqueeze(1).expand(height, width)
    inputs = torch.stack([across, down]).expand(count, 2, height, width).contiguous()
    return Images(
        inputs=inputs,
        labels=torch.arange(count),
        logits=torch.zeros(count, 5),
        sources=tuple(f"image {i}" for i in range(count)),
    )


def parts(inputs):
    """Of each image of ramps: the share of the width and of the height that it shows, and the middle of that."""
    across, down = inputs[:, 0], inputs[:, 1]
    height, width = across.shape[1:]
    # From the middles of the first and the last but one pixel: at a border a sample outside the image repeats the last pixel.
    wide = (across[:, 0, -2] - across[:, 0, 1]) * width / (2 * (width - 3))
    tall = (down[:, -2, 0] - down[:, 1, 0]) * height / (2 * (height - 3))
    return wide, tall, across.mean((1, 2)), down.mean((1, 2))


def test_parts_of_a_tenth_and_more_are_magnified_and_the_rest_is_as_it_was():
    images = ramps(200)
    seen = magnify(images, 0.5, Seed(0))
    changed = (seen.inputs != images.inputs).flatten(1).any(1)
    assert int(changed.sum()) == magnified_count(200, 0.5) == 100
    # At random: not the first half, which would be of one kind where images are sorted.
    assert 25 < int(changed[:100].sum()) < 75
    wide, tall, across, down = parts(seen.inputs[changed])
    area = wide * tall
    assert float(area.min()) > 0.09 and float(area.max()) < 1.01
    # Uniform from a tenth to one.
    assert abs(float(area.mean()) - 0.55) < 5 * 0.9 / (12 * 100) ** 0.5
    assert float((across.abs() + wide).max()) < 1.02 and float((down.abs() + tall).max()) < 1.02
    assert across.std() > 0.05 and down.std() > 0.05
    # Nothing is mirrored, and what is shown stays an image of its own class.
    assert float(wide.min()) > 0
    assert seen.labels is images.labels and seen.sources == images.sources and seen.logits is None


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 2), (1.0, 7)])
def test_the_share_is_exact(share, count):
    images = ramps(7)
    before = images.inputs.clone()
    changed = (magnify(images, share, Seed(1)).inputs != images.inputs).flatten(1).any(1)
    assert int(changed.sum()) == count
    assert torch.equal(images.inputs, before)


def test_they_depend_on_the_seed_alone():
    images = ramps(8)
    first, again, other = (magnify(images, 0.5, Seed(seed)).inputs for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("joined", [False, True])
def test_a_student_learns_from_them_and_the_run_says_so(tiny_cnn, tmp_path, monkeypatch, joined):
    learned = {}
    original = pipeline.quantize

    def spy(recipe, teacher, images, *rest):
        learned.update(images)
        return original(recipe, teacher, images, *rest)

    monkeypatch.setattr(pipeline, "quantize", spy)
    network = tiny_cnn()
    settings = QUICK | {"magnified_share": 0.25} | ({"image_scale": 0.5, "mosaic": True} if joined else {})
    real = network.held_out().evenly(4)
    done = run(read("zeroq", settings), network, output=tmp_path / "run", calibration=real)
    made = load_images(done.path / "images.safetensors")
    if joined:
        made = join(made, 2, Seed(0, ("mosaic",)))
    assert torch.equal(learned["zeroq"].inputs, magnify(made, 0.25, Seed(0, ("magnify",))).inputs)
    assert torch.equal(learned["zeroq"].logits, as_teacher(network).logits(learned["zeroq"].inputs))
    assert torch.equal(learned["real"].inputs, real.inputs)
    count = 2 if joined else 4
    assert done.metrics["images"]["magnified"] == {"zeroq": count}
    assert f"magnified: a random part of {count} of {4 * count} zeroq" in outcome.learning_notes(done.metrics)
    none = done.metrics["images"] | {"magnified": {"zeroq": 0}}
    assert not any("magnified" in note for note in outcome.learning_notes(done.metrics | {"images": none}))
    assert "magnified: a random part" in (done.path / "report.html").read_text()


def test_a_share_is_at_most_one():
    with pytest.raises(ConfigError) as error:
        read("zeroq", {"magnified_share": 1.5})
    assert str(error.value) == "recipe zeroq: magnified_share must be 0 to 1, got 1.5"
