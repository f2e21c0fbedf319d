"""Twelve thousand damaged and hostile files, of which ten thousand are refused: each ends in a line of ours, or is as good as another.

    python benchmarks/fuzz.py                                    all readers, 12,500 inputs; a table
    python benchmarks/fuzz.py --reader onnx --inputs 200         one reader
    python benchmarks/fuzz.py --commands 300                     through the command line, exit status and output looked at
    python benchmarks/fuzz.py --reader onnx --only 17            one input, here and now, for a debugger; its file stays

Whole files come first, below build/fuzz: a run of `embedded:digits`, its exported files, a capsule, pictures, and what else each reader takes. An
input is one of them after a mutation (`mutations.py`), or a folder with something odd in it; the reader, a number and the seed decide which.

A reader works in a process of its own with limits on memory and time, in a folder that holds nothing but the input. Outcomes:

    accepted    it was read. A format without a checksum cannot tell other numbers from damaged ones; run.json has hashes of what a run wrote
    refused     a `ReverieError`, whose text becomes one line
    fault       another exception, a warning, more than 10 seconds, a crash, or a folder that is not what it was
"""

import argparse
import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import torch
from mutations import BYTES, Mutation
from PIL import Image, PngImagePlugin

from reverie import models, recipes
from reverie.checkpoints import Folder
from reverie.cli import main as command_line
from reverie.errors import ReverieError
from reverie.files import ASIDE

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "fuzz"
SECONDS = 10
# Above what the process takes when it begins; the largest tensor that is let through has 1 GiB.
MEMORY = 6 * 2**30
CONTRACT = {"mean": (0.5,), "std": (0.25,)}
NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""
_FILES = ("a.png", "b.png", "../a.png", "/etc/passwd", "", "nowhere.png", '"', "a.png,1,2")
_LABELS = ("0", "1", "-1", "x", "", "9" * 5000, "\u0663", "1.0")
NET = ["--input-size", "8", "--mean", "0.5", "--std", "0.25", "--classes", "3"]


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Args:
        seeds: Patterns of whole files below the folder of seeds.
        edits: Mutations that know the format.
        place: Puts the mutated bytes where the reader looks: the folder of the input, the seed, the bytes. Gives what to hand it.
        read: The reader; the same calls as those of the commands.
        command: A command line that reads it.
        inputs: The share of all inputs that are for this reader, as a number beside those of others.
    """

    seeds: tuple[str, ...]
    edits: tuple[Mutation, ...]
    place: Callable[[Path, Path, bytes], Path]
    read: Callable[[Path], Any]
    command: Callable[[Path, Path], list[str]]
    inputs: int


def beside(folder: Path, seed: Path, data: bytes) -> Path:
    """The file alone."""
    path = folder / seed.name
    path.write_bytes(data)
    return path


def in_run(folder: Path, seed: Path, data: bytes) -> Path:
    """The run with the file in place of its own; the hashes of an untouched run would find it at once, so they are not there."""
    run = folder / "run"
    shutil.copytree(BUILD / "unhashed", run)
    (run / seed.name).write_bytes(data)
    return run


def in_interrupted(folder: Path, seed: Path, data: bytes) -> Path:
    """An interrupted run with the file in place of its own."""
    run = folder / "run"
    shutil.copytree(BUILD / "interrupted", run)
    (run / seed.name).write_bytes(data)
    return run


def in_pictures(folder: Path, seed: Path, data: bytes) -> Path:
    """A folder with a whole picture, and the file."""
    pictures = folder / "pictures"
    pictures.mkdir()
    shutil.copy(BUILD / "pictures" / "0.png", pictures / "whole.png")
    (pictures / seed.name).write_bytes(data)
    return pictures


def as_folder(folder: Path, _: Path, data: bytes) -> Path:
    """A folder with something odd in it; the bytes say what."""
    chance, pictures = random.Random(data), folder / "pictures"
    pictures.mkdir()
    whole = (BUILD / "pictures" / "0.png").read_bytes()
    (pictures / "a.png").write_bytes(whole)
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(
            ("b.png", "c\nd.png", '"><script>.png', "\x1b[2J.png", "é.png", "x" * 250 + ".png", "sub/e.png", ".png")
        )
        path = pictures / name
        path.parent.mkdir(exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        chance.choice(
            (
                lambda path=path: path.symlink_to("nowhere"),
                lambda path=path: path.symlink_to(path.name),
                lambda path=path: path.symlink_to("/dev/zero"),
                lambda path=path: path.symlink_to(pictures),
                lambda path=path: os.mkfifo(path),
                lambda path=path: path.mkdir(),
                lambda path=path: path.write_bytes(b""),
                lambda path=path: path.write_bytes(whole),
            )
        )()
    if chance.random() < 0.2:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(os.fsencode(pictures) + b"/\xff\xfe.png", os.O_CREAT | os.O_WRONLY))
    if chance.random() < 0.5:
        rows = "".join(f"{chance.choice(_FILES)},{chance.choice(_LABELS)}\n" for _ in range(chance.randint(0, 3)))
        text = chance.choice(("file,label\n", "label,file\n", "", "\ufefffile,label\n")) + rows
        (pictures / "labels.csv").write_bytes(
            chance.choice(BYTES)(text.encode(), whole, chance) if chance.random() < 0.5 else text.encode()
        )
    return pictures


def read_network(run: Path) -> None:
    """What `verify`, `export` and `diagnose` read: `cli._runs.restored`, with a network that is captured once."""
    from reverie.cli._runs import packed_file
    from reverie.export._packed import restore, stored_bits
    from reverie.stages import student_of

    packed = packed_file(run)
    resolved, bits = recipes.read(str(run / "recipe.toml")), stored_bits(packed)
    _, student = student_of(teacher().graph, resolved.quantization, bits)
    restore(student, packed)


def read_record(run: Path) -> None:
    """What every command about a run reads first."""
    from reverie.cli._options import NO_OPTIONS
    from reverie.cli._runs import exported_files, load_network, packed_file

    exported_files(run)
    packed_file(run)
    load_network(run, None, NO_OPTIONS)


def read_interrupted(run: Path) -> None:
    """What `resume` and `runs` read first; the network is not loaded here, nor what is not this very one."""
    from reverie.cli._request import asked_in
    from reverie.cli._runs import check_code
    from reverie.recipes import from_tables
    from reverie.report import details, overview

    overview.look_at(run)
    details.read(run)
    if (asked := asked_in(run)) is not None:
        check_code(run, asked["network"], "type its command again")
        from_tables(asked["recipe"])


def read_exported(run: Path) -> None:
    """The certificates that `verify` reads, and the programs that it loads."""
    from reverie.export._certificate import attached
    from reverie.runtimes.torch import Torch

    # The program first: its certificate would find any change.
    Torch().open(run / "network.pt2")
    for file in ("network.onnx", "network.xml", "network.pt2"):
        attached(run / file)


def read_images(path: Path) -> None:
    """What `images`, `export` and `diagnose` read."""
    from reverie.images.store import load_images

    load_images(path)


def read_capsule(path: Path) -> None:
    """What `--capsule` reads."""
    from reverie.synthesis._capsule import load_capsule

    load_capsule(path, teacher())


def read_pictures(path: Path) -> None:
    """What `--calibration`, `--evaluate` and `--data` read."""
    from reverie.images.folder import read_folder

    network = digits()
    read_folder(path, network.input, network.classes, require_labels=False)


def read_weights(path: Path) -> None:
    """What `--weights` reads."""
    models.load(f"{BUILD / 'nets.py'}:net", input_size=8, classes=3, weights=path, **CONTRACT)


@functools.cache
def digits() -> models.Network:
    """The network that everything belongs to."""
    return models.load("embedded:digits")


@functools.cache
def teacher() -> Any:
    """The same, captured."""
    from reverie.stages import as_teacher

    return as_teacher(digits())


def calibrated(path: Path, out: Path) -> list[str]:
    """A command line that reads images."""
    return ["capsule", "embedded:digits", "--calibration", str(path), "--output", str(out)]


def synthesized(*words: str, out: Path) -> list[str]:
    """A command line that makes one image."""
    return ["synthesize", "embedded:digits", *words, "--images", "1", "--set", "synthesis.steps=1", "--output", str(out)]


READERS = {
    "recipe": Reader(
        ("recipes/*.toml",),
        (mutations.toml_edit,),
        beside,
        lambda path: recipes.read(str(path)),
        lambda path, out: synthesized("--recipe", str(path), out=out),
        1500,
    ),
    "network.safetensors": Reader(
        ("unhashed/network.safetensors",),
        (mutations.safetensors_edit,),
        in_run,
        read_network,
        lambda run, _: ["verify", str(run), "--images", "2", "--runtime", "onnxruntime"],
        1000,
    ),
    "images.safetensors": Reader(
        ("unhashed/images.safetensors",),
        (mutations.safetensors_edit,),
        beside,
        read_images,
        calibrated,
        800,
    ),
    "capsule": Reader(
        ("capsule.safetensors",),
        (mutations.safetensors_edit,),
        beside,
        read_capsule,
        lambda path, out: synthesized("--recipe", "fdda", "--capsule", str(path), out=out),
        800,
    ),
    "run.json": Reader(
        ("unhashed/run.json", "run/run.json"),
        (mutations.json_edit,),
        in_run,
        read_record,
        lambda run, _: ["verify", str(run), "--images", "2", "--runtime", "onnxruntime"],
        1300,
    ),
    "interrupted": Reader(
        ("interrupted/run.json", "interrupted/run.json", "interrupted/details.json"),
        (mutations.json_edit,),
        in_interrupted,
        read_interrupted,
        lambda run, _: ["resume", str(run)],
        1000,
    ),
    "checkpoint": Reader(
        ("checkpoints/part.safetensors",),
        (mutations.safetensors_edit,),
        beside,
        lambda path: Folder(path.parent, "aaaa").load(path.stem),
        # No command takes one by its name.
        lambda path, _: ["inspect", str(path)],
        1000,
    ),
    "pictures": Reader(
        ("pictures/*.*",),
        (mutations.png_edit,),
        in_pictures,
        read_pictures,
        calibrated,
        1200,
    ),
    "folder": Reader(
        ("pictures/0.png",),
        (),
        as_folder,
        read_pictures,
        calibrated,
        500,
    ),
    "npz": Reader(
        ("arrays.npz",),
        (mutations.zip_edit, mutations.npz_edit),
        beside,
        read_pictures,
        calibrated,
        700,
    ),
    "weights": Reader(
        ("weights/*.*",),
        (mutations.zip_edit,),
        beside,
        read_weights,
        lambda path, _: ["inspect", f"{BUILD / 'nets.py'}:net", "--weights", str(path), *NET],
        700,
    ),
    "onnx": Reader(
        ("onnx/*.onnx",),
        (mutations.onnx_edit,),
        beside,
        lambda path: models.load(str(path), **CONTRACT),
        lambda path, _: ["inspect", str(path), "--mean", "0.5", "--std", "0.25"],
        1000,
    ),
    "exported": Reader(
        ("unhashed/network.onnx", "unhashed/network.xml", "unhashed/network.pt2", "unhashed/network.pt2"),
        (mutations.zip_edit,),
        in_run,
        read_exported,
        lambda run, _: ["verify", str(run), "--images", "2"],
        500,
    ),
}


def make_seeds() -> None:
    """Whole files of every kind, once."""
    if (BUILD / "whole").is_file():
        return
    shutil.rmtree(BUILD, ignore_errors=True)
    for folder in ("pictures", "recipes", "weights", "onnx"):
        (BUILD / folder).mkdir(parents=True)
    run = [
        "quantize",
        "embedded:digits",
        "--images",
        "8",
        "--set",
        "synthesis.steps=3",
        "--set",
        "held_out=4",
        "--output",
        str(BUILD / "run"),
    ]
    for command in (run, *(["export", str(BUILD / "run"), "--target", target] for target in ("openvino", "torch"))):
        assert command_line(command) == 0
    shutil.copytree(BUILD / "run", BUILD / "unhashed")
    record = json.loads((BUILD / "run" / "run.json").read_text())
    # Neither hashes of its files nor of itself, which would find any change before anything else looks.
    del record["facts"]["sha256"], record["sha256"]
    (BUILD / "unhashed" / "run.json").write_text(json.dumps(record))
    shutil.copytree(BUILD / "unhashed", BUILD / "interrupted")
    (BUILD / "interrupted" / "run.json").write_text(json.dumps(record | {"complete": False, "stages": {}}))
    (BUILD / "checkpoints").mkdir()
    Folder(BUILD / "checkpoints", "aaaa").save("part", {"codes": torch.arange(600).reshape(20, 30), "scale": torch.tensor(0.5)})
    for name in recipes.presets():
        (BUILD / "recipes" / f"{name}.toml").write_text(recipes.to_toml(recipes.read(name)))
    chance = np.random.default_rng(0)
    levels = chance.integers(0, 255, (4, 20, 24, 3), dtype=np.uint8)
    told = PngImagePlugin.PngInfo()
    told.add_text("comment", "x" * 2000, zip=True)
    for index, (picture, suffix) in enumerate(zip(levels, ("png", "jpg", "webp", "bmp"), strict=True)):
        Image.fromarray(picture).save(
            BUILD / "pictures" / f"{index}.{suffix}", **({"pnginfo": told} if suffix == "png" else {})
        )
    labels = np.arange(4)
    np.savez(BUILD / "arrays.npz", images=levels[..., :1], labels=labels)
    np.savez_compressed(BUILD / "labelled.npz", images=levels[..., :1], labels=labels)
    assert (
        command_line(
            [
                "capsule",
                "embedded:digits",
                "--calibration",
                str(BUILD / "labelled.npz"),
                "--output",
                str(BUILD / "capsule.safetensors"),
            ]
        )
        == 0
    )
    (BUILD / "nets.py").write_text(NETS)
    net = models.load(f"{BUILD / 'nets.py'}:net", input_size=8, classes=3, **CONTRACT).module
    state = net.state_dict()
    torch.save(state, BUILD / "weights" / "zip.pt")
    torch.save(state, BUILD / "weights" / "legacy.pth", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file(state, BUILD / "weights" / "plain.safetensors")
    with warnings.catch_warnings():
        # The exporters of torch warn of themselves.
        warnings.simplefilter("ignore")
        for name, module, shape in (
            ("net", net, (1, 1, 8, 8)),
            ("digits", digits().module, (1, *digits().input.shape)),
        ):
            for way in (False, True):
                more: dict[str, Any] = (
                    {"external_data": False} if way else {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]}
                )
                torch.onnx.export(
                    module, (torch.zeros(shape),), BUILD / "onnx" / f"{name}{way:d}.onnx", dynamo=way, verbose=False, **more
                )
    (BUILD / "whole").touch()


def mutated(name: str, number: int, seed: int) -> tuple[Path, bytes]:
    """Input `number` of a reader: the file it was made of, and its bytes."""
    reader, chance = READERS[name], random.Random(f"{seed} {name} {number}")
    files = sorted(file for pattern in reader.seeds for file in BUILD.glob(pattern))
    file, other = chance.choice(files), chance.choice(files)
    data = file.read_bytes()
    if not reader.edits:
        return file, str(number).encode()
    mutation = chance.choice(reader.edits if chance.random() < 0.6 else BYTES)
    if mutation is mutations.png_edit and file.suffix != ".png":
        mutation = mutations.flip_early
    if mutation is mutations.zip_edit and data[:2] != b"PK":
        mutation = mutations.safetensors_edit if file.suffix == ".safetensors" else chance.choice(BYTES)
    if mutation is mutations.onnx_edit and file.suffix != ".onnx":
        mutation = chance.choice(BYTES)
    return file, mutation(data, other.read_bytes(), chance)


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    """What is in a folder, and when it was written."""
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def outcome(read: Callable[[], Any], folder: Path) -> tuple[str, str]:
    """How reading ended, and what it said."""
    before = snapshot(folder)
    with warnings.catch_warnings(), written(folder) as text:
        warnings.simplefilter("error")
        try:
            read()
            ended = "accepted", ""
        except ReverieError as error:
            ended = "refused", str(error)
        except Exception as error:  # noqa: BLE001 - what this looks for
            ended = "fault", f"{type(error).__name__}: {error}"
    if snapshot(folder) != before:
        return "fault", "the folder was changed"
    return ended if not text[0] else ("fault", f"printed {text[0][:200]!r}")


@contextlib.contextmanager
def written(folder: Path) -> Iterator[list[str]]:
    """What the process writes inside, by whatever means; there once it is over."""
    text = [""]
    with folder.with_name("written").open("w+b") as file:
        sys.stdout.flush(), sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for descriptor, original in enumerate(kept, start=1):
                os.dup2(original, descriptor)
                os.close(original)
            file.seek(0)
            text[0] = file.read().decode(errors="replace")


def command(argv: list[str], folder: Path) -> tuple[str, str]:
    """The same for a command line, by its exit status and the whole of what the process wrote."""
    with written(folder) as output:
        try:
            status = command_line(argv)
        except BaseException as error:  # noqa: BLE001 - what this looks for
            return "fault", f"{type(error).__name__}: {error}"
    text = output[0]
    if left := [path for place in (folder, folder.with_name("out")) for path in place.rglob(ASIDE)]:
        return "fault", f"left {left[0].name}"
    if status == 0:
        return "accepted", ""
    lines = [line for line in text.splitlines() if line.startswith("reverie: ")]
    good = status == 1 and len(lines) == 1 and text.endswith(f"{lines[0]}\n") and "Traceback" not in text
    return ("refused", lines[0]) if good else ("fault", f"status {status}: {text[-300:]!r}")


def work(name: str, numbers: list[int], seed: int, commands: bool, answers: Connection) -> None:
    """Reads inputs until there are none left; each answer goes to the parent at once."""
    # Dies with the parent.
    ctypes.CDLL(None).prctl(1, 9)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader, scratch = READERS[name], BUILD / "scratch" / f"{name}-{os.getpid()}"
    for number in numbers:
        shutil.rmtree(scratch, ignore_errors=True)
        folder = scratch / "input"
        folder.mkdir(parents=True)
        path = reader.place(folder, *mutated(name, number, seed))
        began = time.perf_counter()
        ended = (
            command(reader.command(path, scratch / "out"), folder)
            if commands
            else outcome(lambda path=path: reader.read(path), folder)
        )
        answers.send((number, *ended, time.perf_counter() - began))
    shutil.rmtree(scratch, ignore_errors=True)
    answers.send(None)


def run(name: str, count: int, seed: int, commands: bool) -> list[tuple[int, str, str, float]]:
    """Every input of a reader with its outcome."""
    context, found, left = multiprocessing.get_context("fork"), list[tuple[int, str, str, float]](), list(range(count))
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, left, seed, commands, theirs))
        process.start()
        theirs.close()
        while left:
            try:
                answer = ours.recv() if ours.poll(SECONDS * (6 if commands else 1)) else "hang"
            except EOFError:
                answer = "crash"
            if isinstance(answer, str):
                process.kill()
                process.join()
                found.append((left.pop(0), "fault", f"{answer}, exit {process.exitcode}", float(SECONDS)))
                print(f"{name} {found[-1][0]}: {found[-1][2]}", file=sys.stderr, flush=True)
                break
            if answer is None:
                break
            found.append(answer)
            left.remove(answer[0])
            if answer[1] == "fault":
                print(f"{name} {answer[0]}: {' '.join(answer[2].split())[:300]}", file=sys.stderr, flush=True)
        process.join()
    return found


def main() -> None:
    """Makes what is missing, reads, and prints the table; faults with their numbers on standard error, as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, action="append")
    parser.add_argument("--inputs", type=int, default=12_500, help="of all readers together, or of the one that is named")
    parser.add_argument("--commands", type=int, help="so many command lines instead, of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    given = parser.parse_args()
    torch.set_num_threads(1)
    make_seeds()
    names = given.reader or list(READERS)
    if given.only is not None:
        folder = BUILD / "only"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        READERS[names[0]].read(READERS[names[0]].place(folder, *mutated(names[0], given.only, given.seed)))
        return
    total = sum(READERS[name].inputs for name in names)
    teacher()
    print("| reader | inputs | accepted | refused | faults | slowest, s |\n|---|---|---|---|---|---|", flush=True)
    sums, texts = Counter[str](), Counter[str]()
    for name in names:
        count = max(1, (given.commands or given.inputs) * READERS[name].inputs // total)
        found = run(name, count, given.seed, given.commands is not None)
        kinds = Counter(kind for _, kind, _, _ in found)
        sums += kinds
        texts.update(f"{name}: {text}" for _, kind, text, _ in found if kind == "refused")
        slowest = max(seconds for *_, seconds in found)
        print(
            f"| {name} | {len(found)} | {kinds['accepted']} | {kinds['refused']} | {kinds['fault']} | {slowest:.1f} |",
            flush=True,
        )
    print(f"| all | {sums.total()} | {sums['accepted']} | {sums['refused']} | {sums['fault']} | |")
    (BUILD / "refusals.json").write_text(json.dumps(texts.most_common(), indent=1, ensure_ascii=True))


if __name__ == "__main__":
    main()
