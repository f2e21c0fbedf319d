"""Kills real runs at random moments of every stage, resumes them, and compares bytes with those of a run that nobody disturbed.

    python benchmarks/kills.py --kills 24 --seed 0

Each recipe runs once undisturbed, and its progress says when each stage begins and ends. Every stage is killed once, however long it takes,
then what lies between stages, at a random moment of it: a new run gets SIGKILL, `reverie resume` goes on with it, and `images.safetensors`
and `network.safetensors` have to be the same bytes. Prints a line for each kill, and a table of kills by stage at the end. The exit
status is 1 if any run ended with other bytes.

What a checkpoint costs is measured in the undisturbed run: the share of the time of the stages that writing them took
(`checkpoints.py` keeps it below 2 %), and how many were written.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FILES = ("images.safetensors", "network.safetensors")
_SMALL = {"images": 48, "calibration_images": 48, "held_out": 8, "estimate_images": 8}
# Between them they have every stage that there is.
RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "mixed precision, clipping, layers": (
        "adaround",
        {"synthesis.steps": 40, "synthesis.batch": 16, "reconstruction.iterations": 150, "clipping.images": 20}
        | {"clipping.steps": 60, "mixed_precision.effective_bits": 4},
    ),
    "clusterq: generator, distillation, blocks": (
        "clusterq",
        {"synthesis.steps": 60, "synthesis.refine_steps": 15, "distillation.steps": 60, "distillation.synthetic": "both"}
        | {"reconstruction.iterations": 60},
    ),
    "brecq, then distillation": (
        "brecq",
        {"synthesis.steps": 40, "synthesis.batch": 16, "reconstruction.iterations": 60, "distillation.steps": 60}
        | {"distillation.after": "rounding", "distillation.cut_mix": 0.5},
    ),
    "genie, qdrop": ("qdrop", {"synthesis.method": "genie", "synthesis.steps": 40, "reconstruction.iterations": 80}),
}
# Reports what writing checkpoints took, on its last line.
_MEASURED = """
import json, sys, time
from reverie import checkpoints
from reverie.cli import main
spent, save = [], checkpoints.Folder.save
def timed(self, name, part):
    began = time.perf_counter()
    save(self, name, part)
    spent.append(time.perf_counter() - began)
checkpoints.Folder.save = timed
status = main(sys.argv[1:])
sys.stderr.write(json.dumps({"event": "checkpoints", "count": len(spent), "seconds": sum(spent)}) + "\\n")
sys.exit(status)
"""


@dataclass(frozen=True)
class Moment:
    """A part of a run: `stage`, or what comes behind it (export, measuring without steps) or before the first.

    Args:
        event: The event after which it begins, and how many like it came before; None for the start of the process.
        seconds: How long it took.
    """

    name: str
    event: tuple[str, str, int] | None
    seconds: float


def command(preset: str, settings: dict[str, object], output: Path) -> list[str]:
    """Of a run."""
    words = ["quantize", "embedded:digits", "--recipe", preset, "--output", str(output), "--json"]
    return words + [word for key, value in (_SMALL | settings).items() for word in ("--set", f"{key}={value}")]


def timeline(words: list[str]) -> tuple[list[Moment], dict[str, float]]:
    """The parts of an undisturbed run, and what its checkpoints cost."""
    found: list[Moment] = []
    seen: Counter[tuple[str, str]] = Counter()
    last, since, cost = None, time.perf_counter(), {}
    with subprocess.Popen([sys.executable, "-c", _MEASURED, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as ran:
        assert ran.stderr is not None
        for line in ran.stderr:
            event = json.loads(line)
            if event["event"] == "checkpoints":
                cost = event
            if event["event"] not in ("start", "finish"):
                continue
            now = time.perf_counter()
            name = event["stage"] if event["event"] == "finish" else "capture" if last is None else f"after {last[1]}"
            found.append(Moment(name, last, now - since))
            key = (event["event"], event["stage"])
            last, since = (*key, seen[key]), now
            seen[key] += 1
    if ran.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {ran.returncode}")
    found.append(Moment("after the last stage", last, time.perf_counter() - since))
    # Nothing happens in what is shorter.
    return [moment for moment in found if moment.seconds > 0.02], cost


def killed(words: list[str], moment: Moment, share: float) -> bool:
    """Runs the command and kills it when the share of the moment has gone; whether there was still something to kill."""
    seen: Counter[tuple[str, str]] = Counter()
    with subprocess.Popen(
        [sys.executable, "-m", "reverie", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr if moment.event is not None else ():
            event = json.loads(line)
            if event["event"] in ("start", "finish"):
                key = (event["event"], event["stage"])
                if (*key, seen[key]) == moment.event:
                    break
                seen[key] += 1
        time.sleep(share * moment.seconds)
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
    return alive


def _shuffled(draw: random.Random, moments: list[Moment]) -> list[Moment]:
    """The stages in some order, and then what lies before and between them."""
    between = [moment for moment in moments if moment.event is None or moment.event[0] == "finish"]
    inside = [moment for moment in moments if moment not in between]
    return draw.sample(inside, len(inside)) + draw.sample(between, len(between))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="*", type=int, default=range(len(RECIPES)), help="by number, from 0; default: all")
    options = parser.parse_args()
    draw, stages = random.Random(options.seed), Counter[str]()
    chosen = [list(RECIPES.items())[number] for number in options.recipes]
    failed = done = 0
    for number, (name, (preset, settings)) in enumerate(chosen):
        kills = options.kills // len(chosen) + (number < options.kills % len(chosen))
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole"
            moments, cost = timeline(command(preset, settings, whole))
            seconds = sum(moment.seconds for moment in moments[1:])
            print(
                f"{name}: {seconds:.1f} s after capture, {cost['count']} checkpoints took {cost['seconds'] / seconds:.2%} of it"
            )
            # Every stage once before what lies between them, and that before any comes again.
            turns = [moment for _ in range(kills) for moment in _shuffled(draw, moments)][:kills]
            for turn, moment in enumerate(turns):
                run, share = Path(folder) / f"{turn}", draw.random()
                alive = killed(command(preset, settings, run), moment, share)
                again = ["resume", str(run)] if (run / "run.json").exists() else command(preset, settings, run)
                ended = subprocess.run([sys.executable, "-m", "reverie", *again], capture_output=True, text=True)
                same = ended.returncode == 0 and all((run / file).read_bytes() == (whole / file).read_bytes() for file in FILES)
                stages[moment.name] += 1
                done, failed = done + same, failed + (not same)
                how = "the same bytes" if same else f"OTHER BYTES {ended.stderr[-300:]}"
                print(f"  {moment.name} at {share:.0%}{'' if alive else ' (had ended)'}: {again[0]}, {how}", flush=True)
    print(f"\n{done} of {done + failed} kills resumed to the same bytes")
    print("\n".join(f"| {name} | {count} |" for name, count in stages.most_common()))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
