"""`reverie benchmark`: time and memory of a run's exported files in every installed runtime, beside full precision."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions
from reverie.cli._output import say, say_json, say_table
from reverie.cli._runs import check_intact, exported_files, load_network, packed_file
from reverie.errors import ConfigError, ExportError

_FLOAT = "full precision"


def benchmark(
    run: Path,
    /,
    *,
    threads: int = 1,
    batch: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (1, 32),
    repeats: int = 50,
    runtime: str | None = None,
    network: str | None = None,
    json: Json = False,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Time full precision and every exported file of a run in every installed runtime that reads it.

    All take turns in one process, so that what else the machine does hits them alike; medians with quartiles. A file that a runtime
    cannot execute is told, and the others are timed.

    Example: reverie benchmark runs/embedded-digits-w4a8 --threads 2 --batch 1 32

    Args:
        run: A run directory that `reverie quantize` completed.
        threads: That share the work of one call.
        batch: How many images a call has; several are timed one after the other.
        repeats: Timed calls of each.
        runtime: Time in this one only; default: all that are installed.
        network: The full-precision network; default: the one that the run names.
        json: Print the numbers as one JSON document.
    """
    import numpy as np

    from reverie import runtimes
    from reverie.export import _onnx, torch
    from reverie.export._packed import stored_bits
    from reverie.graph.fold import fold_batch_norms
    from reverie.report.measure import latency, sizes
    from reverie.report.outcome import benchmark_notes
    from reverie.runtimes._memory import loaded_bytes
    from reverie.stages import as_teacher

    for name, value in (("threads", threads), ("repeats", repeats), *(("batch", size) for size in batch)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    asked = runtimes.installed() if runtime is None else {runtime: runtimes.load(runtime)}
    files, bits = exported_files(run), stored_bits(packed_file(run))
    check_intact(run, *files)
    loaded = load_network(run, network, options)
    shape = loaded.input.shape
    with tempfile.TemporaryDirectory() as folder:
        graph = fold_batch_norms(as_teacher(loaded).graph)
        # What a runtime executes of ours is compared with full precision in a format that it reads.
        whole = {".onnx": Path(folder) / "float.onnx"}
        _onnx.export_float(graph, shape, whole[".onnx"])
        if any(file.suffix == ".pt2" for file in files) and "torch" in asked:
            whole[".pt2"] = Path(folder) / "float.pt2"
            torch.export_float(graph, shape, whole[".pt2"])
        paths = {
            (form, name): path
            for form, path in [*((_FLOAT, path) for path in whole.values()), *((file.name, file) for file in files)]
            for name, plugin in asked.items()
            if path.suffix in plugin.reads
        }
        if not paths:
            forms = [_FLOAT, *(file.name for file in files)]
            raise ConfigError(f"{run}: a runtime that reads {', '.join(forms)} must be asked, got {', '.join(asked) or 'none'}")
        memory, stored, sessions, failures = {}, {}, {}, []
        for (form, name), path in paths.items():
            try:
                stored[form, name] = sizes({form: path})[form]
                memory[form, name] = loaded_bytes(name, path, shape, threads=threads)
                session = asked[name].open(path, threads=threads)
                session(np.zeros((max(batch), *shape), np.float32))
            except ExportError as error:
                failures.append(f"not timed: {form} in {name}: {error}".replace(str(path), form))
            else:
                sessions[f"{form} in {name}"] = session
        if not sessions:
            raise ExportError("; ".join(failures))
        times = {size: latency(sessions, shape, batch=size, repeats=repeats) for size in batch}
    rows: list[dict[str, Any]] = [
        {
            "form": form,
            "runtime": name,
            "version": runtimes.version(asked[name]),
            "bytes": stored[form, name],
            "memory_bytes": memory[form, name],
            "latency_ms": {
                str(size): {
                    "median": (time := measured[f"{form} in {name}"]).median,
                    "quartiles": [time.lower_quartile, time.upper_quartile],
                    "images_per_second": 1000 * size / time.median,
                    "times_full_precision": _speed(measured, form, name),
                }
                for size, measured in times.items()
            },
        }
        for form, name in paths
        if f"{form} in {name}" in sessions
    ]
    notes = failures + benchmark_notes(rows, list(bits.weights.values()), full_precision=_FLOAT)
    if json:
        say_json({"threads": threads, "repeats": repeats, "rows": rows, "notes": notes})
        return
    _tell(rows, threads, repeats, batch)
    for note in notes:
        say(note)


def _speed(measured: dict[str, Any], form: str, name: str) -> float | None:
    """How many times as fast as full precision in the same runtime, which may not read that."""
    whole = measured.get(f"{_FLOAT} in {name}")
    return None if whole is None else float(whole.median / measured[f"{form} in {name}"].median)


def _tell(rows: list[dict[str, Any]], threads: int, repeats: int, batch: tuple[int, ...]) -> None:
    from reverie.report.outcome import size_text

    head = ["", "runtime", "on disk", "in memory"]
    for size in batch:
        head += [f"batch {size}, ms (quartiles)", "images/s", "speed"]
    lines = []
    for row in rows:
        memory = "-" if row["memory_bytes"] is None else size_text(row["memory_bytes"])
        line = [row["form"], f"{row['runtime']} {row['version']}", size_text(row["bytes"]), memory]
        for size in batch:
            time = row["latency_ms"][str(size)]
            low, high = time["quartiles"]
            speed = time["times_full_precision"]
            line += [
                f"{time['median']:.2f} ({low:.2f} to {high:.2f})",
                f"{time['images_per_second']:.0f}",
                "-" if speed is None else f"{speed:.2f} x",
            ]
        lines.append(line)
    say_table(head, lines, numbers=range(2, len(head)))
    say(f"{threads} {'thread' if threads == 1 else 'threads'}, {repeats} calls of each, taking turns in one process")
