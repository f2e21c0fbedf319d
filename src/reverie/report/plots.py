"""Pictures of how images differ from real ones where the network looks (`features.py`), as PNG files.

matplotlib is asked for when something is drawn, through its objects and with its own default style: no global figure,
no user's style. Equal images give equal bytes.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.files import atomic_write
from reverie.models import _libraries
from reverie.report.features import BINS, Deviations, Plane, histograms, off_and_spread, shown_layers
from reverie.report.separation import REAL

_DPI = 150
_MOST_COLUMNS = 4
# Inches; a legend needs as much.
_NARROWEST = 6.0
_LONGEST_TITLE = 30
# With more classes neither a legend nor distinct colours can tell them apart.
_MOST_CLASSES_NAMED = 10
_CLASS_COLOURS = (
    "#4e79a7", "#f28e2b", "#e15759", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#5d626d",
)  # fmt: skip
_SET_COLOURS = ("#4b57c9", "#e07b39", "#2a9d6f", "#b5489b", "#c9a227", "#3aa5c2")
_REAL_COLOUR, _SOFT = "#1d1f24", "#5d626d"


def available() -> bool:
    """Whether matplotlib is installed, without which nothing can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def feature_plane(path: Path, plane: Plane, classes: int) -> None:
    """Draws every set, side by side, coloured by class, as the PNG `path`.

    Args:
        path: Its folder must exist.
        classes: That the network knows.

    Raises:
        ModelError: matplotlib is not installed; the message names the extra.
        ConfigError: No space left, or `path` cannot be written.
    """
    _matplotlib()
    limits = _square(torch.cat(list(plane.points.values())))

    def draw(figure: Any, panels: list[Any]) -> None:
        for axes, (name, points) in zip(panels, plane.points.items(), strict=True):
            axes.set_title(f"{name}, {len(points)} images", fontsize=10)
            colours = _colours(plane.classes[name], classes)
            axes.scatter(*points.T.tolist(), c=colours, s=_size(len(points)), lw=0, alpha=0.75)
            axes.axhline(0, color="#dfdfd8", linewidth=0.6, zorder=0)
            axes.axvline(0, color="#dfdfd8", linewidth=0.6, zorder=0)
            axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        first, second = (f"{100 * share:.0f} %" for share in plane.shares)
        figure.supxlabel(f"first component ({first} of the variance)", fontsize=9, color=_SOFT)
        figure.supylabel(f"second component ({second})", fontsize=9, color=_SOFT)
        if classes <= _MOST_CLASSES_NAMED:
            names = [f"class {number}" for number in range(classes)]
            _legend(figure, names, _CLASS_COLOURS, columns=5, marker="o", linestyle="none", markersize=5)
        else:
            figure.suptitle(f"class 0 is blue, class {classes - 1} red", fontsize=9, color=_SOFT)

    _write(path, draw, len(plane.points), width=3.0, height=3.0, shared=True)


def deviation_histograms(path: Path, found: Deviations) -> None:
    """Draws how single images deviate from the statistics remembered, layer by layer, as the PNG `path`.

    At most twelve batch norms, spread over the depth; writes nothing for a network without any. Errors as for `feature_plane`.
    """
    norms = shown_layers(found)
    if not norms:
        return
    _matplotlib()
    colours = _set_colours(list(found))
    titles = [f"{name}: {_told([parts[norm] for norm in norms])}" for name, parts in found.items()]

    def draw(figure: Any, panels: list[Any]) -> None:
        for axes, norm in zip(panels, norms, strict=True):
            _histogram(axes, *histograms(found, norm), colours)
            axes.set_title(_short(norm), fontsize=8)
        figure.supxlabel("mean over one image less the mean remembered, in standard deviations", fontsize=9, color=_SOFT)
        figure.supylabel("share of images and channels", fontsize=9, color=_SOFT)
        _legend(figure, titles, [colours[name] for name in found], columns=3, linewidth=2)

    _write(path, draw, len(norms), width=2.4, height=1.8, shared=False)


def _told(layers: list[Float[Tensor, "count _"]]) -> str:
    """How far a set is off and spreads, averaged over layers."""
    off, spread = torch.tensor([off_and_spread(part) for part in layers]).mean(dim=0).tolist()
    return f"off by {off:.2f}, spread {spread:.2f}"


def _short(name: str) -> str:
    """A node's name that fits above its panel."""
    name = name.removesuffix("_batch_norm").strip("_")
    return name if len(name) <= _LONGEST_TITLE else f"...{name[3 - _LONGEST_TITLE :]}"


def _histogram(axes: Any, reach: float, parts: dict[str, Float[Tensor, " bins"]], colours: dict[str, str]) -> None:
    """One outline a set, on bins that all share."""
    edges = torch.linspace(-reach, reach, BINS + 1).tolist()
    for name, shares in parts.items():
        axes.stairs(shares.tolist(), edges, color=colours[name], linewidth=1.2, fill=False)
        if name == REAL:
            axes.stairs(shares.tolist(), edges, color=colours[name], alpha=0.12, fill=True)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(bottom=0)
    axes.set_yticks([])


def _set_colours(names: list[str]) -> dict[str, str]:
    others = [name for name in names if name != REAL]
    return {name: _SET_COLOURS[index % len(_SET_COLOURS)] for index, name in enumerate(others)} | {REAL: _REAL_COLOUR}


def _colours(labels: Int[Tensor, " count"], classes: int) -> list[Any]:
    """A colour an image: far apart for few classes, else along a rainbow."""
    if classes <= _MOST_CLASSES_NAMED:
        return [_CLASS_COLOURS[label] for label in labels.tolist()]
    rainbow = _matplotlib().colormaps["turbo"]
    return [rainbow(label / (classes - 1)) for label in labels.tolist()]


def _square(points: Float[Tensor, "count 2"]) -> list[tuple[float, float]]:
    """Limits of both axes, equally long, that leave a margin around all points."""
    low, high = points.amin(dim=0), points.amax(dim=0)
    reach = max(0.54 * float((high - low).max()), 1e-6)
    return [(middle - reach, middle + reach) for middle in ((low + high) / 2).tolist()]


def _size(points: int) -> float:
    """Area of a dot: small where there are many."""
    return min(18.0, max(4.0, 4000 / points))


def _legend(figure: Any, names: list[str], colours: Sequence[str], *, columns: int, **style: Any) -> None:
    """One legend above all panels."""
    line = importlib.import_module("matplotlib.lines").Line2D
    handles = [line([], [], color=colour, label=name, **style) for name, colour in zip(names, colours, strict=False)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(columns, len(handles)), frameon=False, fontsize=9)


def _matplotlib() -> ModuleType:
    return _libraries.require("matplotlib", extra="report", distribution="matplotlib")


def _write(
    path: Path, draw: Callable[[Any, list[Any]], None], count: int, *, width: float, height: float, shared: bool
) -> None:
    """Makes `path` the PNG of `count` panels that `draw` fills.

    Args:
        width: Of one panel, in inches, like `height`.
        shared: Whether all panels have the same axes.
    """
    matplotlib = _matplotlib()
    rows = -(-count // _MOST_COLUMNS)
    columns = -(-count // rows)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        wider = max(1.0, _NARROWEST / (columns * width))
        size = (wider * columns * width + 0.3, wider * rows * height + 0.9)
        figure = importlib.import_module("matplotlib.figure").Figure(size, dpi=_DPI, layout="constrained")
        importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
        for axes in panels:
            axes.tick_params(labelsize=8, colors=_SOFT)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#b9bdc6")
        for axes in panels[count:]:
            axes.remove()
        for axes in panels[max(0, count - columns) : count]:
            # Also where the panel below is missing.
            axes.tick_params(labelbottom=True)
        draw(figure, panels[:count])
        # Without the version of matplotlib that it would note in the file.
        atomic_write(path, lambda aside: figure.savefig(aside, dpi=_DPI, metadata={"Software": None}))
