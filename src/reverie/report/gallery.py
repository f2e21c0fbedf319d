"""What is known of the images that a run used, and their pictures."""

from pathlib import Path
from typing import Any

import torch

from reverie.images import Images, evenly
from reverie.report import details, features, nearest, plots, separation, thumbnails
from reverie.report.fidelity import describe
from reverie.synthesis import Teacher

# Real images with which synthetic ones are compared.
_COMPARED = 256
# Points of a set in the report's plane.
_MOST_POINTS = 250


def about(used: dict[str, Images], teacher: Teacher, real: Images | None, folder: Path) -> dict[str, Any]:
    """What is known of the images that were used; with what the report draws of them in `folder`, and plots where matplotlib is there.

    Args:
        used: The sets by name.
        teacher: All sets are looked at in the size of its contract, whatever their own.
        real: Images to compare the others with, if there are any.
        folder: The run directory.
    """
    size = teacher.input.shape[1:]
    used = {name: part.resized(*size) for name, part in used.items()}
    everything = Images.concatenate(list(used.values()))
    found: dict[str, Any] = {
        "count": len(everything),
        "source": {name: len(part) for name, part in used.items()},
        "diversity": describe(teacher, everything),
    }
    if teacher.capsule is not None:
        capsule = teacher.capsule
        found["capsule"] = {"classes": capsule.classes, "missing": capsule.missing, "misclassified": capsule.wrong}
    sets = used if real is None else used | {"real": real.evenly(_COMPARED).resized(*size)}
    found["separation"] = separation.describe(teacher, sets)
    pictures = folder / "plots"
    pictures.mkdir(exist_ok=True)
    # Those that had a part in the synthetic ones come first.
    known = used.get(separation.REAL, sets.get(separation.REAL))
    made = [part for name, part in used.items() if name != separation.REAL]
    if made and known is not None:
        synthetic = Images.concatenate(made)
        found["nearest_real"] = nearest.describe(teacher, synthetic, known)
        nearest.show(pictures / "nearest.png", found["nearest_real"], synthetic, known, teacher.input)
    plane, deviations = features.plane(teacher, sets), features.deviations(teacher, sets)
    details.add(
        folder,
        thumbnails=thumbnails.draw(teacher, sets, pictures),
        plane=_points(plane),
        deviations=_layers(deviations),
    )
    if plots.available():
        plots.feature_plane(pictures / "features.png", plane, teacher.classes)
        plots.deviation_histograms(pictures / "deviations.png", deviations)
    return found


def _points(plane: features.Plane) -> dict[str, Any]:
    """`shares` of the variance, and of each set `points` (of so many images, evenly spaced) and their `classes`."""
    found = {}
    for name, points in plane.points.items():
        chosen = evenly(len(points), _MOST_POINTS)
        found[name] = {"points": details.rounded(points[chosen]), "classes": plane.classes[name][chosen].tolist()}
    return {"shares": list(plane.shares), "sets": found}


def _layers(deviations: features.Deviations) -> dict[str, Any]:
    """`layers`, of each set how far they are `off` and `spread`, and `histograms` of some."""
    names = list(next(iter(deviations.values()), {}))
    told = {
        name: torch.tensor([features.off_and_spread(part) for part in parts.values()]) for name, parts in deviations.items()
    }
    drawn = {norm: features.histograms(deviations, norm) for norm in features.shown_layers(deviations)}
    return {
        "layers": names,
        "sets": {
            name: {"off": details.rounded(rows[:, 0]), "spread": details.rounded(rows[:, 1])}
            for name, rows in (told.items() if names else ())
        },
        "histograms": [
            {"layer": norm, "reach": reach, "sets": {name: details.rounded(part, 3) for name, part in parts.items()}}
            for norm, (reach, parts) in drawn.items()
        ],
    }
