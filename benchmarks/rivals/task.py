"""What every tool is given and how it is judged: networks, images, accuracy, the record of a run. Knows nothing of Reverie.

Needs torch, torchvision, numpy and pillow. `prepare_torchvision` has to come before a tool that imports torchvision.
"""

import argparse
import importlib
import json
import operator
import random
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

_JUDGED_AT_ONCE = 100
# Nodes that move or normalize a tensor; batch norms are folded by all tools.
_MOVING = (nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.Flatten)
_MOVING_FUNCTIONS = (torch.flatten, nn.functional.dropout)
_SUMS = (operator.add, torch.add)


@dataclass(frozen=True)
class Task:
    """A network and the images that judge it.

    Args:
        name: "resnet20" or "mobilenet_v2".
        module: The full-precision network, in evaluation mode.
        side: Height and width of its images, pixels.
        folder: Where the tool writes.
        options: What else the command line said.
    """

    name: str
    module: nn.Module
    side: int
    folder: Path
    options: argparse.Namespace

    def judge(self, module: nn.Module) -> float:
        """Share of the images to judge on whose class `module` names first."""
        right, count = 0, 0
        with torch.no_grad():
            for inputs, labels in _judged(self.name, self.options.assets):
                right += int((module(inputs).argmax(dim=1) == labels).sum())
                count += len(labels)
        return right / count

    def write(self, **facts: object) -> None:
        """The record of a run, `result.json`; it is the last thing a run writes."""
        record = {"threads": torch.get_num_threads(), "peak_memory_bytes": peak_memory(), **facts}
        aside = self.folder / "result.json.part"
        aside.write_text(json.dumps(record, indent=1))
        aside.replace(self.folder / "result.json")


def prepare_torchvision() -> None:
    """Lets torchvision be imported beside a CPU-only torch, whose usual wheel misses two detection operators that no tool uses here."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if str(error) != "operator torchvision::nms does not exist":
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        # As long as this module lives, so do the definitions.
        globals()["_torchvision_library"] = library
        importlib.import_module("torchvision")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Flags that every tool's script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--assets", type=Path, required=True)
    made.add_argument("--network", choices=["resnet20", "mobilenet_v2"], required=True)
    made.add_argument("--weight-bits", type=int, default=4)
    made.add_argument("--activation-bits", type=int, default=8)
    made.add_argument("--seed", type=int, required=True)
    made.add_argument("--output", type=Path, required=True, help="folder that gets result.json")
    return made


def begin(options: argparse.Namespace) -> Task:
    """Seeds all random numbers and loads the network."""
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.network == "resnet20":
        return Task("resnet20", _models(options.assets).cifar_net("resnet20"), 32, options.output, options)
    module = importlib.import_module("torchvision.models").mobilenet_v2()
    module.load_state_dict(
        torch.load(options.assets / "nets/imagenet/mobilenet_v2-b0353104.pth", map_location="cpu", weights_only=True)
    )
    return Task("mobilenet_v2", module.eval(), 224, options.output, options)


@dataclass(frozen=True)
class Places:
    """Nodes whose bits differ from the rest in Reverie's `integer` placement with 8-bit ends.

    Args:
        first, last: The layers at the ends.
        last_reads: What leads to the last layer and only moves or averages, in reverse order of execution.
        summed: Convolutions whose output, normalized or not, only sums read.
    """

    first: fx.Node
    last: fx.Node
    last_reads: tuple[fx.Node, ...]
    summed: tuple[fx.Node, ...]


def places(traced: fx.GraphModule) -> Places:
    """Where the exceptions are in a symbolically traced network."""
    modules = dict(traced.named_modules())

    def module(node: fx.Node) -> nn.Module | None:
        return modules[str(node.target)] if node.op == "call_module" else None

    def moves(node: fx.Node) -> bool:
        return isinstance(module(node), _MOVING) or node.target in _MOVING_FUNCTIONS

    def only_summed(node: fx.Node) -> bool:
        return bool(node.users) and all(
            user.target in _SUMS or type(module(user)).__name__ == "Add" or (moves(user) and only_summed(user))
            for user in node.users
        )

    layers = [node for node in traced.graph.nodes if isinstance(module(node), nn.Conv2d | nn.Linear)]
    reads = [layers[-1].all_input_nodes[0]]
    while moves(reads[-1]):
        reads.append(reads[-1].all_input_nodes[0])
    summed = tuple(node for node in layers if only_summed(node))
    return Places(layers[0], layers[-1], tuple(reads), summed)


def peak_memory() -> int:
    """The largest resident set of this process so far, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def versions(*packages: str) -> dict[str, str]:
    """Of the packages and of Python."""
    return {"python": sys.version.split()[0], **{package: version(package) for package in packages}}


def _models(assets: Path):
    """`models.py` of the assets: the small networks and the loaders of images."""
    if str(assets) not in sys.path:
        sys.path.insert(0, str(assets))
    return importlib.import_module("models")


def _judged(network: str, assets: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of network inputs and labels: the CIFAR-10 test set, or the photographs of nips2017."""
    models = _models(assets)
    if network == "resnet20":
        pixels, labels = models.cifar10("test")
        for some, their in zip(pixels.split(_JUDGED_AT_ONCE), labels.split(_JUDGED_AT_ONCE), strict=True):
            yield models.normalize(some, *models.CIFAR_PREP["resnet20"]), their
        return
    rows = models.imagenet_rows("nips2017")
    for begin in range(0, len(rows), _JUDGED_AT_ONCE):
        some = rows[begin : begin + _JUDGED_AT_ONCE]
        prepared = models.IMAGENET_PREP["mobilenet_v2-b0353104"]
        inputs = torch.cat([models.load_image("nips2017", row["file"], *prepared) for row in some])
        yield inputs, torch.tensor([int(row["label"]) for row in some])
