"""`reverie resume`: an interrupted run, from its directory alone."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.cli import quantize, synthesize
from reverie.cli._options import Json
from reverie.cli._output import say, say_json
from reverie.cli._request import asked_in
from reverie.cli._runs import check_code, check_intact, recorded
from reverie.errors import ConfigError
from reverie.progress import choose

if TYPE_CHECKING:
    from reverie.pipeline import Run


def resume(
    run: Path,
    /,
    *,
    accept_changes: bool = False,
    weights: Path | None = None,
    execute_weights: bool = False,
    json: Json = False,
) -> None:
    """Go on with an interrupted run from its last checkpoint; it ends with the bytes that it would have had undisturbed.

    Nothing but the run directory is needed: it says what was asked for, except --execute-weights. It may have been moved. Network,
    images and recipe must be what they were, and so must versions; the run's own number of threads is used. A complete run is left as it
    is, and its files are compared with the hashes that it recorded.

    Example: reverie resume runs/embedded-digits-w4a8

    Args:
        run: A run directory that `reverie quantize` or `reverie synthesize` began.
        accept_changes: Go on with other versions of the libraries or another processor; the bytes may then be others.
        weights: The network's weights, where they lie elsewhere now.
        execute_weights: As for `reverie quantize`: run the code in the file that --weights names, as a program with all your rights.
        json: Print the metrics as one JSON document, and progress as JSON lines on standard error.
    """
    from reverie.runs import read_record

    record, asked = read_record(run), asked_in(run)
    if asked is None:
        raise ConfigError(
            f"{run}: must be a run that a command line began, got one that Python code began; call the same function again with "
            "this output, it goes on"
        )
    target = asked["target"]
    # What was to be written for a tool comes after the images, and may be what is left to do.
    if record["complete"] and (target is None or (run / target).is_dir()):
        check_intact(run, *(run / name for name in record["facts"].get("sha256", {})))
        if json:
            _print_metrics(run)
        else:
            say(f"{run} is complete; there is nothing to resume")
        return
    import torch

    # Fewer or more threads sum in another order.
    torch.set_num_threads(record["versions"]["threads"])
    run, here = run.absolute(), Path(asked["folder"])
    weights = None if weights is None else weights.absolute()
    # What was given by relative paths lies where it did, or has been moved along with the current folder.
    with contextlib.chdir(here) if here.is_dir() else contextlib.nullcontext():
        done = _repeat(asked, run, accept_changes, weights, execute_weights, json)
    if json:
        say_json(done.metrics)
    elif asked["command"] == "quantize":
        quantize.show(done)
    else:
        synthesize.show(done, asked["target"])


def _repeat(
    asked: dict[str, Any], output: Path, accept_changes: bool, weights: Path | None, execute_weights: bool, json: bool
) -> "Run":
    from reverie import formats, interrupts, loggers, models, pipeline, plugins
    from reverie.best import Choice
    from reverie.recipes import from_tables, tables
    from reverie.stages import reads_labels
    from reverie.synthesis._capsule import load_capsule

    recipe = from_tables(asked["recipe"])
    given = recorded(asked["options"], weights, execute_weights)
    used = [loggers.load(name) for name in asked["log"]]
    check_code(output, asked["network"], "type the command that began the run")
    network = models.load(asked["network"], **given)
    shown = choose(sys.stderr, json)
    paths = {name: Path(asked[name]) for name in ("calibration", "capsule", "unlabelled") if asked[name] is not None}
    labels = reads_labels(recipe, capsule="capsule" in paths)
    common: dict[str, Any] = {
        "output": output,
        "calibration": quantize.read_images(paths.get("calibration"), network, require_labels=labels, option="--calibration"),
        "capsule": load_capsule(paths["capsule"]) if "capsule" in paths else None,
        "device": asked["device"],
        "memory_limit": asked["memory_limit"],
        "accept_changes": accept_changes,
        "request": asked,
    }
    with interrupts.heeded(shown.say), loggers.logged(shown, used, output, network.name) as progress:
        common["progress"] = progress
        if asked["command"] == "synthesize":
            done = pipeline.run_synthesis(recipe, network, **common)
            if asked["target"] is not None:
                form = plugins.load(formats, asked["target"])()
                synthesize.write_form(form, done, network)
            return done
        noted = asked["choice"]
        done = pipeline.run(
            recipe,
            network,
            evaluation=None if asked["evaluation"] is None else quantize.labelled(asked["evaluation"], network),
            unlabelled=quantize.read_images(paths.get("unlabelled"), network, require_labels=False, option="--unlabelled"),
            budget=asked["budget"],
            choice=None if noted is None else Choice(noted["preset"], noted["settings"], tuple(noted["reasons"])),
            **common,
        )
        progress.result(done.metrics, tables(recipe))
        return done


def _print_metrics(run: Path) -> None:
    from reverie.records import read_metrics

    say_json(read_metrics(run))
