"""How much memory a loaded file takes, measured in a process of its own, where nothing was freed before that it could reuse."""

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from reverie.errors import ExportError
from reverie.runtimes import load

_STATM = Path("/proc/self/statm")


def loaded_bytes(runtime: str, path: Path, shape: tuple[int, ...], *, threads: int = 1) -> int | None:
    """By how much the resident size of a process grows when it loads the file and runs one image.

    What the runtime loads of itself at its first file is part of it; the runtime's library is not.

    Args:
        shape: Of one input, without the batch.

    Returns:
        Bytes; None where the system does not tell (it has no /proc).

    Raises:
        ExportError: The runtime cannot load or execute the file, or takes its process down with it.
    """
    if not _STATM.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_growth, runtime, path, shape, threads).result()
        except BrokenProcessPool as error:
            raise ExportError(
                f"{runtime}: it must load and run {path}, got a process that ended; free some memory and try again"
            ) from error


def _growth(name: str, path: Path, shape: tuple[int, ...], threads: int) -> int:
    runtime = load(name)
    images = np.zeros((1, *shape), np.float32)
    before = _resident()
    session = runtime.open(path, threads=threads)
    session(images)
    return _resident() - before


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
