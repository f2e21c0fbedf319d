"""Numbers about finished models: accuracy with an honest interval, agreement, bytes, latency, memory.

Two models judged on the same n images differ in accuracy by the mean of d_i = a_i - b_i, each -1, 0 or 1. With p the
share of images that only a gets right and q the share that only b does, the 95 % interval is the one of Agresti and Min
(2005, Stat. Med. 24:729-740), Wald's after adding half an image to each of the four cells of the table:

    n' = n + 2,  p' = (n p + 1/2) / n',  q' = (n q + 1/2) / n'
    p' - q'  +-  1.96 sqrt((p' + q' - (p' - q')^2) / n')

Unlike the plain one it has a width even if the two models never differ, and it holds its level for few images. It is
widened, where needed, to contain the difference that was measured.

Latency is measured in one process with the runs of all models taking turns, so that whatever else the machine does hits
them alike, in another order each time; medians and quartiles, since the slow tail of a shared machine says nothing about the
model. A turn is two calls, of which the second is timed: the threads of the model before spin for a while when it has
answered, and would be timed with it.
"""

import math
import random
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reverie.errors import ExportError
from reverie.runtimes import Session, parts

_NORMAL_97_5 = 1.959963984540054


class Difference(NamedTuple):
    """A difference of accuracies on the same images, as fractions of 1: first minus second, and its 95 % interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call with a whole batch: median and quartiles over the repeats."""

    median: float
    lower_quartile: float
    upper_quartile: float


def accuracy(predictions: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """The share of predictions that are the labels, 0 to 1."""
    return float((predictions == labels).double().mean())


def agreement(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> float:
    """The share of images that both give the same class, 0 to 1."""
    return accuracy(first, second)


def paired_interval(first: Bool[Tensor, " n"], second: Bool[Tensor, " n"]) -> Difference:
    """The difference of accuracies of two models, with its 95 % interval.

    Args:
        first, second: Whether each model is right, image by image; at least one image.
    """
    count = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    difference = (only_first - only_second) / count
    p, q = (only_first + 0.5) / (count + 2), (only_second + 0.5) / (count + 2)
    reach = _NORMAL_97_5 * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    return Difference(difference, max(-1.0, min(p - q - reach, difference)), min(1.0, max(p - q + reach, difference)))


def sizes(paths: dict[str, Path]) -> dict[str, int]:
    """Bytes of each exported file and of what belongs to it, by the names given.

    Raises:
        ExportError: A file is not there, or what belongs to it.
    """
    for path in paths.values():
        for part in parts(path):
            if not part.is_file():
                raise ExportError(
                    f"{path}: must consist of {', '.join(map(str, parts(path)))}, got no {part.name}; export it again"
                )
    return {name: sum(part.stat().st_size for part in parts(path)) for name, path in paths.items()}


def latency(
    sessions: Mapping[str, Session], shape: tuple[int, ...], *, batch: int = 1, repeats: int = 50, warmup: int = 5
) -> dict[str, Latency]:
    """Times loaded files, taking turns, by the names given.

    Args:
        shape: Of one input, without the batch. What is in the images does not matter to the time; they are zeros.
        repeats: Timed calls per session, after `warmup` untimed turns.
    """
    images = np.zeros((batch, *shape), np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    order, shuffle = list(sessions.items()), random.Random(0).shuffle
    for turn in range(-warmup, repeats):
        shuffle(order)
        for name, session in order:
            session(images)
            start = time.perf_counter()
            session(images)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    quartiles = {name: np.quantile(values, (0.25, 0.5, 0.75)) * 1000 for name, values in seconds.items()}
    return {name: Latency(float(median), float(low), float(high)) for name, (low, median, high) in quartiles.items()}


def peak_memory(device: str) -> int:
    """Bytes: the process's largest resident size, plus what a GPU held."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return own + (int(torch.cuda.max_memory_allocated()) if device.startswith("cuda") else 0)
