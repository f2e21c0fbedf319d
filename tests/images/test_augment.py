"""Crops and flips: each image its own, within the bounds asked for, with gradients."""

import pytest
import torch

from reverie.images.augment import Augmentation, augment


def images(count=8, height=12, width=16, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_crop_and_flip_nothing_changes():
    inputs = images()
    torch.testing.assert_close(augment(inputs, Augmentation(1.0, flip=False), random()), inputs, atol=1e-5, rtol=0)


def test_without_crop_images_are_themselves_or_their_exact_mirror_image():
    inputs = images(200)
    outputs = augment(inputs, Augmentation(1.0), random())
    kept = (outputs - inputs).flatten(1).abs().amax(dim=1) < 1e-5
    mirrored = (outputs - inputs.flip(3)).flatten(1).abs().amax(dim=1) < 1e-5
    assert (kept ^ mirrored).all()
    # Half of 200, with a deviation of 7.
    assert 70 < mirrored.sum() < 130


def test_the_same_generator_gives_the_same_and_another_does_not():
    inputs, settings = images(), Augmentation(0.3)
    assert torch.equal(augment(inputs, settings, random(1)), augment(inputs, settings, random(1)))
    assert not torch.equal(augment(inputs, settings, random(1)), augment(inputs, settings, random(2)))


def windows(settings, count=400, size=32):
    """Left edge, right edge, top, bottom of each crop, as shares of the image, read from a ramp; left > right if flipped."""
    place = (torch.arange(size) + 0.5) / size
    ramp = torch.stack([place.expand(size, size), place[:, None].expand(size, size)])
    seen = augment(ramp.expand(count, 2, size, size), settings, random())
    # Two points in the middle, far from the border, whose pixels stand for what is beyond them.
    first, last = size // 4, 3 * size // 4
    across, down = seen[:, 0, size // 2, [first, last]], seen[:, 1, [first, last], size // 2]
    edges = []
    for pair in (across, down):
        slope = (pair[:, 1] - pair[:, 0]) / (place[last] - place[first])
        start = pair[:, 0] - slope * place[first]
        edges += [start, start + slope]
    return edges


@pytest.mark.parametrize("smallest", [0.08, 0.5, 0.8])
def test_each_image_has_a_crop_of_its_own_within_the_area_and_ratio_asked_for_and_inside_the_image(smallest):
    left, right, top, bottom = windows(Augmentation(smallest, flip=False))
    width, height = right - left, bottom - top
    area, ratio = width * height, width / height
    # Sums of float32 coordinates up to 1.
    tolerance = 1e-4
    assert (area >= smallest - tolerance).all() and (area <= 1 + tolerance).all()
    assert (ratio >= 3 / 4 - 1e-3).all() and (ratio <= 4 / 3 + 1e-3).all()
    for low, high in ((left, right), (top, bottom)):
        assert (low >= -tolerance).all() and (high <= 1 + tolerance).all()
    # Uniform between the bounds, for 400 images.
    assert area.min() < smallest + 0.05 * (1 - smallest) and area.max() > 1 - 0.05 * (1 - smallest)
    assert area.mean().item() == pytest.approx((1 + smallest) / 2, abs=0.1 * (1 - smallest))
    assert len(torch.stack([left, right, top, bottom]).unique(dim=1).T) == 400


def test_crops_are_flipped_too():
    left, right, top, bottom = windows(Augmentation(0.5))
    assert 140 < (left > right).sum() < 260
    assert (top < bottom).all()
    edges = torch.stack([left, right])
    assert (edges.min() >= -1e-4) and (edges.max() <= 1 + 1e-4)


@pytest.mark.parametrize("settings", [Augmentation(0.08), Augmentation(0.8, flip=False)])
def test_values_stay_within_the_range_of_the_image(settings):
    inputs = images(50)
    outputs = augment(inputs, settings, random())
    assert outputs.shape == inputs.shape
    # A mean of four neighbours, weighted in float32.
    assert (outputs.amax(dim=(2, 3)) <= inputs.amax(dim=(2, 3)) + 1e-5).all()
    assert (outputs.amin(dim=(2, 3)) >= inputs.amin(dim=(2, 3)) - 1e-5).all()


def test_gradients_reach_the_pixels_that_a_crop_shows():
    inputs = images().requires_grad_()
    (gradient,) = torch.autograd.grad(augment(inputs, Augmentation(0.08), random()).sum(), inputs)
    assert torch.isfinite(gradient).all()
    shown = (gradient != 0).flatten(1).float().mean(dim=1)
    assert (shown > 0.05).all() and (shown < 1).any()
    # Each of the 12 x 16 pixels of an output is a weighted mean of the input's.
    torch.testing.assert_close(gradient.sum(dim=(2, 3)), torch.full((8, 3), 192.0), rtol=1e-4, atol=0)


def test_no_global_random_number_is_drawn():
    before = torch.random.get_rng_state()
    augment(images(), Augmentation(0.3), random())
    assert torch.equal(before, torch.random.get_rng_state())


def test_colours_are_a_gain_of_each_image_and_a_shift_of_each_channel_in_deviations():
    inputs = images(300)
    outputs = augment(inputs, Augmentation(1.0, flip=False, colour=0.3), random())
    means, changed = inputs.mean(dim=(2, 3), keepdim=True), outputs.mean(dim=(2, 3), keepdim=True)
    gains = ((outputs - changed) / (inputs - means)).flatten(1)
    deviations = inputs.std(dim=(0, 2, 3))
    shifts = (changed - means).flatten(1) / deviations
    gain = gains.median(dim=1, keepdim=True).values
    torch.testing.assert_close(outputs - changed, gain[:, :, None, None] * (inputs - means), atol=1e-4, rtol=0)
    for drawn, low, high in ((gain, 0.7, 1.3), (shifts, -0.3, 0.3)):
        assert drawn.min() >= low - 1e-3 and drawn.max() <= high + 1e-3
        # Uniform: deviation 0.3 / sqrt(3).
        assert drawn.std().item() == pytest.approx(0.173, rel=0.1) and drawn.mean().item() == pytest.approx(
            (low + high) / 2, abs=0.03
        )


def test_colours_do_not_depend_on_what_inputs_are_scaled_to():
    inputs, settings = images(), Augmentation(1.0, flip=False, colour=0.5)
    ours, raw = augment(inputs, settings, random()), augment(60 * inputs + 120, settings, random())
    torch.testing.assert_close(60 * ours + 120, raw, atol=1e-3, rtol=0)


def test_a_patch_is_a_rectangle_of_the_image_before():
    height, width = 12, 16
    inputs = torch.arange(400.0).view(-1, 1, 1, 1).expand(-1, 2, height, width)
    outputs = augment(inputs, Augmentation(1.0, flip=False, cut_mix=0.5), random())
    patched = (outputs - inputs).abs() > 0.5
    # Of 400, with a deviation of 10.
    assert 160 < patched.flatten(1).any(dim=1).sum() < 240
    for number in patched.flatten(1).any(dim=1).nonzero().flatten().tolist():
        first, second = patched[number]
        assert torch.equal(first, second)
        rows, columns = first.any(dim=1), first.any(dim=0)
        assert torch.equal(first, rows[:, None] & columns[None, :])
        assert height // 4 <= rows.sum() <= 3 * height // 4 and width // 4 <= columns.sum() <= 3 * width // 4
        assert int(rows.diff().sum()) <= 2 and int(columns.diff().sum()) <= 2
        torch.testing.assert_close(outputs[number][:, first], torch.full((2, int(first.sum())), (number - 1.0) % 400))
