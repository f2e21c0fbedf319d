"""The generator: the literature's sizes, valid images of the class asked for, and nothing drawn from anybody else's numbers."""

import pytest
import torch

from reverie.models import InputContract
from reverie.randomness import Seed
from reverie.synthesis._generator import Generator

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def contract(height=16, width=16, channels=3, **constants):
    constants = constants or {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    return InputContract(channels=channels, height=height, width=width, **constants)


def small(expects=None, *, classes=5, conditioning="norms", seed=0, latent=8, width=8):
    expects = expects or contract()
    return Generator(expects, classes, latent=latent, width=width, conditioning=conditioning, seed=Seed(seed))


def noise(count=12, latent=8, seed=0):
    return torch.randn(count, latent, generator=torch.Generator().manual_seed(seed))


def labels_of(count=12, classes=5):
    return torch.arange(count) % classes


def test_imagenets_generator_has_the_literatures_size():
    expects = contract(224, 224, **IMAGENET)
    generator = Generator(expects, 1000, latent=100, width=128, conditioning="norms", seed=Seed(0))
    assert generator.parameter_count == 41_405_315
    assert sum(parameter.numel() for parameter in generator.linear.parameters()) == 40_542_208


def test_cifars_generator_has_the_literatures_size():
    generator = Generator(contract(32, 32), 100, latent=100, width=128, conditioning="embedding", seed=Seed(0))
    # Embedding, linear, three convolutions, three norms with gain and bias.
    convolutions = (9 * 128 + 1) * 128 + (9 * 128 + 1) * 64 + (9 * 64 + 1) * 3
    assert generator.parameter_count == 100 * 100 + 101 * 128 * 64 + convolutions + 2 * (128 + 128 + 64)
    assert generator.parameter_count == pytest.approx(1.06e6, rel=0.01)


@pytest.mark.parametrize(("side", "embedded"), [(32, True), (63, True), (64, False), (224, False)])
def test_the_images_size_chooses_how_the_class_enters(side, embedded):
    generator = small(contract(side, side), conditioning="auto", width=1, latent=1)
    assert (generator.embedding is not None) == embedded
    assert (generator.norms[0].gain is None) == embedded


@pytest.mark.parametrize("conditioning", ["norms", "embedding"])
def test_the_label_alone_changes_an_image_and_nothing_else_does(conditioning):
    generator = small(conditioning=conditioning)
    if conditioning == "norms":
        # All classes begin alike, as in the literature; one step of training makes them differ.
        with torch.no_grad():
            for norm in generator.norms:
                norm.gain.weight.add_(0.1 * torch.randn(norm.gain.weight.shape, generator=torch.Generator().manual_seed(1)))
    fixed, labels = noise(), labels_of()
    images = generator(fixed, labels)
    assert torch.equal(images, generator(fixed, labels))
    other = generator(fixed, (labels + 1) % 5)
    assert ((images - other).flatten(1).abs().amax(dim=1) > 1e-3).all()
    assert ((images - generator(noise(seed=1), labels)).flatten(1).abs().amax(dim=1) > 1e-3).all()


def test_equal_labels_and_equal_noise_give_equal_images_in_a_batch():
    generator = small(conditioning="embedding")
    fixed, labels = noise(1).repeat(4, 1), torch.tensor([2, 2, 3, 2])
    images = generator(fixed, labels)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[2])


def seen_at_the_end(generator, count=64):
    """The output of the last norm, and the images."""
    seen = []
    hook = generator.last_norm.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    images = generator(noise(count), labels_of(count)).detach()
    hook.remove()
    return seen[0], images


def test_inputs_of_networks_normalized_by_data_have_mean_0_and_deviation_1_until_they_are_clamped():
    expects = contract(**IMAGENET)
    before, images = seen_at_the_end(small(expects))
    torch.testing.assert_close(before.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    # The norm adds 1e-5 to a variance that tanh and small weights make small: 1 % is far above that.
    torch.testing.assert_close(before.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    assert torch.equal(images, torch.clamp(before, *expects.bounds(before)))


@pytest.mark.parametrize("constants", [{"mean": (0.5,), "std": (0.5,)}, {"mean": (0.0,), "std": (1 / 255,)}])
def test_where_the_normalization_says_nothing_pixels_are_as_bright_as_photographs(constants):
    expects = contract(channels=1, **constants)
    generator = small(expects)
    before, images = seen_at_the_end(generator)
    pixels = expects.denormalize(before * generator.gain + generator.offset)
    assert pixels.mean().item() == pytest.approx(0.45, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.25, rel=1e-2)
    # Clamping cuts what is beyond 1.8 deviations below and 2.2 above: of a normal distribution 4 % of the deviation, of the
    # heavier tails that an untrained generator has some more.
    assert expects.denormalize(images).mean().item() == pytest.approx(0.45, abs=0.02)
    assert expects.denormalize(images).std().item() == pytest.approx(0.25, rel=0.2)


@pytest.mark.parametrize("conditioning", ["norms", "embedding"])
@pytest.mark.parametrize(
    "expects",
    [
        contract(30, 45),
        contract(33, 31, channels=1),
        contract(1, 5),
        contract(channels=1, mean=(0.0,), std=(1 / 255,)),
        contract(channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),
        contract(**IMAGENET),
    ],
    ids=["30x45", "grey 33x31", "1x5", "raw", "halves", "imagenet"],
)
def test_images_have_the_networks_shape_and_are_valid(expects, conditioning):
    images = small(expects, conditioning=conditioning)(5 * noise(), labels_of())
    assert images.shape == (12, *expects.shape)
    low, high = expects.bounds(images)
    assert torch.isfinite(images).all()
    assert (images >= low).all() and (images <= high).all()


def test_building_draws_no_global_random_number_and_depends_on_its_seed_alone():
    before = torch.random.get_rng_state()
    first = small().state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(1)
    again, other = small().state_dict(), small(seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


@pytest.mark.parametrize("conditioning", ["norms", "embedding"])
def test_gradients_reach_all_weights_and_of_the_tables_the_drawn_classes_alone(conditioning):
    generator = small(conditioning=conditioning)
    labels = torch.tensor([1, 3, 3, 1, 1, 3])
    images = generator(noise(6), labels)
    (images * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    tables = (
        [generator.embedding] if generator.embedding else [part for norm in generator.norms for part in (norm.gain, norm.bias)]
    )
    for table in tables:
        rows = table.weight.grad.abs().amax(dim=1)
        assert (rows[[1, 3]] > 0).all()
        assert not rows[[0, 2, 4]].any()
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in generator.convolutions.parameters())
    assert generator.linear.weight.grad.abs().max() > 0
