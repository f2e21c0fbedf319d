"""Pictures of how images differ from real ones where the network looks: a plane of deep features, and deviations by layer.

    feature_plane          x_i is what the last layer reads of image i. The plane is spanned by the two directions in which
                           all sets together vary most, each set weighing the same: the eigenvectors of
                           mean over sets of (mean over its images of (x_i - o)(x_i - o)^T), o the mean of the sets' means,
                           each turned so that its largest entry is positive.
    deviation_histograms   (m_l^i - mu_l)/sigma_l for every image i and channel of a batch norm l: how far the mean over an
                           image alone is from the one remembered, in running standard deviations. Images optimized one by
                           one towards the statistics pile up at 0; real ones spread.

Reference: Zhang et al. 2021, arXiv:2103.01049 (DSG), for homogenization, which the histograms show.

matplotlib is asked for when something is drawn, through its objects and with its own default style: no global figure,
no user's style. Equal images give equal bytes. Not here: t-SNE, whose picture depends on its settings.
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

from reverie.graph.batch_norm import BatchNorm, Observed
from reverie.graph.operators import arguments, layers
from reverie.graph.taps import tap
from reverie.images import Images, evenly
from reverie.models import _libraries
from reverie.report.separation import REAL
from reverie.runs import atomic_write
from reverie.synthesis import Teacher

_DPI = 150
_BATCH = 64
# More points hide each other, and every one costs a pass through the network.
_MOST_IMAGES = 1000
_MOST_LAYERS = 12
_MOST_COLUMNS = 4
# Inches; a legend needs as much.
_NARROWEST = 6.0
_BINS = 60
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


def feature_plane(path: Path, teacher: Teacher, sets: dict[str, Images]) -> None:
    """Draws the deep features of every set, side by side on one plane, coloured by class, as the PNG `path`.

    Args:
        path: Its folder must exist.
        sets: By name, not empty each; of large ones a thousand images, evenly spaced, are shown.

    Raises:
        ModelError: matplotlib is not installed; the message names the extra.
        ConfigError: No space left, or `path` cannot be written.
    """
    _matplotlib()
    read = {name: _features(teacher, images) for name, images in sets.items()}
    projected, shares = principal_plane([features for features, _ in read.values()])
    limits = _square(torch.cat(projected))

    def draw(figure: Any, panels: list[Any]) -> None:
        for axes, (name, (_, labels)), points in zip(panels, read.items(), projected, strict=True):
            axes.set_title(f"{name}, {len(points)} images", fontsize=10)
            axes.scatter(*points.T.tolist(), c=_colours(labels, teacher.classes), s=_size(len(points)), lw=0, alpha=0.75)
            axes.axhline(0, color="#dfdfd8", linewidth=0.6, zorder=0)
            axes.axvline(0, color="#dfdfd8", linewidth=0.6, zorder=0)
            axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        figure.supxlabel(f"first component ({100 * shares[0]:.0f} % of the variance)", fontsize=9, color=_SOFT)
        figure.supylabel(f"second component ({100 * shares[1]:.0f} %)", fontsize=9, color=_SOFT)
        if teacher.classes <= _MOST_CLASSES_NAMED:
            names = [f"class {number}" for number in range(teacher.classes)]
            _legend(figure, names, _CLASS_COLOURS, columns=5, marker="o", linestyle="none", markersize=5)
        else:
            figure.suptitle(f"class 0 is blue, class {teacher.classes - 1} red", fontsize=9, color=_SOFT)

    _write(path, draw, len(sets), width=3.0, height=3.0, shared=True)


def deviation_histograms(path: Path, teacher: Teacher, sets: dict[str, Images]) -> None:
    """Draws how single images deviate from the statistics remembered, layer by layer, as the PNG `path`.

    At most twelve batch norms, spread over the depth; writes nothing for a network without any. Arguments and errors as
    for `feature_plane`.
    """
    norms = [teacher.batch_norms[index] for index in evenly(len(teacher.batch_norms), _MOST_LAYERS).tolist()]
    if not norms:
        return
    _matplotlib()
    found = {name: _deviations(teacher, images, norms) for name, images in sets.items()}
    colours = _set_colours(list(sets))
    titles = [f"{name}: {_off_and_spread(list(parts.values()))}" for name, parts in found.items()]

    def draw(figure: Any, panels: list[Any]) -> None:
        for axes, norm in zip(panels, norms, strict=True):
            parts = {name: deviations[norm.name] for name, deviations in found.items()}
            _histogram(axes, parts, colours)
            axes.set_title(_short(norm.name), fontsize=8)
        figure.supxlabel("mean over one image less the mean remembered, in standard deviations", fontsize=9, color=_SOFT)
        figure.supylabel("share of images and channels", fontsize=9, color=_SOFT)
        _legend(figure, titles, [colours[name] for name in sets], columns=3, linewidth=2)

    _write(path, draw, len(norms), width=2.4, height=1.8, shared=False)


def principal_plane(sets: list[Float[Tensor, "_ width"]]) -> tuple[list[Float[Tensor, "_ 2"]], tuple[float, float]]:
    """Every set on the plane where all together vary most, each weighing the same, and the shares of variance of its axes."""
    origin = torch.stack([features.mean(dim=0) for features in sets]).mean(dim=0)
    centred = [features - origin for features in sets]
    _, scales, directions = torch.linalg.svd(torch.cat([rows / len(rows) ** 0.5 for rows in centred]), full_matrices=False)
    plane = directions[:2]
    # The sign of a direction is arbitrary.
    plane = plane * plane.gather(1, plane.abs().argmax(dim=1, keepdim=True)).sign()
    shares = scales.square() / scales.square().sum().clamp(min=1e-30)
    return [rows @ plane.T for rows in centred], (float(shares[0]), float(shares[1]))


def _features(teacher: Teacher, images: Images) -> tuple[Float[Tensor, "count width"], Int[Tensor, " count"]]:
    """What the last layer reads of the images shown, and their classes: the labels, or what the teacher takes them for."""
    last = arguments(layers(teacher.graph)[-1])["input"].name
    logits = next(node for node in teacher.graph.graph.nodes if node.op == "output").args[0].name
    tapped = tap(teacher.graph, [last, logits])
    shown, rows, classes = images.evenly(_MOST_IMAGES), [], []
    with torch.no_grad():
        for part in torch.split(shown.inputs, _BATCH):
            values = tapped(part.to(teacher.device))
            rows.append(values[last].flatten(1).cpu())
            classes.append(values[logits].argmax(dim=1).cpu())
    return torch.cat(rows), torch.cat(classes) if shown.labels is None else shown.labels.cpu()


def _deviations(teacher: Teacher, images: Images, norms: list[BatchNorm]) -> dict[str, Float[Tensor, "count _"]]:
    """By batch norm: (m - mu)/sigma of every image shown and channel."""
    place = {norm.name: index for index, norm in enumerate(teacher.batch_norms)}
    observed = Observed(teacher.graph, "sample")
    parts: dict[str, list[Tensor]] = {norm.name: [] for norm in norms}
    with torch.no_grad():
        for part in torch.split(images.evenly(_MOST_IMAGES).inputs, _BATCH):
            means = observed(part.to(teacher.device))[1].mean
            for norm in norms:
                parts[norm.name].append(((means[place[norm.name]] - norm.mean) / norm.deviation).cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _off_and_spread(layers: list[Float[Tensor, "count _"]]) -> str:
    """How far the whole set is from 0 and its images from each other, averaged over channels and layers.

    Noise is alike from image to image and yet off; its histogram is wide because every channel is off by something else.
    """
    off = torch.stack([part.mean(dim=0).abs().mean() for part in layers]).mean()
    spread = torch.stack([part.std(dim=0, correction=0).mean() for part in layers]).mean()
    return f"off by {off:.2f}, spread {spread:.2f}"


def _short(name: str) -> str:
    """A node's name that fits above its panel."""
    name = name.removesuffix("_batch_norm").strip("_")
    return name if len(name) <= _LONGEST_TITLE else f"...{name[3 - _LONGEST_TITLE :]}"


def _histogram(axes: Any, parts: dict[str, Float[Tensor, "_ channels"]], colours: dict[str, str]) -> None:
    """One outline a set, on bins that all share; what lies outside is in the outermost bins."""
    reach = max(1e-6, *(float(part.abs().flatten().quantile(0.99)) for part in parts.values()))
    edges = torch.linspace(-reach, reach, _BINS + 1)
    for name, part in parts.items():
        counts = torch.histogram(part.flatten().clamp(-reach, reach), edges).hist
        heights = (counts / counts.sum()).tolist()
        axes.stairs(heights, edges.tolist(), color=colours[name], linewidth=1.2, fill=False)
        if name == REAL:
            axes.stairs(heights, edges.tolist(), color=colours[name], alpha=0.12, fill=True)
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
