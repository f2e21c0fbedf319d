"""Rounding at once walks the network layer by layer, on moments that are those of what each layer reads."""

import pytest
import torch
from torch import nn

from reverie.checkpoints import Forgetful
from reverie.errors import ModelError
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.graph.walk import Walk
from reverie.grid import quantize
from reverie.models import load
from reverie.observers.minmax import MinMax
from reverie.observers.mse import Mse
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.bias_correction import correct_biases
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.recovery.reconstruction import Reconstruction, round_weights
from reverie.rounding.gptq import GPTQ
from reverie.rounding.nearest import Nearest
from reverie.rounding.squant import SQuant


class Watched:
    """Rounds to nearest, and remembers the moments that it was given."""

    needs = "moments"

    def __init__(self):
        self.seen = []

    def __call__(self, weight, scale, zero_point, grid, moments):
        self.seen.append(moments)
        return quantize(weight, scale, zero_point, grid)


class Several(nn.Module):
    """Two layers read one tensor, one of them grouped; a linear layer reads tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        return self.head((self.left(y) + self.right(y)).flatten(2).mT).mean(1)


@pytest.fixture(scope="module")
def several():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture(Several(), (3, 8, 8))


IMAGES = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def calibrated(graph, inputs, bits=3, kind="integer", activation_bits=8):
    student = place(graph, kind, weight_bits=bits, activation_bits=activation_bits, end_bits=8)
    calibrate_activations(graph, student, inputs, MinMax(), batch=32, progress=Silent())
    calibrate_weights(student, Mse())
    return student


def rounded(student, graph, inputs, rounding, *, weights=None, seed=0, progress=None):
    return round_weights(
        graph,
        student,
        inputs,
        rounding,
        Reconstruction(),
        weights=weights,
        seed=Seed(seed),
        checkpoints=Forgetful(),
        progress=progress or Silent(),
    )


def codes_of(student):
    return {name: quantizer.codes for name, quantizer in student.weights.items()}


@pytest.mark.parametrize("weights", [None, torch.arange(70.0)])
def test_moments_are_those_of_what_each_layer_reads_and_its_teacher_answers(monkeypatch, several, weights):
    monkeypatch.setattr("reverie.recovery.closed_form.COLUMNS", 10**6)
    student, watched = calibrated(several, IMAGES), Watched()
    errors = rounded(student, several, IMAGES, watched, weights=weights)
    stem, left, right, head = watched.seen
    share = (torch.ones(70) if weights is None else weights).double().view(-1, 1, 1)
    share = share / share.sum()
    buffers = {name: value.double() for name, value in several.named_buffers()}

    def expected(x, y, groups=1):
        """Of patches (count, size, positions) and answers (count, out, positions)."""
        x, y = (rows.double().unflatten(1, (groups, -1)) for rows in (x, y))
        share_of = share.unsqueeze(1) / x.shape[-1]
        return torch.einsum("ngsp,ngtp->gst", share_of * x, x), torch.einsum("ngop,ngtp->got", share_of * y, x)

    with torch.no_grad():
        answer = nn.functional.conv2d(IMAGES.double(), buffers["stem.weight"], None, 2, 1).flatten(2)
        clean = torch.relu(answer + buffers["stem.bias"][:, None])
        # The student's first layer, its mean given back; activations in float.
        made = nn.functional.conv2d(
            IMAGES.double(), student.weights["stem"](several.get_buffer("stem.weight")).double(), None, 2, 1
        )
        made += (answer.view_as(made) - made).mean((0, 2, 3), keepdim=True) + buffers["stem.bias"].view(1, -1, 1, 1)
        read = torch.relu(made)
        for moments, x, y, groups in (
            (stem, nn.functional.unfold(IMAGES, 3, padding=1, stride=2), answer, 1),
            (
                left,
                nn.functional.unfold(read, 3, padding=1),
                nn.functional.conv2d(clean.view(70, 8, 4, 4), buffers["left.weight"], None, 1, 1, 1, 4).flatten(2),
                4,
            ),
            (right, read.flatten(2), buffers["right.weight"][:, :, 0, 0] @ clean, 1),
        ):
            inputs, answers = expected(x, y, groups)
            torch.testing.assert_close(moments.inputs, inputs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moments.answers, answers, rtol=1e-4, atol=1e-5)
    assert head.inputs.shape == (1, 8, 8) and head.answers.shape == (1, 5, 8)
    assert set(errors) == set(student.layers) and all(before == after > 0 for before, after in errors.values())


def test_of_many_positions_some_stand_for_all(monkeypatch, several):
    exact, sampled = Watched(), Watched()
    images = torch.randn(600, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("reverie.recovery.closed_form.COLUMNS", 10**6)
    rounded(calibrated(several, images), several, images, exact)
    monkeypatch.setattr("reverie.recovery.closed_form.COLUMNS", 100)
    rounded(calibrated(several, images), several, images, sampled)
    # 27 rows, 2,700 columns of 9,600.
    near, far = sampled.seen[0].inputs, exact.seen[0].inputs
    assert not torch.equal(near, far)
    assert (near - far).norm() < 0.1 * far.norm()
    again = Watched()
    rounded(calibrated(several, images), several, images, again)
    assert torch.equal(again.seen[0].inputs, near)


@pytest.mark.parametrize("rounding", [GPTQ(), SQuant(), Nearest()], ids=repr)
@pytest.mark.parametrize("kind", ["integer", "literature"])
def test_every_layer_gets_its_codes_and_the_same_ones_again(several, rounding, kind):
    students = [calibrated(several, IMAGES, kind=kind) for _ in range(2)]
    for student in students:
        rounded(student, several, IMAGES, rounding)
    first, second = map(codes_of, students)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(students[0].graph(IMAGES), finish(students[0]).graph(IMAGES))


def test_progress_counts_layers(several):
    class Counted(Silent):
        def start(self, stage, total, done=0):
            self.stage_name, self.total, self.steps = stage, total, 0

        def advance(self, amount=1, note="", *, skipped=False):
            self.steps += amount

    progress = Counted()
    rounded(calibrated(several, IMAGES), several, IMAGES, GPTQ(), progress=progress)
    assert (progress.stage_name, progress.total, progress.steps) == ("round", 4, 4)


def test_nothing_is_kept_longer_than_needed(monkeypatch, several):
    walks, held = [], []

    class Watching(Walk):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            walks.append(self)

    class Looking(Silent):
        def advance(self, amount=1, note="", *, skipped=False):
            held.append([{name for name, part in walk._parts.items() if isinstance(part[0], torch.Tensor)} for walk in walks])

    monkeypatch.setattr("reverie.recovery.closed_form.Walk", Watching)
    rounded(calibrated(several, IMAGES), several, IMAGES, GPTQ(), progress=Looking())
    teacher, student = zip(*held, strict=True)
    # After stem, left, right, head: what later nodes read.
    assert teacher == ({"stem"}, {"relu", "left"}, {"left", "right"}, {"head"})
    # Without a bias to correct, `right` itself has not been executed yet.
    assert student == ({"stem"}, {"activation_quantizers_relu", "left"}, {"activation_quantizers_relu", "left"}, {"head"})


def test_every_channel_has_its_mean_back_already(several):
    student = calibrated(several, IMAGES, bits=2)
    rounded(student, several, IMAGES, GPTQ())
    shifts = correct_biases(several, student, IMAGES, progress=Silent())
    assert set(shifts) == {"stem", "left", "head"}
    assert max(shifts.values()) < 1e-5
    assert (student.graph.get_buffer("left.bias") - several.get_buffer("left.bias")).abs().max() > 1e-3


def test_moments_that_are_not_finite_are_refused_with_the_layers_name(several):
    student = calibrated(several, IMAGES)
    with pytest.raises(ModelError) as caught:
        rounded(student, several, IMAGES, GPTQ(), weights=torch.full((70,), torch.nan))
    assert str(caught.value) == (
        "stem: second moments of inputs must be finite, got some that are not; check the weights and images"
    )


def test_one_image_is_enough(several):
    student = calibrated(several, IMAGES[:1])
    errors = rounded(student, several, IMAGES[:1], GPTQ())
    assert all(after <= before * (1 + 1e-6) for before, after in errors.values())


@pytest.fixture(scope="module")
def digits():
    network = load("embedded:digits")
    held_out = network.held_out().inputs
    return fold_batch_norms(capture(network.module, network.input.shape)), held_out[:128], held_out[128:]


def test_on_a_real_network_it_is_far_nearer_to_full_precision_than_rounding_to_nearest(digits):
    graph, inputs, unseen = digits

    def divergence(method):
        student = calibrated(graph, inputs, bits=3)
        rounded(student, graph, inputs, method)
        correct_biases(graph, student, inputs, progress=Silent())
        with torch.no_grad():
            truth, made = (network(unseen).log_softmax(1) for network in (graph, finish(student).graph))
        return nn.functional.kl_div(made, truth, log_target=True, reduction="batchmean")

    assert divergence(GPTQ()) < 0.6 * divergence(Nearest())
