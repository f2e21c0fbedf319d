"""One process's work on a run directory: opened for what is asked, timed, cut to its minutes, left free if it is refused."""

import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reverie import flags, real_images
from reverie.allocator import give_back
from reverie.budget import Schedule, fit
from reverie.checkpoints import SECONDS, SHARE, Folder
from reverie.errors import ConfigError, ModelError
from reverie.files import atomic_json, atomic_text, out_of_space
from reverie.images import Images
from reverie.interrupts import Interrupted
from reverie.models import Network
from reverie.progress import Progress
from reverie.recipe import Recipe
from reverie.recipes import to_toml
from reverie.records import read_metrics
from reverie.request import capsule_digest, identity, images_digest, recipe_changes
from reverie.runs import RunDirectory
from reverie.synthesis import Teacher
from reverie.synthesis._capsule import Capsule


@contextmanager
def working_in(
    folder: Path,
    recipe: Recipe,
    network: Network,
    device: str,
    sets: Mapping[str, Images | None],
    capsule: Capsule | None,
    more: dict[str, str],
    *,
    request: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    accept_changes: bool,
) -> Iterator[RunDirectory]:
    """The run directory, opened for this recipe, network and images; recipe, request and the real images that were read are written.

    Args:
        sets: The real images by what they are for.
        more: What else tells this run from another.
        request: What `reverie resume` asks for once more; None for a run that Python code began.
        facts: What else a new run notes.
        accept_changes: Whether another environment than the one that the run began in will do.

    Raises:
        Interrupted: A signal was heeded, or Ctrl-C pressed; says how to go on.
        ConfigError: As `RunDirectory.open`, or no space is left.
    """
    read = real_images.listed(sets, capsule, request or {})
    known = {name: images_digest(part) for name, part in sets.items()} | {"capsule": capsule_digest(capsule), "device": device}
    noted = {"network": network.name, "options": network.options, "seed": recipe.seed, "device": device, "request": request}

    def explain(changed: list[str]) -> list[str]:
        return recipe_changes(folder, recipe, changed) + real_images.changes(folder, read, changed)

    try:
        with RunDirectory.open(
            folder,
            identity(recipe, network) | known | more,
            facts={**noted, **facts, "real_images": real_images.summary(read)},
            accept_changes=accept_changes,
            explain=explain,
        ) as directory:
            if not directory.is_complete:
                kept = _schedule(directory)
                atomic_text(directory.path / "recipe.toml", to_toml(recipe if kept is None else kept.shorten(recipe)))
                if read:
                    atomic_json(directory.path / real_images.FILE, read)
            yield directory
    except KeyboardInterrupt as error:
        how = "call the same function again" if request is None else f"go on with: {_resuming(folder, network)}"
        raise Interrupted(getattr(error, "number", signal.SIGINT), f"stopped; {how}") from error
    except OSError as error:
        # What is not written by `files.py`, such as what an exporter writes where it will be proven.
        if not out_of_space(error):
            raise
        raise ConfigError(f"{folder}: no space left; free some space and use `{_resuming(folder, network)}`") from error


def _resuming(folder: Path, network: Network) -> str:
    """The command that goes on."""
    again = {key: network.options[key] for key in ("weights", "execute_weights") if network.options.get("execute_weights")}
    return shlex.join(["reverie", "resume", str(folder), *flags.words(again)])


def checkpoints_of(directory: RunDirectory) -> Folder:
    """Where the stages of a run keep their parts."""
    return Folder(directory.checkpoint(""), directory.fingerprint, seconds=SECONDS, share=SHARE)


def finished(directory: RunDirectory) -> dict[str, Any]:
    """What `metrics.json` of a complete run says."""
    file = directory.path / "metrics.json"
    directory.sealed(file)
    return read_metrics(directory.path)


def complete(directory: RunDirectory, metrics: Mapping[str, Any], pages: Mapping[str, str] | None = None) -> None:
    """Writes the last files, records the hashes of all that later commands read, and calls the run complete.

    Args:
        pages: Texts to be read by people, by the name of their file.
    """
    atomic_json(directory.path / "metrics.json", metrics)
    for name, text in (pages or {}).items():
        atomic_text(directory.path / name, text)
    ours = ("*.safetensors", "network.*", "recipe.toml", "metrics.json", "details.json", "report.html", real_images.FILE)
    directory.seal(*sorted({file for pattern in ours for file in directory.path.glob(pattern)}))
    directory.complete()


def within(
    budget: float, recipe: Recipe, teacher: Teacher, real: Images | None, directory: RunDirectory, progress: Progress
) -> Recipe:
    """The recipe, shortened to `budget` minutes by what the first process of the run measured."""
    schedule = _schedule(directory)
    if schedule is None:
        with timed(directory, "budget"), free_if_refused(directory):
            schedule = fit(recipe, teacher, real, budget, progress=progress)
            directory.note(budget=asdict(schedule))
    progress.say(schedule.told(recipe))
    shortened = schedule.shorten(recipe)
    atomic_text(directory.path / "recipe.toml", to_toml(shortened))
    return shortened


def _schedule(directory: RunDirectory) -> Schedule | None:
    """What the first process of the run made of its budget."""
    kept = directory.record["facts"].get("budget")
    return None if kept is None else Schedule(kept["minutes"], kept["factor"], kept["steps"])


@contextmanager
def free_if_refused(directory: RunDirectory) -> Iterator[None]:
    """Leaves the folder free for another request where this one is refused before anything has been learned.

    A run that an earlier process got further with stays as it is: what is refused may be less memory, or another torch.
    """
    try:
        yield
    except (ConfigError, ModelError):
        if not directory.is_new:
            raise
        for name in ("run.json", "recipe.toml", "capsule.safetensors", real_images.FILE):
            (directory.path / name).unlink(missing_ok=True)
        checkpoints = directory.path / "checkpoints"
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
        raise


@contextmanager
def timed(directory: RunDirectory, stage: str) -> Iterator[None]:
    """Records how long what happens inside takes, and leaves no memory behind that is free."""
    began = time.perf_counter()
    yield
    give_back()
    directory.finish(stage, time.perf_counter() - began)
