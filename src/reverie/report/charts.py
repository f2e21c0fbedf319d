"""Charts as inline SVG: no library, no request, colours from the page's CSS variables, so that they are right in light and dark.

Every chart is an image with a text alternative; marks have a `<title>`, which the page's script shows at once and a browser
without it after a while. Text is escaped by `Markup.format`. Sizes are in units of a view box that the page scales; letters are
readable where a chart is as narrow as a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

# A whole number is one too; type checkers know that by themselves, checks at run time do not.
Number = float | int

_WIDTH, _HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
# So many lines of a grid can be told apart in a histogram.
_MOST_LINES = 24


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart.

    Args:
        name: For the titles of its points.
        colour: Number of its colour.
        values: One for each place along the axis.
        low, high: Ends of a band around it, if it has one.
    """

    name: str
    colour: int
    values: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None


def lines(
    series: Sequence[Line],
    places: Sequence[Number],
    *,
    label: str,
    across: str,
    names: Sequence[str] | None = None,
    logarithmic: bool = False,
) -> Markup:
    """Curves over a common axis.

    Args:
        places: Ascending, of the values along the axis.
        label: The text alternative.
        across: What the axis is.
        names: Of the places, for the titles; None for the numbers themselves.
        logarithmic: Whether the values' axis is; values must be positive then.
    """
    everything = [value for line in series for part in (line.values, line.low, line.high) if part is not None for value in part]
    scale = _Scale(everything, logarithmic=logarithmic)
    first, last = places[0], places[-1]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(place: Number) -> float:
        return _LEFT + (place - first) / ((last - first) or 1) * (right - _LEFT)

    def y(value: Number) -> float:
        return bottom - scale(value) * (bottom - _TOP)

    parts = [_tick(y(value), text) for value, text in scale.ticks()]
    for line in series:
        if line.low is not None and line.high is not None:
            there = [(x(place), y(value)) for place, value in zip(places, line.high, strict=True)]
            back = [(x(place), y(value)) for place, value in zip(places, line.low, strict=True)]
            parts.append(Markup('<path class="band s{}" d="{}Z"/>').format(line.colour, _path(there + back[::-1])))
        points = [(x(place), y(value)) for place, value in zip(places, line.values, strict=True)]
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(line.colour, _path(points)))
        for (left, top), place, value in zip(points, places, line.values, strict=True):
            where = names[places.index(place)] if names is not None else f"{across} {place:g}"
            parts.append(
                Markup('<circle class="point s{}" cx="{}" cy="{}" r="4"><title>{}</title></circle>').format(
                    line.colour, _number(left), _number(top), f"{line.name}, {where}: {value:.3g}"
                )
            )
    ends = [(_LEFT, "start", f"{first:g}"), (right, "end", f"{last:g}")] if names is None else []
    parts += [_text(place, bottom + 16, text, anchor) for place, anchor, text in ends]
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 8, across, "middle"))
    return _svg(_WIDTH, _HEIGHT, label, parts, kind="lines")


def scatter(
    points: Sequence[Sequence[Number]],
    groups: Sequence[int],
    limits: tuple[tuple[Number, Number], tuple[Number, Number]],
    *,
    label: str,
    colours: int | None,
) -> Markup:
    """Points on a square.

    Args:
        points: Pairs.
        groups: The class of each, for its title.
        limits: Of both axes, equally long.
        label: The text alternative.
        colours: The one that all points have; None for one for each class, of ten.
    """
    side = 320
    (left, right), (low, high) = limits
    zero = [side * (0 - left) / (right - left), side * (1 - (0 - low) / (high - low))]
    parts = [
        Markup('<path class="grid" d="M{} 0V{s}M0 {}H{s}"/>').format(*(_number(place) for place in zero), s=side),
    ]
    radius = 4.5 if len(points) <= 100 else 3.5
    for (across, up), group in zip(points, groups, strict=True):
        parts.append(
            Markup('<circle class="dot k{}" data-k="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
                group % 10 if colours is None else f"s{colours}",
                group,
                _number(side * (across - left) / (right - left)),
                _number(side * (1 - (up - low) / (high - low))),
                radius,
                f"class {group}",
            )
        )
    return _svg(side, side, label, parts)


def outlines(
    shares: Sequence[Sequence[Number]], reach: Number, *, label: str, numbers: Sequence[int], filled: int | None
) -> Markup:
    """Histograms on common bins from -`reach` to `reach`, as outlines; the one in place `filled` has an area too.

    Args:
        numbers: The colour of each.
    """
    width, height, floor = 220, 110, 92
    most = max(max(part) for part in shares) or 1
    parts = [
        Markup('<path class="grid" d="M{} 4V{}"/>').format(width / 2, floor),
        Markup('<path class="axis" d="M4 {}H{}"/>').format(floor, width - 4),
    ]
    for place, (part, number) in enumerate(zip(shares, numbers, strict=True)):
        corners = [(4.0, float(floor))]
        for index, share in enumerate(part):
            up = floor - share / most * (floor - 8)
            corners += [(4 + (width - 8) * (index + end) / len(part), up) for end in (0, 1)]
        corners.append((width - 4.0, float(floor)))
        if place == filled:
            parts.append(Markup('<path class="band s{}" d="{}Z"/>').format(number, _path(corners)))
        parts.append(Markup('<path class="line thin s{}" d="{}"/>').format(number, _path(corners)))
    ends = [(4, "start", f"{-reach:.2g}"), (width / 2, "middle", "0"), (width - 4, "end", f"{reach:.2g}")]
    parts += [_text(place, floor + 14, text, anchor) for place, anchor, text in ends]
    return _svg(width, height, label, parts)


def on_grid(
    counts: Sequence[int], ends: tuple[Number, Number], grid: tuple[Number, Number], step: Number, *, label: str, unit: str
) -> Markup:
    """A histogram with logarithmic heights, and the grid that its values go to.

    Args:
        ends: Of the histogram.
        grid: Its first and last point.
        step: Between its points, which are drawn where they can be told apart.
        unit: Of the axis.
    """
    width, height, floor, top = 280, 136, 106, 12
    first, last = ends

    def x(value: Number) -> float:
        return 6 + (value - first) / ((last - first) or 1) * (width - 12)

    low, high = grid[0] - step / 2, grid[1] + step / 2
    inside = max(0.0, x(high) - x(low))
    parts = [
        Markup('<rect class="inside" x="{}" y="4" width="{}" height="{}"/>').format(_number(x(low)), _number(inside), floor - 4)
    ]
    levels = round((grid[1] - grid[0]) / step) + 1
    if levels <= _MOST_LINES:
        marks = "".join(f"M{_number(x(grid[0] + index * step))} {floor}v6" for index in range(levels))
        parts.append(Markup('<path class="levels" d="{}"/>').format(marks))
    most = math.log1p(max([1, *counts]))
    bin_width = (last - first) / len(counts)
    total = sum(counts) or 1
    for index, count in enumerate(counts):
        if count:
            left = first + index * bin_width
            up = math.log1p(count) / most * (floor - top)
            beyond = left + bin_width / 2 < low or left + bin_width / 2 > high
            parts.append(
                Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                    "beyond" if beyond else "bin",
                    _number(x(left) + 0.3),
                    _number(floor - up),
                    _number(max(0.6, (width - 12) / len(counts) - 0.6)),
                    _number(up),
                    f"{left:.3g} to {left + bin_width:.3g}: {100 * count / total:.2g} %{', beyond the grid' if beyond else ''}",
                )
            )
    parts.append(Markup('<path class="axis" d="M6 {f}H{}"/>').format(width - 6, f=floor))
    parts += [_text(6, floor + 20, f"{first:.3g}", "start"), _text(width - 6, floor + 20, f"{last:.3g}", "end")]
    parts.append(_text(width / 2, floor + 20, unit, "middle"))
    return _svg(width, height, label, parts)


def columns(values: Sequence[int], names: Sequence[str], *, label: str, most: int, unit: str) -> Markup:
    """A column a value, side by side, with its number on top and its name in its title."""
    each, height = 18, 96
    width, floor = each * len(values), height - 4
    parts = []
    for index, (value, name) in enumerate(zip(values, names, strict=True)):
        up = value / most * (floor - 18)
        parts.append(
            Markup('<g><title>{}</title><rect class="bits b{}" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(
                f"{name}: {value} {unit}", value, index * each + 1.5, _number(floor - up), each - 3, _number(up)
            )
            + _text(index * each + each / 2, floor - up - 4, str(value), "middle")
            + Markup("</g>")
        )
    return _svg(width, height, label, parts, kind="columns", own_width=True)


class _Scale:
    """An axis of values: 0 where it begins, 1 where it ends."""

    def __init__(self, values: Sequence[Number], *, logarithmic: bool) -> None:
        self._log = logarithmic
        low, high = min(values), max(values)
        if logarithmic:
            self._low, self._high = math.log10(low), math.log10(high)
        else:
            self._low, self._high = min(0.0, low), high
        if self._high - self._low < 1e-12:
            self._high = self._low + 1

    def __call__(self, value: Number) -> float:
        place = math.log10(value) if self._log else value
        return (place - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Some three to six round values, with their texts."""
        if self._log:
            steps = [
                factor * 10.0**power
                for power in range(math.floor(self._low), math.ceil(self._high) + 1)
                for factor in (1, 2, 5)
            ]
            inside = [value for value in steps if self._low <= math.log10(value) <= self._high]
            while len(inside) > 6:
                inside = inside[::3] if len(inside) > 12 else inside[::2]
            return [(value, f"{value:g}") for value in inside]
        span = self._high - self._low
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
        first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        return [(index * step, f"{index * step:.10g}") for index in range(first, last + 1)]


def _svg(
    width: Number, height: Number, label: str, parts: Sequence[Markup], *, kind: str = "chart", own_width: bool = False
) -> Markup:
    style = Markup(' style="width:{}px"').format(width) if own_width else Markup("")
    return (
        Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}"{}>').format(kind, width, height, label, style)
        + Markup("").join(parts)
        + Markup("</svg>")
    )


def _tick(up: Number, text: str) -> Markup:
    line = Markup('<path class="grid" d="M{} {y}H{}"/>').format(_LEFT, _WIDTH - _RIGHT, y=_number(up))
    return line + _text(_LEFT - 6, up + 4, text, "end")


def _text(x: Number, y: Number, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(_number(x), _number(y), anchor, text)


def _path(points: Sequence[tuple[Number, Number]]) -> str:
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)


def _number(value: Number) -> str:
    """A coordinate in few letters."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
