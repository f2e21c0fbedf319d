"""What is known of the images that a run used, and their pictures."""

from pathlib import Path
from typing import Any

from reverie.images import Images
from reverie.report import plots, separation
from reverie.report.fidelity import describe
from reverie.synthesis import Teacher

# Real images with which synthetic ones are compared.
_COMPARED = 256


def about(used: dict[str, Images], teacher: Teacher, real: Images | None, folder: Path) -> dict[str, Any]:
    """What is known of the images that were used; with plots in `folder` where matplotlib is there.

    Args:
        used: The sets by name.
        teacher: All sets are looked at in the size of its contract, whatever their own.
        real: Images to compare the others with, if there are any.
        folder: Made if it is not there; its parent must be.
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
    if plots.available():
        folder.mkdir(exist_ok=True)
        plots.feature_plane(folder / "features.png", teacher, sets)
        plots.deviation_histograms(folder / "deviations.png", teacher, sets)
    return found
