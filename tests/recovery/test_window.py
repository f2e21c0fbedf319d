"""A window shows a unit the same positions in all tensors, and counts only what the whole image's answer has there."""

import pytest
import torch
from torch import nn

from reverie.checkpoints import Forgetful
from reverie.descent import Descent
from reverie.graph.capture import capture
from reverie.graph.extract import extract
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import place
from reverie.graph.units import find_units
from reverie.observers.minmax import MinMax
from reverie.observers.mse import Mse
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.recovery.reconstruction import Reconstruction, round_weights
from reverie.recovery.window import Part, Windows
from reverie.rounding.adaround import AdaRound


class Gate(nn.Module):
    """A squeeze-and-excite: every position depends on all of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x * self.conv(x).mean(dim=(2, 3), keepdim=True)


class Joined(nn.Module):
    """A residual block whose branch reaches one position, a shortcut that reaches none."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


def whole_unit(module, *, size=16, channels=4):
    """The module as one unit, and what it reads for three images."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    graph = capture(module, (channels, size, size))
    (unit,) = find_units(graph, "network")
    return extract(graph, unit)[0], [torch.randn(3, channels, size, size)]


def drawn(windows, times=400):
    generator = torch.Generator().manual_seed(0)
    return [windows.draw(generator) for _ in range(times)]


@pytest.mark.parametrize(
    ("module", "reach"),
    [
        (nn.Conv2d(4, 6, 1), (0, 0)),
        (nn.Conv2d(4, 6, 3, padding=1), (1, 1)),
        (nn.Conv2d(4, 4, 5, padding=2, groups=4), (2, 2)),
        # With a stride of two only the position before is one that a window does not have.
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (1, 0)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6)), (2, 2)),
        (Joined(), (1, 1)),
        (nn.MaxPool2d(2), (0, 0)),
    ],
    ids=["pointwise", "3x3", "depthwise 5x5", "stride", "two", "residual", "pool"],
)
def test_what_counts_is_all_that_the_border_of_the_window_does_not_reach(module, reach):
    if isinstance(module, nn.MaxPool2d):
        module = nn.Sequential(nn.Conv2d(4, 4, 1), module)
    unit, sources = whole_unit(module)
    answer = unit(*sources)
    side, size = 6, answer.shape[2]
    places = set()
    for window in drawn(Windows(unit, sources, side)):
        part = unit(*(cut.of(tensor) for cut, tensor in zip(window.sources, sources, strict=True)))
        torch.testing.assert_close(window.valid.of(part), window.valid.of(window.target.of(answer)), rtol=1e-4, atol=1e-4)
        for shown, valid in ((window.target.rows, window.valid.rows), (window.target.columns, window.valid.columns)):
            begin = 0 if shown.start == 0 else reach[0]
            end = side if shown.stop == size else side - reach[1]
            assert (valid.start, valid.stop) == (begin, end)
        places.add((window.target.rows.start, window.target.columns.start))
    # Anywhere, all borders included.
    assert {top for top, _ in places} == set(range(size - side + 1))


@pytest.mark.parametrize(
    ("module", "side"),
    [
        (nn.Conv2d(4, 4, 1), 0),
        (nn.Conv2d(4, 4, 1), 16),
        (nn.Conv2d(4, 4, 1), 20),
        (nn.Sequential(Gate(), nn.Conv2d(4, 4, 1)), 6),
        # Nothing is left of windows this small.
        (nn.Conv2d(4, 4, 5, padding=2), 4),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)), 6),
        # 14 positions of 16: none of its own for each.
        (nn.Conv2d(4, 4, 3), 6),
    ],
    ids=["whole asked for", "as large", "larger", "gate", "too small", "linear", "unpadded"],
)
def test_whole_images_where_there_is_no_window(module, side):
    unit, sources = whole_unit(module)
    assert drawn(Windows(unit, sources, side), times=3) == [None] * 3


def small_network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return fold_batch_norms(capture(module, (3, 32, 32)))


def calibrated(graph, inputs, bits=2):
    student = place(graph, "integer", weight_bits=bits, activation_bits=4, end_bits=8)
    calibrate_activations(graph, student, inputs, MinMax(), batch=32, progress=Silent())
    calibrate_weights(student, Mse())
    return student


def rounded(student, graph, inputs, **settings):
    settings = Reconstruction(**{"batch": 16, "learning_rate": 0.03, "window": 6} | settings)
    return round_weights(graph, student, inputs, AdaRound(), settings, seed=Seed(0), checkpoints=Forgetful(), progress=Silent())


def test_the_error_of_a_step_is_that_of_what_its_window_shows(monkeypatch):
    graph, drawn_windows, distances = small_network(), [], []
    # One image many times, so that it does not matter which are drawn; of noise, so that it does where.
    inputs = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)).repeat(16, 1, 1, 1)
    draw, step = Windows.draw, Descent.step

    def noted(self, generator):
        drawn_windows.append(draw(self, generator))
        return drawn_windows[-1]

    def kept(self, number, terms):
        distances.append(float(terms["distance"].detach()))
        return step(self, number, terms)

    monkeypatch.setattr(Windows, "draw", noted)
    monkeypatch.setattr(Descent, "step", kept)
    student = calibrated(graph, inputs)
    # At first the relaxed codes are the weights themselves: only what the unit reads is rounded.
    first, *_ = find_units(graph, "layer")
    unit, _ = extract(graph, first)
    with torch.no_grad():
        read = student.activations[student.layers[first.layers[0]].source](inputs)
        error = (unit(read) - unit(inputs)).square().sum(dim=1)[0]
    rounded(student, graph, inputs, iterations=1, batch=8)
    window = drawn_windows[0]
    counted = error[window.target.rows, window.target.columns][window.valid.rows, window.valid.columns]
    assert distances[0] == pytest.approx(float(counted.mean()), rel=1e-3)


def test_a_part_is_a_view():
    values = torch.arange(32.0).view(1, 2, 4, 4)
    part = Part(slice(1, 3), slice(0, 2)).of(values)
    assert part.shape == (1, 2, 2, 2)
    assert part.data_ptr() == values[:, :, 1:].data_ptr()
