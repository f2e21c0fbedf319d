"""Calibration, learned rounding and bias correction win accuracy back, and do it the same way every time."""

import dataclasses
import shutil

import pytest
import torch

from reverie.checkpoints import Folder, Forgetful
from reverie.descent import Descent
from reverie.errors import ConfigError, DivergenceError, ModelError
from reverie.graph.cache import Cache
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.graph.quantizers import Rounder
from reverie.graph.units import find_units
from reverie.grid import quantize
from reverie.observers.minmax import MinMax
from reverie.observers.mse import Mse
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.bias_correction import activations_in_float, correct_biases
from reverie.recovery.border import check_isolated
from reverie.recovery.ranges import calibrate_activations, calibrate_weights, keep_biases_in_range
from reverie.recovery.reconstruction import Reconstruction, _Loop, round_weights
from reverie.rounding.adaround import AdaRound
from reverie.rounding.nearest import Nearest


@pytest.fixture(scope="module")
def reference(tiny_cnn):
    network = tiny_cnn()
    return fold_batch_norms(capture(network.module, network.input.shape))


@pytest.fixture(scope="module")
def inputs(tiny_cnn):
    return tiny_cnn().held_out().inputs[:96]


def calibrated(reference, inputs, bits=3, kind="integer", end_bits=8):
    student = place(reference, kind, weight_bits=bits, activation_bits=8, end_bits=end_bits)
    calibrate_activations(reference, student, inputs, MinMax(), batch=32, progress=Silent())
    calibrate_weights(student, Mse())
    return student


def rounded(student, reference, inputs, rounding, seed=0, checkpoints=None, weights=None, **settings):
    return round_weights(
        reference,
        student,
        inputs,
        rounding,
        Reconstruction(**{"iterations": 120, "batch": 16} | settings),
        weights=weights,
        seed=Seed(seed),
        checkpoints=checkpoints or Forgetful(),
        progress=Silent(),
    )


def output_error(quantized, reference, inputs):
    with torch.no_grad():
        return (quantized.graph(inputs) - reference(inputs)).square().mean().item()


@pytest.mark.parametrize("unit", ["layer", "block", "network"])
@pytest.mark.parametrize("seed", [0, 1])
def test_learned_rounding_beats_nearest_in_every_kind_of_unit(reference, inputs, unit, seed):
    nearest, learned = (calibrated(reference, inputs) for _ in range(2))
    rounded(nearest, reference, inputs, Nearest())
    errors = rounded(learned, reference, inputs, AdaRound(), seed=seed, unit=unit)
    assert set(errors) == {found.name for found in find_units(reference, unit)}
    before, after = (output_error(finish(student), reference, inputs) for student in (nearest, learned))
    assert after < 0.8 * before


@pytest.mark.parametrize(
    "settings",
    [{}, {"unit": "block", "learned_ranges": True, "drop": 0.5, "patience": 3}, {"fisher": True}],
    ids=["adaround", "qdrop", "fisher"],
)
def test_what_is_learned_from_windows_holds_for_whole_images(reference, inputs, settings):
    nearest, learned = (calibrated(reference, inputs) for _ in range(2))
    rounded(nearest, reference, inputs, Nearest())
    rounded(learned, reference, inputs, AdaRound(), window=6, **settings)
    before, after = (output_error(finish(student), reference, inputs) for student in (nearest, learned))
    assert after < 0.8 * before


def test_every_learned_unit_is_at_least_as_good_as_at_the_nearest_codes(reference, inputs):
    errors = rounded(calibrated(reference, inputs), reference, inputs, AdaRound())
    assert all(after <= before * 1.001 for before, after in errors.values())


def test_nothing_is_left_soft(reference, inputs):
    student = calibrated(reference, inputs)
    rounded(student, reference, inputs, AdaRound())
    for quantizer in student.weights.values():
        assert quantizer.rounder is None
        assert torch.equal(quantizer.codes, quantizer.codes.round())
        assert not quantizer.codes.requires_grad


def test_more_bits_are_never_worse(reference, inputs):
    errors = []
    for bits in (2, 3, 4, 6, 8):
        student = calibrated(reference, inputs, bits=bits, end_bits=bits)
        rounded(student, reference, inputs, Nearest())
        errors.append(output_error(finish(student), reference, inputs))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"unit": "block", "learned_ranges": True, "drop": 0.5, "patience": 2, "window": 6},
        {"unit": "block", "learned_ranges": True, "weights_first": True, "fisher": True},
        {"unit": "network", "learned_ranges": True, "learned_steps": True, "drop": 0.5},
    ],
    ids=["adaround", "qdrop", "brecq", "genie_m"],
)
def test_a_reconstruction_that_is_killed_in_the_middle_of_units_goes_on_to_the_same_codes(
    reference, inputs, tmp_path, settings
):
    class Killed(Exception):
        pass

    class Dying(Folder):
        saves = 0

        def save(self, name, part):
            super().save(name, part)
            self.saves += 1
            # Far enough to get a unit done at a time, and never where the last one died.
            if self.saves == 7:
                raise Killed

    settings = {"iterations": 20} | settings
    whole = calibrated(reference, inputs)
    told = rounded(whole, reference, inputs, AdaRound(), **settings)
    kills, resumed = 0, None
    while resumed is None:
        student = calibrated(reference, inputs)
        try:
            again = rounded(student, reference, inputs, AdaRound(), checkpoints=Dying(tmp_path), **settings)
            resumed = student
        except Killed:
            kills += 1
    assert kills >= 2
    assert again == told
    for name in whole.weights:
        assert torch.equal(whole.weights[name].codes, resumed.weights[name].codes)
        assert torch.equal(whole.weights[name].scale, resumed.weights[name].scale)
    for name in whole.activations:
        assert torch.equal(whole.activations[name].scale, resumed.activations[name].scale)


@pytest.mark.parametrize("settings", [{}, {"unit": "block", "learned_ranges": True, "drop": 0.5}], ids=["adaround", "qdrop"])
def test_a_killed_reconstruction_goes_on_to_the_same_codes(reference, inputs, tmp_path, settings):
    class Killed(Exception):
        pass

    class Dying(Folder):
        def save(self, name, part):
            super().save(name, part)
            if name == "codes-1":
                raise Killed

    settings = {"iterations": 30} | settings
    whole, broken, resumed = (calibrated(reference, inputs) for _ in range(3))
    rounded(whole, reference, inputs, AdaRound(), **settings)
    with pytest.raises(Killed):
        rounded(broken, reference, inputs, AdaRound(), checkpoints=Dying(tmp_path), **settings)
    rounded(resumed, reference, inputs, AdaRound(), checkpoints=Folder(tmp_path), **settings)
    for name in whole.weights:
        assert torch.equal(whole.weights[name].codes, resumed.weights[name].codes)
    for name in whole.activations:
        assert torch.equal(whole.activations[name].scale, resumed.activations[name].scale)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_learned_ranges_of_activations_lower_the_error_that_the_network_ends_with(reference, inputs, drop):
    def student(**settings):
        made = place(reference, "integer", weight_bits=3, activation_bits=3, end_bits=8)
        calibrate_activations(reference, made, inputs, MinMax(), batch=32, progress=Silent())
        calibrate_weights(made, Mse())
        before = {name: quantizer.scale.clone() for name, quantizer in made.activations.items()}
        rounded(made, reference, inputs, AdaRound(), unit="block", **settings)
        moved = {name for name, quantizer in made.activations.items() if not torch.equal(quantizer.scale, before[name])}
        return output_error(finish(made), reference, inputs), moved

    (fixed, unmoved), (learned, moved) = student(), student(learned_ranges=True, range_rate=1e-2, drop=drop)
    assert learned < 0.9 * fixed
    assert not unmoved
    # Whatever a layer reads is in some block; what the last one writes has no reader.
    made = place(reference, "integer", weight_bits=3, activation_bits=3, end_bits=8)
    assert moved >= {layer.source for layer in made.layers.values()}


class Pooled(torch.nn.Module):
    """`y` is read by a pooling, which is part of no layer, before a layer reads it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        y = torch.relu(self.first(x))
        small = torch.nn.functional.max_pool2d(y, 2)
        large = torch.nn.functional.interpolate(torch.relu(self.second(small)), scale_factor=2.0)
        return large + torch.relu(self.third(y))


class Forked(torch.nn.Module):
    """Two layers read `x`."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return self.left(x) + torch.relu(self.right(x))


@pytest.mark.parametrize("network", [Pooled, Forked])
def test_a_killed_reconstruction_of_layers_goes_on_to_the_same_scales_where_several_read_a_tensor(network, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(network(), (3, 8, 8))
    inputs = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"unit": "layer", "learned_ranges": True, "range_rate": 0.1, "drop": 0.5, "iterations": 10}
    students = []
    for number in range(len(find_units(graph, "layer"))):
        # After the first, each goes on from one unit more that the first has done.
        folder = tmp_path / str(number)
        for part in range(number):
            folder.mkdir(exist_ok=True)
            shutil.copy(tmp_path / "0" / f"codes-{part}.safetensors", folder)
        student = calibrated(graph, inputs)
        before = {name: quantizer.scale.clone() for name, quantizer in student.activations.items()}
        rounded(student, graph, inputs, AdaRound(), checkpoints=Folder(folder), **settings)
        students.append(student)
    assert any(not torch.equal(quantizer.scale, before[name]) for name, quantizer in student.activations.items())
    for student in students[1:]:
        for name, quantizer in students[0].activations.items():
            assert torch.equal(quantizer.scale, student.activations[name].scale), name
        for name, quantizer in students[0].weights.items():
            assert torch.equal(quantizer.codes, student.weights[name].codes), name


def test_a_scale_that_is_learned_leaves_biases_within_int32(reference, inputs):
    student = calibrated(reference, inputs)
    layer = next(layer for layer in student.layers.values() if layer.bias is not None and layer.source is not None)
    source, weight = student.activations[layer.source], student.weights[layer.name]
    bias = student.graph.get_buffer(layer.bias)
    bias[0] = 2.0**30 * source.scale * weight.scale.flatten()[0]
    # Half of what it was: the bias would need 2^31.
    source.scale.mul_(0.5)
    weight.set_codes(weight.final_codes(student.graph.get_buffer(layer.weight)).float())
    scale = weight.scale.clone()
    keep_biases_in_range(student)
    assert torch.equal(weight.scale, scale)
    assert (bias / (source.scale * weight.scale.flatten())).abs().max() <= 2.0**30 * (1 + 1e-6)


def test_what_is_dropped_is_back_when_the_unit_is_done(reference, inputs):
    student = calibrated(reference, inputs)
    rounded(student, reference, inputs, AdaRound(), unit="block", drop=0.5, iterations=3)
    with torch.no_grad():
        assert torch.equal(student.graph(inputs), student.graph(inputs))
        assert torch.equal(student.graph(inputs), finish(student).graph(inputs))


def test_with_everything_dropped_the_grids_of_activations_do_not_matter(reference, inputs):
    def codes(bits, drop):
        student = place(reference, "integer", weight_bits=3, activation_bits=bits)
        calibrate_activations(reference, student, inputs, MinMax(), batch=32, progress=Silent())
        calibrate_weights(student, Mse())
        # Biases are on a grid that depends on the activations', finer than any gradient tells.
        rounded(student, reference, inputs, AdaRound(), unit="network", drop=drop, iterations=100, learning_rate=3e-2)
        return torch.cat([quantizer.codes.flatten() for quantizer in student.weights.values()])

    def differing(drop):
        return (codes(2, drop) != codes(8, drop)).float().mean()

    assert differing(1.0) < 0.3 * differing(0.0)


def test_bias_correction_gives_every_channel_its_mean_back(reference, inputs):
    student = calibrated(reference, inputs, bits=2)
    rounded(student, reference, inputs, Nearest())
    before = finish(student)
    correct_biases(reference, student, inputs, progress=Silent())
    after = finish(student)

    def shift(quantized):
        with torch.no_grad():
            return (quantized.graph(inputs) - reference(inputs)).mean(0).abs().max().item()

    # Up to half a step of the logits' bias grid, which is far below a hundredth of the shift.
    assert shift(after) < 0.01 * shift(before)
    assert output_error(after, reference, inputs) < output_error(before, reference, inputs)


def test_a_bias_far_larger_than_its_grid_still_fits_int32(reference, inputs):
    student = place(reference, "integer", weight_bits=4, activation_bits=8, end_bits=8)
    calibrate_activations(reference, student, inputs, MinMax(), batch=32, progress=Silent())
    name, layer = next(iter(student.layers.items()))
    student.graph.get_buffer(layer.weight)[0] = 1e-9
    student.graph.get_buffer(layer.bias)[0] = 5.0
    calibrate_weights(student, Mse())
    quantized = finish(student)
    codes = quantized.layers[name].bias_codes
    assert codes.abs().max() <= 2**30
    step = student.biases[name].scale()[0]
    assert abs(codes[0] * step - 5.0) <= step


def test_the_literature_placement_keeps_batch_norm_and_quantizes_what_follows_a_relu(tiny_cnn, inputs):
    network = tiny_cnn()
    graph = capture(network.module, network.input.shape)
    student = calibrated(graph, inputs, bits=4, kind="literature", end_bits=8)
    assert all("relu" in name or name.isdigit() or "hardtanh" in name for name in student.activations)
    assert not student.biases
    assert {quantizer.grid.bits for quantizer in student.weights.values()} == {4}
    assert any("batch_norm" in str(node.target) for node in student.graph.graph.nodes)
    rounded(student, graph, inputs, Nearest())
    quantized = finish(student)
    labels = network.held_out().labels[:96]
    with torch.no_grad():
        assert (quantized.graph(inputs).argmax(1) == labels).float().mean() > 0.8


def test_layers_that_share_a_bias_are_corrected_one_by_one():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 6, 3)
            self.second.bias = self.first.bias

        def forward(self, x):
            return self.second(self.first(x).relu()).mean((2, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Shared(), (3, 12, 12))
    inputs = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    student = calibrated(graph, inputs, bits=2, end_bits=2)
    assert len({layer.bias for layer in student.layers.values()}) == 2
    rounded(student, graph, inputs, Nearest())

    def shift(quantized):
        with activations_in_float(student), torch.no_grad():
            return (quantized.graph(inputs) - graph(inputs)).mean(0).abs().max().item()

    before = shift(student)
    correct_biases(graph, student, inputs, progress=Silent())
    assert shift(student) < 1e-4 * before


def test_a_linear_layer_over_tokens_counts_its_channels_not_its_tokens():
    # Seven tokens of five channels: the loss is the sum over the 5, averaged over images and the 7.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(torch.nn.Sequential(torch.nn.Linear(4, 5)), (7, 4))
    inputs = torch.randn(32, 7, 4, generator=torch.Generator().manual_seed(0))
    student = calibrated(graph, inputs, bits=3, end_bits=3)
    errors = rounded(student, graph, inputs, AdaRound(), iterations=200)
    assert all(after < before for before, after in errors.values())


class Unmoved(Rounder):
    """The nearest codes, whatever is learned."""

    def __init__(self, codes):
        super().__init__()
        self.codes, self.nothing = codes, torch.nn.Parameter(torch.zeros(()))

    def forward(self):
        return self.codes + 0 * self.nothing

    def penalty(self, progress):
        return self.nothing * 0

    def harden(self):
        return self.codes


class ToNearest:
    needs = "reconstruction"

    def __call__(self, weight, scale, zero_point, grid):
        return Unmoved(quantize(weight, scale, zero_point, grid))


class ConvNeXt(torch.nn.Module):
    """A block that permutes around its linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = torch.nn.Conv2d(3, 8, 2, stride=2), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.last, self.head = torch.nn.Conv2d(8, 6, 1), torch.nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(torch.nn.functional.gelu(self.up(self.depthwise(x).permute(0, 2, 3, 1))))
        return self.head(self.last(x + y.permute(0, 3, 1, 2)).flatten(2).mean(2))


class Patches(torch.nn.Module):
    """Tokens of patches, in windows, and back."""

    def __init__(self):
        super().__init__()
        self.patches, self.inner, self.head = torch.nn.Conv2d(3, 8, 2, 2), torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        windows = self.inner(tokens.reshape(-1, 4, 8))
        return self.head((windows.reshape(-1, 16, 8) + tokens).mean(1))


@pytest.mark.parametrize(("network", "channels"), [(ConvNeXt, [8, 8, 6, 5]), (Patches, [8, 8, 5])])
def test_the_loss_is_summed_over_channels_wherever_they_are(monkeypatch, network, channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(network(), (3, 8, 8))
    # One image many times, so that it does not matter which are drawn.
    inputs = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(16, 1, 1, 1)
    distances, step = [], Descent.step

    def kept(self, number, terms):
        distances.append(float(terms["distance"].detach()))
        return step(self, number, terms)

    monkeypatch.setattr(Descent, "step", kept)
    errors = rounded(calibrated(graph, inputs), graph, inputs, ToNearest(), unit="block", iterations=1)
    means = [before for before, _ in errors.values()]
    assert [distance / mean for distance, mean in zip(distances, means, strict=True)] == pytest.approx(channels, rel=1e-3)


@pytest.mark.parametrize("fisher", [False, True])
def test_layers_whose_rows_are_windows_are_learned(fisher):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Patches(), (3, 8, 8))
    inputs = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = rounded(calibrated(graph, inputs), graph, inputs, AdaRound(), fisher=fisher, iterations=100)
    assert set(errors) == {"patches", "inner", "head"}
    assert sum(after for _, after in errors.values()) < 0.9 * sum(before for before, _ in errors.values())


def test_images_without_weight_are_never_drawn(reference, inputs):
    first = torch.arange(96) < 48
    elsewhere = torch.where(first[:, None, None, None], inputs, 50 * inputs.flip(0) + 3)

    def codes(images, weights):
        # Calibrated on the same images in any case.
        student = calibrated(reference, inputs)
        rounded(student, reference, images, AdaRound(), weights=weights, iterations=15)
        return torch.cat([quantizer.codes.flatten() for quantizer in student.weights.values()])

    assert torch.equal(codes(inputs, first.float()), codes(elsewhere, first.float()))
    assert not torch.equal(codes(inputs, None), codes(elsewhere, None))
    assert not torch.equal(codes(inputs, None), codes(inputs, first.float()))
    # Proportions count, not sizes.
    assert torch.equal(codes(inputs, first.float()), codes(inputs, 8 * first.float()))


@pytest.mark.parametrize("weights", [None, torch.arange(32.0)])
def test_the_loop_is_what_is_written_out_here(weights):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(torch.nn.Sequential(torch.nn.Linear(4, 5)), (4,))
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    ours, student = (calibrated(graph, inputs, bits=2, end_bits=2) for _ in range(2))
    rounded(ours, graph, inputs, AdaRound(), weights=weights, iterations=60)

    ((name, layer),) = student.layers.items()
    quantizer = student.weights[name]
    (unit,) = find_units(graph, "layer")
    generator = Seed(0).at(unit.name).generator()
    weight = student.graph.get_buffer(layer.weight)
    rounder = quantizer.rounder = AdaRound()(weight, quantizer.scale, quantizer.zero_point, quantizer.grid)
    optimizer = torch.optim.Adam(rounder.parameters(), lr=1e-2)
    for iteration in range(60):
        if weights is None:
            picked = torch.randint(32, (16,), generator=generator)
        else:
            picked = torch.multinomial(weights, 16, replacement=True, generator=generator)
        distance = (student.graph(inputs[picked]) - graph(inputs[picked])).square().sum(1).mean()
        optimizer.zero_grad()
        (distance + rounder.penalty(iteration / 60)).backward()
        optimizer.step()
    assert torch.equal(ours.weights[name].codes, rounder.harden())


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_codes_do_not_depend_on_where_tensors_are_held(reference, inputs, tmp_path, drop, monkeypatch):
    files, make = [], Cache._file

    def counted(self, size, dtype):
        files.append(size)
        return make(self, size, dtype)

    monkeypatch.setattr(Cache, "_file", counted)
    students = [calibrated(reference, inputs) for _ in range(2)]
    for student, gib in zip(students, (4.0, 0.0), strict=True):
        settings = {"unit": "block", "drop": drop, "fisher": True, "iterations": 20, "cache_gib": gib, "window": 6}
        rounded(student, reference, inputs, AdaRound(), checkpoints=Folder(tmp_path / str(gib)), **settings)
        # What units read and should answer, and the weights of that.
        assert bool(files) == (gib == 0)
    for name in students[0].weights:
        assert torch.equal(students[0].weights[name].codes, students[1].weights[name].codes)


def test_without_room_for_what_units_read_it_is_computed_anew_and_said(reference, inputs, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    class Telling(Silent):
        def say(self, text):
            told.append(text)

    told, codes = [], []
    for number, gib in enumerate((4.0, 0.0)):
        if number:
            monkeypatch.setattr("os.posix_fallocate", full)
        student = calibrated(reference, inputs)
        settings = Reconstruction(unit="block", drop=0.5, fisher=True, iterations=30, batch=16, cache_gib=gib, window=6)
        round_weights(
            reference, student, inputs, AdaRound(), settings, seed=Seed(0), checkpoints=Folder(tmp_path), progress=Telling()
        )
        codes.append(torch.cat([quantizer.codes.flatten() for quantizer in student.weights.values()]))
        shutil.rmtree(tmp_path)
    assert len(told) == 1
    assert told[0].startswith(f"cache: {tmp_path} must have room for ")
    # Sums of another order, nothing else.
    assert (codes[0] != codes[1]).float().mean() < 0.01


def test_a_unit_ends_early_with_the_best_state_it_had(reference, inputs):
    class Counting(Silent):
        def advance(self, amount=1, note="", *, skipped=False):
            steps.append((amount, skipped))

    steps, errors = [], {}
    for patience in (0, 1):
        student = calibrated(reference, inputs)
        # So large a rate undoes what the first tenths found.
        settings = Reconstruction(unit="block", iterations=200, batch=16, learning_rate=3.0, patience=patience)
        steps.clear()
        round_weights(
            reference, student, inputs, AdaRound(), settings, seed=Seed(0), checkpoints=Forgetful(), progress=Counting()
        )
        errors[patience] = output_error(finish(student), reference, inputs)
        done = sum(amount for amount, skipped in steps if not skipped)
        units = len(find_units(reference, "block"))
        assert sum(amount for amount, _ in steps) == 200 * units
        assert done == 200 * units if patience == 0 else done < 180 * units
    assert errors[1] < errors[0]


def test_what_is_held_out_is_not_learned_from(reference, inputs):
    def codes(images):
        student = calibrated(reference, inputs)
        rounded(student, reference, images, AdaRound(), patience=10, iterations=12)
        return torch.cat([quantizer.codes.flatten() for quantizer in student.weights.values()])

    held_out = torch.arange(len(inputs)) % 8 == 7
    # With ten tenths of patience nothing ends early, but the best state is chosen by the images held out; alike ones choose alike.
    shuffled = inputs.clone()
    shuffled[held_out] = inputs[held_out].flip(0)
    assert torch.equal(codes(inputs), codes(shuffled))
    elsewhere = inputs.clone()
    elsewhere[~held_out] = inputs[~held_out].flip(0) * 2
    assert not torch.equal(codes(inputs), codes(elsewhere))


def test_learned_steps_of_weights_lower_the_error(reference, inputs):
    def error(**settings):
        student = calibrated(reference, inputs, bits=2)
        before = {name: quantizer.scale.clone() for name, quantizer in student.weights.items()}
        rounded(student, reference, inputs, AdaRound(), unit="block", **settings)
        moved = {name for name, quantizer in student.weights.items() if not torch.equal(quantizer.scale, before[name])}
        return output_error(finish(student), reference, inputs), moved

    (fixed, unmoved), (learned, moved) = error(), error(learned_steps=True, step_rate=1e-2)
    assert learned < 0.9 * fixed
    assert not unmoved
    assert moved == set(calibrated(reference, inputs).layers)


def test_weights_first_rounds_as_if_activations_were_in_float_and_then_learns_ranges(reference, inputs):
    def result(**settings):
        student = place(reference, "integer", weight_bits=3, activation_bits=3, end_bits=8)
        calibrate_activations(reference, student, inputs, MinMax(), batch=32, progress=Silent())
        calibrate_weights(student, Mse())
        before = {name: quantizer.scale.clone() for name, quantizer in student.activations.items()}
        rounded(student, reference, inputs, AdaRound(), unit="block", iterations=60, **settings)
        codes = torch.cat([quantizer.codes.flatten() for quantizer in student.weights.values()])
        moved = {name for name, quantizer in student.activations.items() if not torch.equal(quantizer.scale, before[name])}
        return codes, moved

    settings = {"learned_ranges": True, "range_rate": 1e-2}
    codes, moved = result(weights_first=True, **settings)
    assert moved >= {layer.source for layer in calibrated(reference, inputs).layers.values()}
    # The rate of ranges comes after the codes are decided.
    assert torch.equal(codes, result(weights_first=True, **(settings | {"range_rate": 1e-3}))[0])
    assert not torch.equal(codes, result(**settings)[0])


def test_a_killed_second_pass_goes_on_to_the_same_scales(reference, inputs, tmp_path):
    settings = {"unit": "block", "learned_ranges": True, "weights_first": True, "fisher": True, "iterations": 16}
    whole, resumed = (calibrated(reference, inputs) for _ in range(2))
    rounded(whole, reference, inputs, AdaRound(), checkpoints=Folder(tmp_path), **settings)
    for left in sorted(tmp_path.glob("ranges-codes-*"))[1:]:
        left.unlink()
    rounded(resumed, reference, inputs, AdaRound(), checkpoints=Folder(tmp_path), **settings)
    for name in whole.activations:
        assert torch.equal(whole.activations[name].scale, resumed.activations[name].scale)


def test_errors_of_weights_first_are_of_one_network(reference, inputs):
    def errors(**settings):
        student = place(reference, "integer", weight_bits=3, activation_bits=3, end_bits=8)
        calibrate_activations(reference, student, inputs, MinMax(), batch=32, progress=Silent())
        calibrate_weights(student, Mse())
        return rounded(student, reference, inputs, AdaRound(), unit="block", learned_ranges=True, iterations=60, **settings)

    together, first = errors(), errors(weights_first=True)
    # What the first unit reads does not depend on any codes: before both it is the same network, activations on grids.
    unit = next(iter(first))
    assert first[unit][0] == pytest.approx(together[unit][0], rel=1e-5)
    assert sum(after for _, after in first.values()) < sum(before for before, _ in first.values())


def test_a_look_at_what_is_held_out_leaves_no_trace_when_it_fails(reference, inputs, monkeypatch):
    student, looks = calibrated(reference, inputs), []
    look = _Loop._error

    def failing(self, *arguments):
        looks.append(arguments)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return look(self, *arguments)

    monkeypatch.setattr(_Loop, "_error", failing)
    with pytest.raises(KeyboardInterrupt):
        rounded(student, reference, inputs, AdaRound(), unit="block", drop=0.5, patience=2, iterations=20)
    assert all(quantizer.codes is None for quantizer in student.weights.values())
    # Still learning: what is dropped is dropped.
    assert any(quantizer.drop(None) is not None for quantizer in student.activations.values())


def test_a_held_out_error_that_is_never_finite_is_told(reference, inputs):
    student, spoiled = calibrated(reference, inputs), inputs.clone()
    spoiled[7::8] = torch.nan
    with pytest.raises(DivergenceError) as caught:
        rounded(student, reference, spoiled, AdaRound(), patience=2, iterations=20)
    unit = find_units(reference, "layer")[0].name
    assert str(caught.value) == (
        f"reconstruction of {unit}: the held-out error must be finite, got nan; try --set reconstruction.learning_rate=0.0025 "
        "with another --output"
    )


def test_weights_first_without_learned_ranges_is_refused():
    with pytest.raises(ConfigError) as caught:
        Reconstruction(weights_first=True)
    assert str(caught.value) == (
        "reconstruction.weights_first must be false without learned_ranges, got true; use --set reconstruction.learned_ranges=true"
    )


class Windowed(torch.nn.Module):
    """A layer whose rows are windows and that asks for the number of images."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        windows = self.inner(x.reshape(-1, 4))
        return windows.reshape(x.shape[0], 8) + x


@pytest.mark.parametrize(("kind", "larger"), [("layer", "block, or network"), ("block", "network")])
def test_a_unit_that_cannot_be_isolated_is_named_with_the_reason(kind, larger):
    graph = capture(Windowed(), (8,))
    units = find_units(graph, "layer")
    unit = dataclasses.replace(units[0], inputs=("x",), output="inner")
    student = place(graph, "integer", weight_bits=4, activation_bits=8)
    with pytest.raises(ModelError) as caught:
        check_isolated(graph, student.graph, [unit], kind, torch.randn(2, 8))
    assert str(caught.value) == (
        f"inner: a unit must read and write as many rows, got 2 in x, 4 in inner for 2 images; use --set reconstruction.unit={larger}"
    )
