"""Side by side, and ranked only where figures mean the same."""

from html.parser import HTMLParser

import pytest
from tests.report.test_overview import STAGES, made

from reverie.errors import ConfigError
from reverie.report import comparison, overview


def best(found):
    return {column.name: sorted(column.best) for column in found.columns if column.best}


@pytest.fixture
def runs(tmp_path):
    """Makes overviews of runs named a, b, c, ... that differ as said."""

    def make(*differences):
        paths = [made(tmp_path / "runs" / name, **given) for name, given in zip("abcd", differences, strict=False)]
        return [overview.look_at(path) for path in paths]

    return make


def test_the_best_of_each_column_is_marked_and_ties_are_shared(runs):
    found = comparison.compare(
        runs({"top1": 0.9, "size": 10}, {"top1": 0.91, "drop": 0.01, "low": 0, "size": 10}, {"top1": 0.8, "size": 20})
    )
    assert best(found) == {"accuracy": [1], "drop, points": [1], "size": [0, 1]}
    assert found.notes == ()
    texts = {column.name: column.texts for column in found.columns}
    assert texts["drop, points"] == ("2.00 (1.00 to 3.00)", "1.00 (0.00 to 3.00)", "2.00 (1.00 to 3.00)")
    assert texts["size"][0] == "10 bytes (4.0 x smaller)"
    assert found.names == ["a", "b", "c"]


def test_runs_are_called_by_their_folders_unless_two_are_called_the_same(runs, tmp_path):
    two = runs({}, {})
    assert comparison.compare(two).names == ["a", "b"]
    other = overview.look_at(made(tmp_path / "others" / "a"))
    assert comparison.compare([*two, other]).names == [run.path for run in (*two, other)]


def test_only_what_differs_in_the_recipes_is_told(runs):
    found = comparison.compare(runs({}, {"weights": 8, "steps": 50}))
    assert found.recipe == {"synthesis.steps": (100, 50), "quantization.weight_bits": (4, 8)}
    assert found.changed == ()


@pytest.mark.parametrize(
    ("other", "unranked", "note"),
    [
        ({"evaluation": "x" * 16}, {"accuracy", "drop, points", "agreement"}, "accuracy: measured on different images"),
        ({"top1": None}, {"drop, points", "agreement"}, "drop, points: some are estimated, or measured on different images"),
        ({"threads": 8}, {"latency", "time"}, "latency: timed with different versions or threads"),
    ],
)
def test_figures_that_mean_something_else_are_not_ranked(runs, other, unranked, note):
    better = {"size": 5, "latency": 1.0, "drop": 0.001, "agreement": 0.99}
    found = comparison.compare(runs({}, better | other))
    assert not unranked & set(best(found))
    assert "size" in best(found)
    assert note in found.notes


def test_different_networks_are_not_compared_silently(runs):
    two = runs({}, {"network": "a:other", "fingerprint": "0" * 16})
    told = f"a:net ({'f' * 16}), a:other ({'0' * 16})"
    with pytest.raises(ConfigError) as caught:
        comparison.compare(two)
    assert str(caught.value) == f"all runs must be of one network, got {told}; compare those of one, or add --any-network"
    found = comparison.compare(two, any_network=True)
    assert found.notes[0] == f"these are different networks: {told}; what is lost can be compared, what is left says little"
    assert not {"accuracy", "size", "latency"} & set(best(found))


def test_runs_that_are_not_there_yet_are_refused(runs):
    whole, part, images = runs({}, {"stages": STAGES[:2]}, {"stages": STAGES[:3], "only": "images"})
    for other, message in (
        (part, f"{part.path}: must be a complete run, got one that is interrupted; leave it out, or run it to its end"),
        (images, f"{images.path}: must be a run of `reverie quantize`, got images alone; leave it out"),
    ):
        with pytest.raises(ConfigError) as caught:
            comparison.compare([whole, other])
        assert str(caught.value) == message
    with pytest.raises(ConfigError, match=r"^compare must be given at least two runs, got 1$"):
        comparison.compare([whole])


def test_an_estimate_beyond_its_calibration_is_a_bound(runs):
    (run,) = runs({"top1": None, "drop": None, "low": 0.12, "high": 1.0})
    assert comparison.drop_text(run) == "above 12.0"
    (other,) = runs({"top1": None, "low": 0.0, "high": 0.05})
    assert comparison.drop_text(other) == "about 2.0 (0.0 to 5.0)"


class Page(HTMLParser):
    """Notes tags, and whatever a page would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "action") and value != "data:,"]


def test_the_page_stands_alone_and_shows_markup_as_text(runs):
    evil = "<script>alert(1)</script>"
    two = runs({"network": f"a:{evil}"}, {"network": f"a:{evil}", "weights": 8, "rounding": "<b>"})
    html = comparison.page(comparison.compare(two))
    page = Page()
    page.feed(html)
    assert page.loads == []
    assert not {"script", "b", "iframe", "object"} & set(page.tags)
    assert "a:&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "prefers-color-scheme: dark" in html
    assert f'content="{comparison.GENERATOR}"' in html
    assert page.tags.count("table") == 3
