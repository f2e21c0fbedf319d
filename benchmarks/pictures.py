"""The images of several runs of one network side by side: a plane of deep features, histograms of deviations, a table.

    python benchmarks/pictures.py build/methods/gdfq-4-0 build/methods/fdda-4-0 --real build/methods/cifar10_train_256_0.npz --output build/pictures

Writes features.png and deviations.png and prints the measures of `reverie.report.separation`. All runs must be of the same
network. `--real` are images to compare with.
"""

import argparse
import json
from pathlib import Path

from reverie import models
from reverie.images.folder import read_folder
from reverie.images.store import load_images
from reverie.report import features, plots, separation
from reverie.stages import as_teacher


def main() -> None:
    """Writes the pictures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    facts = json.loads((options.runs[0] / "run.json").read_text())["facts"]
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in facts["options"].items()}
    network = models.load(facts["network"], **given)
    teacher = as_teacher(network)
    sets = {run.name: load_images(run / "images.safetensors") for run in options.runs}
    if options.real is not None:
        sets["real"] = read_folder(options.real, network.input, network.classes, require_labels=False)
    options.output.mkdir(parents=True, exist_ok=True)
    plots.feature_plane(options.output / "features.png", features.plane(teacher, sets), teacher.classes)
    plots.deviation_histograms(options.output / "deviations.png", features.deviations(teacher, sets))
    measured = separation.describe(teacher, sets)
    names = [name.replace("_", " ") for name in separation.MEASURES]
    print(f"| images | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for name, found in measured.items():
        values = ["-" if found[key] is None else f"{found[key]:.3g}" for key in separation.MEASURES]
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
