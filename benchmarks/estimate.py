"""How far the estimate of the accuracy drop (`report/estimate.py`) is from the truth, and where its constants come from.

    python benchmarks/estimate.py --assets ../shared/assets                        every network, then the table and the constants
    python benchmarks/estimate.py --assets ../shared/assets --networks resnet20    one of them, then the table of all that are there
    python benchmarks/estimate.py --assets ../shared/assets --networks             the table of what is there

Each network is quantized in several settings as `reverie quantize` does it, with one set of images for all of them; the estimate looks
at the images that a run makes for it, the truth at labelled images that the network was not trained on. Rows are kept in
build/estimate, so an interrupted benchmark goes on where it stopped. The estimate in the table is by constants that never saw the row's
network: they are fitted to all the others.
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from reverie import models
from reverie.checkpoints import Forgetful
from reverie.graph.integer import as_integers
from reverie.images import Images
from reverie.images.folder import read_folder
from reverie.models import InputContract, Network
from reverie.pipeline import quantize
from reverie.progress import Silent
from reverie.recipe import Recipe
from reverie.recipes import read
from reverie.report.estimate import OFFSET, Relation, distances
from reverie.report.measure import paired_interval
from reverie.report.metrics import BATCH, predict
from reverie.runs import RunDirectory
from reverie.stages import as_teacher, estimating, method_name, synthesize
from reverie.synthesis import Teacher

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "estimate"
# Drops beyond it are ruins; nobody asks how far they are gone.
LARGEST_DROP = 30.0
TEST_IMAGES, PHOTOGRAPHS = 2000, 300
FLOWER = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RAW = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}


@dataclass(frozen=True)
class Row:
    """A network in one setting: what the estimate looks at, and the truth in percent points."""

    network: str
    setting: str
    full_precision: float
    drop: float
    low: float
    high: float
    distance: list[float]


def settings(network: str) -> dict[str, Recipe]:
    """The recipes that `network` is quantized by."""
    simulated = {"export.method": "none"}
    few = {"images": 32} if network.startswith(("mobilenet", "lite")) else {}

    def bits(weight: int, activation: int) -> dict[str, int]:
        return {"quantization.weight_bits": weight, "quantization.activation_bits": activation}

    pairs = [(8, 8), (6, 6), (5, 5), (4, 8), (4, 4), (3, 8)]
    found = {
        f"zeroq W{weight}A{activation}": read("zeroq", simulated | few | bits(weight, activation))
        for weight, activation in pairs
    }
    if not few:
        short = simulated | {"reconstruction.iterations": 150, "images": 64}
        for weight, activation in ((4, 4), (3, 4), (2, 8)):
            found[f"adaround W{weight}A{activation}"] = read("adaround", short | bits(weight, activation))
        for weight, activation in ((6, 6), (4, 4)):
            found[f"dsg W{weight}A{activation}"] = read("dsg", simulated | bits(weight, activation))
    return found


def cifar10(assets: Path, contract: InputContract) -> Images:
    """The first of CIFAR-10's test images."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    mosaic = np.asarray(Image.open(assets / "data/cifar10/test.webp").convert("RGB"))
    pixels = torch.from_numpy(mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)[:TEST_IMAGES])
    labels = torch.from_numpy(np.load(assets / "data/cifar10/test_labels.npy")).long()[:TEST_IMAGES]
    return Images(inputs=contract.normalize(pixels.float() / 255), labels=labels)


def photographs(assets: Path, contract: InputContract) -> Images:
    """Some of nips2017, evenly from all."""
    return read_folder(assets / "data/nips2017", contract, 1000, require_labels=True).evenly(PHOTOGRAPHS)


def residual(
    assets: Path, name: str, weights: str, arguments: tuple[int, ...], contract: dict[str, tuple[float, ...]]
) -> Network:
    """A CIFAR-10 network of the assets' `models.py`."""
    spec = importlib.util.spec_from_file_location("assets_models", assets / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = getattr(module, name)(*arguments)
    network.load_state_dict(torch.load(assets / "nets/cifar10" / weights, weights_only=True))
    return Network(
        name=weights, module=network.eval(), input=InputContract(channels=3, height=32, width=32, **contract), classes=10
    )


def mobilenet_v1(assets: Path) -> Network:
    """The assets' MobileNetV1 of a quarter of the width."""
    half, weights = (0.5,) * 3, assets / "nets/imagenet/mobilenet_v1_025_224.pth"
    return models.load(
        f"{assets}/models.py:MobileNetV1", weights=weights, input_size=224, mean=half, std=half, classes=1000, resize=256
    )


NETWORKS: dict[str, tuple[str, Callable[[Path], Network]]] = {
    "digits": ("embedded:digits", lambda assets: models.load("embedded:digits")),
    "resnet8": ("ResNet-8, raw pixels", lambda assets: residual(assets, "TinyResNet8", "mlperf_tiny_resnet8.pth", (), RAW)),
    "resnet20": ("ResNet-20", lambda assets: residual(assets, "CifarResNet", "resnet20.pth", (3,), FLOWER)),
    "resnet32": ("ResNet-32", lambda assets: residual(assets, "CifarResNet", "resnet32.pth", (5,), FLOWER)),
    "mobilenet_v1": ("MobileNetV1 0.25", mobilenet_v1),
    "mobilenet_v2": ("MobileNetV2", lambda assets: models.load("package:mobilenet_v2")),
    "lite0": ("EfficientNet-Lite0", lambda assets: models.load("package:efficientnet_lite0")),
}


def labelled(assets: Path, network: Network) -> Images:
    """Images whose labels are the truth."""
    if network.held_out is not None:
        return network.held_out()
    return cifar10(assets, network.input) if network.classes == 10 else photographs(assets, network.input)


def made(recipe: Recipe, teacher: Teacher, kept: dict[str, Images], name: str, count: int) -> Images:
    """Images by the recipe's method, of which settings that differ in nothing else share one set."""
    key = f"{name} {count} {recipe.synthesis}"
    if key not in kept:
        kept[key] = synthesize(recipe, teacher, count, name, Forgetful(), Silent())
    return kept[key]


def measure(name: str, assets: Path) -> None:
    """The rows of a network that are not there yet."""
    file = BUILD / f"{name}.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    missing = {setting: recipe for setting, recipe in settings(name).items() if setting not in {row["setting"] for row in rows}}
    if not missing:
        return
    network = NETWORKS[name][1](assets)
    teacher, images = as_teacher(network), labelled(assets, network)
    assert images.labels is not None
    known, kept = teacher.logits(images.inputs), {}
    for setting, recipe in missing.items():
        learned = made(recipe, teacher, kept, "images", recipe.images)
        foreign = made(estimating(recipe), teacher, kept, "estimate", recipe.estimate_images)
        with tempfile.TemporaryDirectory() as folder, RunDirectory.open(Path(folder) / "run", {}) as directory:
            student = as_integers(quantize(recipe, teacher, {method_name(recipe): learned}, directory, Silent())[1])
        far, answers = (
            torch.cat([predict(student, part) for part in torch.split(inputs, BATCH)])
            for inputs in (foreign.inputs, images.inputs)
        )
        right, ours = known.argmax(dim=1) == images.labels, answers.argmax(dim=1) == images.labels
        truth = paired_interval(right, ours)
        assert foreign.logits is not None
        row = Row(
            network=name,
            setting=setting,
            full_precision=100 * float(right.double().mean()),
            drop=100 * truth.difference,
            low=100 * truth.low,
            high=100 * truth.high,
            distance=[round(value, 5) for value in distances(foreign.logits, far).tolist()],
        )
        rows.append(asdict(row))
        file.write_text(json.dumps(rows, indent=1))
        print(f"{name} {setting}: drop {row.drop:.2f}, distance {np.mean(row.distance):.3f}", file=sys.stderr, flush=True)


def fit(rows: list[Row]) -> Relation:
    """The relation by least squares on logarithms, every network with the same weight; its spread is not known yet."""
    counts = {row.network: sum(other.network == row.network for other in rows) for row in rows}
    weights = np.array([1 / math.sqrt(counts[row.network]) for row in rows])
    far = np.array([np.mean(row.distance) for row in rows])
    lost = np.array([math.log(max(row.drop, 0.0) + OFFSET) for row in rows])
    matrix = np.stack([np.ones_like(far), np.log(far)], axis=1)
    intercept, slope = np.linalg.lstsq(matrix * weights[:, None], lost * weights, rcond=None)[0]
    return Relation(
        intercept=float(intercept), slope=float(slope), spread=0.0, smallest=float(far.min()), largest=float(far.max())
    )


def left_out(rows: list[Row], network: str, spread: float) -> Relation:
    """The relation that all networks but one give."""
    return replace(fit([row for row in rows if row.network != network]), spread=spread)


def spread(rows: list[Row]) -> float:
    """Root mean square of log(drop + OFFSET) less its estimate by the other networks, every network with the same weight."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        estimated = 100 * left_out(rows, row.network, 0.0).drop(float(np.mean(row.distance)))
        error = math.log(max(row.drop, 0.0) + OFFSET) - math.log(estimated + OFFSET)
        errors.setdefault(row.network, []).append(error**2)
    return math.sqrt(float(np.mean([np.mean(values) for values in errors.values()])))


def line(row: Row, relation: Relation) -> tuple[str, bool]:
    """The Markdown row, and whether the interval holds the truth."""
    found = relation(torch.tensor(row.distance, dtype=torch.float64))
    low, high = 100 * found.low, 100.0 if found.high is None else 100 * found.high
    drop = f"more than {low:.1f}" if found.drop is None else f"{100 * found.drop:.1f} [{low:.1f}, {high:.1f}]"
    error = "" if found.drop is None else f"{100 * found.drop - row.drop:+.1f}"
    holds = low <= max(row.drop, 0.0) <= high
    truth = f"{row.drop:.1f} [{row.low:.1f}, {row.high:.1f}]"
    cells = [NETWORKS[row.network][0], row.setting, f"{row.full_precision:.1f}", truth, f"{found.distance:.3f}", drop, error]
    return "| " + " | ".join([*cells, "yes" if holds else "no"]) + " |", holds


def show(rows: list[Row]) -> None:
    """The table, and the constants of all rows."""
    near = [row for row in rows if row.drop <= LARGEST_DROP]
    if len({row.network for row in near}) < 2:
        raise SystemExit("two networks must be there, since each is estimated by the others, got fewer; run more of them")
    around = spread(near)
    print(
        "| network | setting | full precision | drop [95 %] | distance | estimate [90 %] | error | within |\n|---|---|---|---|---|---|---|---|"
    )
    held = []
    for row in near:
        text, holds = line(row, left_out(near, row.network, around))
        print(text)
        held.append(holds)
    print(
        f"\n{sum(held)} of {len(held)} within the interval; left out: {len(rows) - len(near)} rows that lost more than {LARGEST_DROP:g} points"
    )
    print(replace(fit(near), spread=around))


def main() -> None:
    """Measures what is missing, then prints the table and the constants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        measure(name, options.assets)
    show(
        [
            Row(**row)
            for name in NETWORKS
            for file in [BUILD / f"{name}.json"]
            if file.is_file()
            for row in json.loads(file.read_text())
        ]
    )


if __name__ == "__main__":
    main()
