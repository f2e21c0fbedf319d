"""Charts are well-formed, to scale, and have words for those who do not see them."""

import re
from xml.etree import ElementTree

import pytest

from reverie.report import charts


def parsed(markup):
    root = ElementTree.fromstring(str(markup))
    assert root.get("role") == "img"
    assert root.get("aria-label")
    return root


def test_a_curve_is_to_scale_with_a_title_at_every_point():
    line = charts.Line(name="loss", colour=0, values=[4.0, 2.0, 0.0])
    root = parsed(charts.lines([line], [0, 10, 20], label="falls", across="step"))
    points = root.findall("circle")
    heights = [float(point.get("cy")) for point in points]
    places = [float(point.get("cx")) for point in points]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert heights[0] < heights[2]
    assert [point.find("title").text for point in points] == ["loss, step 0: 4", "loss, step 10: 2", "loss, step 20: 0"]


def test_a_logarithmic_curve_halves_by_the_same_way_each_time():
    line = charts.Line(name="loss", colour=0, values=[8.0, 4.0, 2.0], low=[4.0, 2.0, 1.0], high=[16.0, 8.0, 4.0])
    root = parsed(charts.lines([line], [0, 1, 2], label="falls", across="step", logarithmic=True))
    heights = [float(point.get("cy")) for point in root.findall("circle")]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert [tick.text for tick in root.findall("text")][:5] == ["1", "2", "5", "10", "0"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [3.0, 3.0, 3.0], [-1.0, 1.0]])
def test_flat_and_single_curves_can_be_drawn(values):
    line = charts.Line(name="x", colour=0, values=values)
    assert "nan" not in charts.lines([line], list(range(len(values))), label="x", across="step")


def test_bins_beyond_the_grid_are_marked_and_few_levels_are_drawn():
    counts = [1, 0, 5, 100, 5, 0, 0, 2]
    root = parsed(charts.on_grid(counts, (-4.0, 4.0), (-2.0, 1.0), 1.0, label="x", unit="codes"))
    bars = [bar for bar in root.findall("rect") if bar.get("class") != "inside"]
    assert [bar.get("class") for bar in bars] == ["beyond", "bin", "bin", "bin", "beyond"]
    assert bars[-1].find("title").text == "3 to 4: 1.8 %, beyond the grid"
    assert len(re.findall("M", root.find("path[@class='levels']").get("d"))) == 4
    many = parsed(charts.on_grid(counts, (-4.0, 4.0), (-2.0, 1.0), 3 / 255, label="x", unit="values"))
    assert many.find("path[@class='levels']") is None


def test_columns_are_as_high_as_their_bits():
    root = parsed(charts.columns([8, 4, 2], ["a", "b", "c"], label="bits", most=8, unit="bits"))
    heights = [float(bar.get("height")) for bar in root.iter("rect")]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 4], abs=0.1)
    assert [title.text for title in root.iter("title")] == ["a: 8 bits", "b: 4 bits", "c: 2 bits"]


def test_points_lie_where_they_are_with_up_up():
    root = parsed(charts.scatter([[-1.0, -1.0], [1.0, 1.0]], [3, 17], ((-1.0, 1.0), (-1.0, 1.0)), label="x", colours=None))
    places = [(point.get("cx"), point.get("cy"), point.get("class"), point.get("data-k")) for point in root.findall("circle")]
    assert places == [("0", "320", "dot k3", "3"), ("320", "0", "dot k7", "17")]


def test_markup_in_names_stays_text():
    bad = '</title><script>alert(1)</script>" onload="x'
    line = charts.Line(name=bad, colour=0, values=[1.0, 2.0])
    drawn = [
        charts.lines([line], [0, 1], label=bad, across=bad, names=[bad, bad]),
        charts.columns([4], [bad], label=bad, most=8, unit="bits"),
        charts.on_grid([1], (0.0, 1.0), (0.0, 1.0), 1.0, label=bad, unit=bad),
        charts.outlines([[1.0, 2.0]], 1.0, label=bad, numbers=[0], filled=0),
    ]
    for chart in drawn:
        root = parsed(chart)
        assert root.get("aria-label") == bad
        assert not list(root.iter("script"))
