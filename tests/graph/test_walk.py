"""A walk computes each tensor once, in batches, with the weights as they are when it gets there."""

import pytest
import torch
from torch import nn

from reverie.graph.cache import Cache, CacheFull
from reverie.graph.capture import capture
from reverie.graph.taps import tap
from reverie.graph.walk import Walk


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))


def test_reading_tensors_on_the_way_disturbs_nothing(graph):
    x = torch.randn(7, 3)
    names = ["_0", "_1_relu", "_2", "_3_relu", "_4"]
    whole = tap(graph, names)(x)
    walk = Walk(graph, x, batch=3, keep=names)
    for name in names:
        walk.to(name)
        torch.testing.assert_close(walk.value(name), whole[name])
        assert walk.value(name) is walk.value(name)


def test_the_input_is_read_without_a_copy(graph):
    x = torch.randn(7, 3)
    walk = Walk(graph, x, batch=3, keep=["input_1"])
    walk.to("_0")
    assert walk.value("input_1") is x


def test_a_walk_goes_on_with_the_weights_as_they_are_by_then(graph):
    x = torch.randn(5, 3)
    walk = Walk(graph, x, batch=2, keep=["_1_relu", "_4"])
    walk.to("_1_relu")
    before = walk.value("_1_relu").clone()
    graph.get_buffer("0.weight").zero_()
    graph.get_buffer("4.weight").zero_()
    walk.to("_4")
    assert torch.equal(walk.value("_1_relu"), before)
    assert torch.equal(walk.value("_4"), graph.get_buffer("4.bias").expand(5, 2))


def test_only_what_is_still_needed_is_held(graph):
    walk = Walk(graph, torch.randn(5, 3), batch=2, keep=["_1_relu"])
    walk.to("_3_relu")
    walk.value("_1_relu")
    with pytest.raises(KeyError):
        walk.value("_0")
    walk.release("_1_relu")
    walk.to("_4")
    with pytest.raises(KeyError):
        walk.value("_1_relu")


class Windows(nn.Module):
    """Puts two windows of every image into the batch axis and takes them back, as windowed attention does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        windows = self.inner(x.reshape(-1, 4))
        return windows.reshape(x.shape[0], 8) + x


def test_tensors_with_more_rows_than_images_keep_their_rows_apart():
    graph = capture(Windows(), (8,))
    x = torch.randn(5, 8)
    walk = Walk(graph, x, batch=2, keep=["inner", "add"])
    walk.to("inner")
    torch.testing.assert_close(walk.value("inner"), tap(graph, ["inner"])(x)["inner"])
    walk.to("add")
    torch.testing.assert_close(walk.value("add"), graph(x))


def caches(tmp_path):
    """Memory, files, and no room anywhere."""

    class None_(Cache):
        def room(self, rows, like):
            raise CacheFull

    return {"memory": Cache(), "files": Cache(limit=0, folder=tmp_path), "nowhere": None_()}


@pytest.mark.parametrize("kind", ["memory", "files", "nowhere"])
def test_rows_are_the_same_wherever_tensors_are_held(graph, tmp_path, kind):
    x, picked = torch.randn(7, 3), torch.tensor([6, 0, 3, 3])
    names = ["_1_relu", "_4"]
    whole = tap(graph, names)(x)
    walk = Walk(graph, x, batch=3, keep=names, cache=caches(tmp_path)[kind])
    walk.to("_1_relu")
    torch.testing.assert_close(walk.rows(["_1_relu"], picked), [whole["_1_relu"][picked]])
    walk.to("_4")
    torch.testing.assert_close(walk.rows(names, picked), [whole[name][picked] for name in names])
    assert walk.count("_4") == 7


class Wide(nn.Module):
    """A large tensor between small ones, and one more reader of it behind them."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(3, 64), nn.Linear(64, 2), nn.Linear(2, 64)

    def forward(self, x):
        wide = self.wide(x)
        return self.last(self.narrow(wide).relu()) + wide


def without_files(monkeypatch, limit):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    return Cache(limit=limit)


def executed(monkeypatch):
    """Counts what every tensor costs: the batches for which it was computed."""
    counts = {}
    advance = Walk._advance

    def counted(self, nodes, number):
        for node in nodes:
            counts[node.name] = counts.get(node.name, 0) + 1
        advance(self, nodes, number)

    monkeypatch.setattr(Walk, "_advance", counted)
    return counts


def test_what_fits_after_a_tensor_that_did_not_is_held(monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Wide(), (3,))
    x, picked = torch.randn(7, 3), torch.tensor([6, 0, 3, 3])
    names = ["wide", "narrow", "relu", "last", "add"]
    whole, counts = tap(graph, names)(x), executed(monkeypatch)
    # Room for 7 rows of 2 values, twice, and not for 7 rows of 64.
    cache = without_files(monkeypatch, 120)
    walk = Walk(graph, x, batch=3, keep=names, cache=cache)
    for number, name in enumerate(names):
        walk.to(name)
        torch.testing.assert_close(walk.rows(names[: number + 1], picked), [whole[key][picked] for key in names[: number + 1]])
        assert walk.count(name) == 7
    assert cache.used == 2 * 7 * 2 * 4
    torch.testing.assert_close(walk.value("relu"), whole["relu"])
    # For itself, for `narrow` and for `add`; `last` reads what was held.
    assert (counts["wide"], counts["narrow"], counts["relu"], counts["last"]) == (9, 3, 3, 6)


def test_a_tensor_that_did_not_fit_is_held_when_there_is_room(monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Wide(), (3,))
    x = torch.randn(7, 3)
    cache = without_files(monkeypatch, 7 * 64 * 4)
    taken = cache.room(7, torch.empty(1, 64))
    walk = Walk(graph, x, batch=3, keep=["wide", "narrow"], cache=cache)
    walk.to("wide")
    with pytest.raises(KeyError):
        walk.value("wide")
    cache.free(taken)
    walk.to("narrow")
    torch.testing.assert_close(walk.value("wide"), tap(graph, ["wide"])(x)["wide"])


@pytest.mark.parametrize("kind", ["memory", "nowhere"])
def test_rows_of_windows_are_counted_in_windows(tmp_path, kind):
    graph, x = capture(Windows(), (8,)), torch.randn(5, 8)
    walk = Walk(graph, x, batch=2, keep=["inner"], cache=caches(tmp_path)[kind])
    walk.to("inner")
    assert walk.count("inner") == 10
    picked = torch.tensor([9, 2, 3])
    torch.testing.assert_close(walk.rows(["inner"], picked), [tap(graph, ["inner"])(x)["inner"][picked]])


def test_what_lies_between_two_stops_is_never_held_for_all_images(graph):
    held = []

    class Counting(Cache):
        def room(self, rows, like):
            held.append(rows)
            return super().room(rows, like)

    cache = Counting()
    walk = Walk(graph, torch.randn(9, 3), batch=3, keep=["_3_relu"], cache=cache)
    walk.to("_3_relu")
    # Neither `_0`, `_1_relu` nor `_2`.
    assert held == [9]
    walk.release("_3_relu")
    # `_4` reads it still.
    assert cache.used == 9 * 4 * 4
    walk.to("_4")
    assert cache.used == 9 * 2 * 4


def test_a_tensor_whose_rows_come_to_depend_on_the_batch_is_held_in_pieces():
    class Whole(nn.Module):
        def forward(self, x):
            # As many rows as the first batches have images, whatever the last one has.
            return (x.sum() + torch.zeros(3, 2)) * 2

    graph, x = capture(Whole(), (2,)), torch.randn(7, 2)
    name = graph.graph.output_node().args[0].name
    walk = Walk(graph, x, batch=3, keep=[name])
    walk.to(name)
    torch.testing.assert_close(walk.value(name), torch.cat([graph(part) for part in torch.split(x, 3)]))
