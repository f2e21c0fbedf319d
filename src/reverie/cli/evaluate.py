"""`reverie evaluate`: a finished run on another folder of images."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions
from reverie.cli._output import say, say_json, say_table
from reverie.cli._runs import check_intact, exported_file, load_network, runtime_of
from reverie.progress import choose


def evaluate(
    run: Path,
    /,
    *,
    data: Path,
    file: str | None = None,
    network: str | None = None,
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Measure a run's exported model beside the full-precision network on a folder of images.

    With labels: accuracy of both and the 95 % interval of the difference. Without: how often both give the same class.

    Example: reverie evaluate runs/nets-resnet20-w4a8 --data cifar10/test

    Example: reverie evaluate runs/nets-resnet20-w4a8 --data cifar10/test --file network.xml

    Args:
        run: A run directory that `reverie quantize` completed.
        data: Folder of images (a folder a class, or with a labels.csv), or an .npz or .safetensors file.
        file: The exported file in the run directory, such as network.xml; default: network.onnx, or what else there is.
        network: The full-precision network; default: the one that the run names.
        json: Print the numbers as one JSON document, and progress as JSON lines on standard error.
    """
    import torch

    from reverie import runtimes
    from reverie.export import _verify as verify
    from reverie.images.folder import read_folder
    from reverie.report import metrics, outcome
    from reverie.stages import as_teacher

    chosen = exported_file(run, file)
    check_intact(run, chosen)
    runtime = runtimes.load(runtime_of(chosen))
    loaded = load_network(run, network, options)
    images = read_folder(data, loaded.input, loaded.classes, require_labels=False)
    session = runtime.open(chosen, threads=torch.get_num_threads())
    models = {
        "full_precision": partial(metrics.predict, as_teacher(loaded).graph),
        "exported": partial(verify.predict, session, batch=metrics.BATCH),
    }
    with choose(sys.stderr, json).stage("evaluate", total=-(-len(images) // metrics.BATCH)) as step:
        scores: dict[str, Any] = {"file": chosen.name, "images": len(images), **metrics.score(models, images, step)}
    if json:
        say_json(scores)
        return
    head, rows = outcome.score_table(scores)
    say_table(head, rows, numbers=range(1, len(head)))
    say(f"exported: {chosen.name} in {runtime.library}")
    say(f"images: {len(images)} in {data}{'' if images.labels is not None else ', no labels'}")
