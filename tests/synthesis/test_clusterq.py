"""ClusterQ's loss knows the class, which that of the released code does not, and its centroids are its own images'."""

import pytest
import torch

from reverie.graph.batch_norm import Statistics
from reverie.graph.capture import capture
from reverie.randomness import Seed
from reverie.synthesis import Teacher
from reverie.synthesis._losses import matching_loss, pooled
from reverie.synthesis.clusterq import Centroids, Clusterq, ClusterqStream, cluster_distance

QUICK = {"steps": 40, "batch": 6, "latent": 8, "width": 8}
CPU = torch.device("cpu")


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def some(count, channels=(4, 5), seed=0):
    source = random(seed)
    means = tuple(torch.randn(count, width, generator=source).requires_grad_() for width in channels)
    return Statistics(means, tuple(torch.rand(count, width, generator=source).requires_grad_() for width in channels))


def detached(statistics, chosen=...):
    return Statistics(*(tuple(part.detach()[chosen] for part in parts) for parts in (statistics.mean, statistics.variance)))


@pytest.fixture
def centroids():
    """Of classes 0, 1 and 3 out of 4; class 2 has not been seen."""
    made = Centroids(4, [4, 5], 0.8, CPU)
    made.refresh(detached(some(3, seed=1)), torch.tensor([0, 1, 3]))
    return made


def slope(statistics, labels, centroids, noise=0.0):
    value = cluster_distance(statistics, torch.tensor(labels), centroids, noise, noise, random())
    return torch.autograd.grad(value, [*statistics.mean, *statistics.variance])


def test_the_distance_by_hand():
    # One layer, two channels, centroid of class 1: mean (1, 2), variance (3, 4). Two images of class 1: one off by (1, 0) in
    # mean and one by (0, 2) in variance: (1/2 + 4/2) / 2.
    made = Centroids(2, [2], 0.8, CPU)
    made.refresh(Statistics((torch.tensor([[1.0, 2.0]]),), (torch.tensor([[3.0, 4.0]]),)), torch.tensor([1]))
    images = Statistics((torch.tensor([[2.0, 2.0], [1.0, 2.0]]),), (torch.tensor([[3.0, 4.0], [3.0, 6.0]]),))
    assert cluster_distance(images, torch.tensor([1, 1]), made, 0.0, 0.0, random()).item() == pytest.approx(1.25)


def test_the_distance_is_a_mean_over_layers(centroids):
    statistics = some(3)
    whole = cluster_distance(statistics, torch.tensor([0, 1, 3]), centroids, 0.0, 0.0, random())
    layers = []
    for index in range(2):
        one = Centroids(4, [(4, 5)[index]], 0.8, CPU)
        one.restore({"mean0": centroids.means[index], "variance0": centroids.variances[index], "seen": centroids.seen})
        alone = Statistics((statistics.mean[index],), (statistics.variance[index],))
        layers.append(cluster_distance(alone, torch.tensor([0, 1, 3]), one, 0.0, 0.0, random()))
    torch.testing.assert_close(whole, (layers[0] + layers[1]) / 2)


def test_the_gradient_changes_with_the_label(centroids):
    statistics = some(1)
    for first, second in zip(slope(statistics, [0], centroids), slope(statistics, [1], centroids), strict=True):
        assert first.abs().max() > 0 and second.abs().max() > 0
        assert (first - second).abs().max() > 0.1 * first.abs().max()


def test_the_gradient_is_zero_at_the_centroid_nonzero_off_it_and_with_noise(centroids):
    labels = [3, 0, 1, 1]
    at_centre = Statistics(
        *(tuple(part[labels].clone().requires_grad_() for part in parts) for parts in (centroids.means, centroids.variances))
    )
    assert not any(part.any() for part in slope(at_centre, labels, centroids))
    for part in slope(at_centre, labels, centroids, noise=0.05):
        # Every image, layer and channel is pulled to a target of its own.
        assert len(part.unique()) == part.numel() and (part != 0).all()
    off = Statistics(
        *(tuple((part.detach() + 0.1).requires_grad_() for part in parts) for parts in (at_centre.mean, at_centre.variance))
    )
    assert all((part > 0).all() for part in slope(off, labels, centroids))


def test_the_noise_is_uniform_and_of_the_width_asked_for(centroids):
    labels = torch.zeros(4000, dtype=torch.long)
    means = tuple(part[labels].clone().requires_grad_() for part in centroids.means)
    statistics = Statistics(means, tuple(part[labels].clone().requires_grad_() for part in centroids.variances))
    value = cluster_distance(statistics, labels, centroids, 0.03, 0.05, random())
    slopes = torch.autograd.grad(value, [*statistics.mean, *statistics.variance])
    for part, width, channels in zip(slopes, (0.03, 0.03, 0.05, 0.05), (4, 5, 4, 5), strict=True):
        # The slope is 2 (value - target) / (images, channels, layers), and so tells the shift.
        shifts = part * (4000 * channels * 2) / 2
        # The values are about 1, of which float32 knows 1e-7.
        assert 0.99 * width < shifts.abs().max() <= width + 1e-6
        assert shifts.var().item() == pytest.approx(width**2 / 3, rel=0.05)


def test_a_class_without_a_centroid_has_no_part(centroids):
    statistics = some(3)
    for part in slope(statistics, [0, 2, 1], centroids, noise=0.05):
        assert part[[0, 2]].abs().amax(dim=1).min() > 0
        assert not part[1].any()
    known = detached(statistics, [0, 2])
    both = cluster_distance(statistics, torch.tensor([0, 2, 1]), centroids, 0.0, 0.0, random())
    torch.testing.assert_close(both.detach(), cluster_distance(known, torch.tensor([0, 1]), centroids, 0.0, 0.0, random()))
    assert cluster_distance(statistics, torch.tensor([2, 2, 2]), centroids, 0.1, 0.1, random()).item() == 0


def test_the_first_centroid_is_the_mean_of_its_images_and_later_ones_move_a_fifth_of_the_way():
    made, first, second = Centroids(3, [4, 5], 0.8, CPU), detached(some(3)), detached(some(2, seed=1))
    made.refresh(first, torch.tensor([1, 1, 0]))
    assert made.seen.tolist() == [True, True, False]
    for centres, values in ((made.means, first.mean), (made.variances, first.variance)):
        for centre, value in zip(centres, values, strict=True):
            torch.testing.assert_close(centre[1], value[:2].mean(dim=0))
            torch.testing.assert_close(centre[0], value[2])
            assert not centre[2].any()
    made.refresh(second, torch.tensor([1, 2]))
    assert made.seen.tolist() == [True, True, True]
    for index, centre in enumerate(made.means):
        torch.testing.assert_close(centre[1], 0.8 * first.mean[index][:2].mean(dim=0) + 0.2 * second.mean[index][0])
        torch.testing.assert_close(centre[2], second.mean[index][1])
        assert torch.equal(centre[0], first.mean[index][2])


def test_a_refresh_without_images_changes_nothing(centroids):
    before = centroids.state()
    centroids.refresh(detached(some(3), []), torch.tensor([], dtype=torch.long))
    assert all(torch.equal(value, before[name]) for name, value in centroids.state().items())


def test_centroids_go_through_their_state(centroids):
    state = centroids.state()
    other = Centroids(4, [4, 5], 0.8, CPU)
    other.restore(state)
    for made in (centroids, other):
        made.refresh(detached(some(2, seed=5)), torch.tensor([1, 2]))
    after = other.state()
    assert all(torch.equal(value, after[name]) for name, value in centroids.state().items())
    assert not torch.equal(state["seen"], after["seen"]) and not torch.equal(state["mean0"], after["mean0"])


def as_teacher(network):
    return Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


def stream_of(teacher, **settings):
    return ClusterqStream(Clusterq(**QUICK | settings), teacher, Seed(0))


def test_only_images_that_the_teacher_agrees_with_enter(tiny_cnn):
    network = tiny_cnn()
    # A teacher that sees class 1 everywhere agrees with images of class 1 alone.
    with torch.no_grad():
        network.module[-1].weight.zero_()
        network.module[-1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    stream = stream_of(as_teacher(network), centroid_start=0.0, centroid_images=3)
    stream.terms(0, random())
    assert stream.centroids.seen.tolist() == [False, True, False]
    for part in (*stream.centroids.means, *stream.centroids.variances):
        assert part[1].any() and not part[[0, 2]].any()


def test_a_teacher_that_agrees_with_nothing_leaves_no_centroid(tiny_cnn):
    network = tiny_cnn()
    # A fourth answer that nobody asks for, and that it always gives.
    network.module[-1] = torch.nn.Linear(16, 4)
    with torch.no_grad():
        network.module[-1].weight.zero_()
        network.module[-1].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    stream = stream_of(as_teacher(network), centroid_start=0.0)
    terms, _ = stream.terms(0, random())
    assert not stream.centroids.seen.any()
    assert terms["cluster"].item() == 0
    assert torch.isfinite(stream.train_step(1e-3)[0].inputs).all()


def test_centroids_begin_and_move_when_the_settings_say(teacher):
    stream = stream_of(teacher, steps=20, centroid_start=0.5, refresh=4, centroid_images=8, learning_rate=1e-2)
    moved = []
    before = stream.centroids.state()
    for number in range(20):
        stream.train_step(1e-2)
        after = stream.centroids.state()
        if any(not torch.equal(before[name], after[name]) for name in after):
            moved.append(number)
        before = after
    assert moved == [10, 14, 18]


def test_the_terms_have_their_weights_and_the_statistics_are_the_batchs(teacher):
    settings = {"augmented": 0.0, "centroid_start": 0.0, "centroid_images": 8}
    stream = stream_of(teacher, **settings)
    terms, batch = stream.terms(0, random())
    assert list(terms) == ["class", "statistics", "cluster"]
    _, statistics = stream.observed(batch.inputs)
    whole = matching_loss(pooled(statistics), teacher.batch_norms)
    torch.testing.assert_close(terms["statistics"].detach(), stream.settings.statistics_weight * whole)
    own = stream.settings
    doubled = {name: 2 * getattr(own, name) for name in ("class_weight", "statistics_weight", "cluster_weight")}
    others, _ = stream_of(teacher, **settings | doubled).terms(0, random())
    assert terms["cluster"] > 0
    for name in terms:
        torch.testing.assert_close(others[name], 2 * terms[name])


def test_the_share_of_batches_asked_for_is_augmented(teacher):
    def batches(**settings):
        return [stream_of(teacher, smallest_crop=0.3, **settings).terms(0, random(seed))[1].inputs for seed in range(12)]

    plain = [torch.equal(ours, none) for ours, none in zip(batches(augmented=0.5), batches(augmented=0.0), strict=True)]
    assert 0 < sum(plain) < 12
    assert not any(torch.equal(ours, none) for ours, none in zip(batches(augmented=1.0), batches(augmented=0.0), strict=True))
