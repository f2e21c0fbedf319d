"""The codes of all tensors of a file, read without changing what the file computes.

To read a code one asks for it as an output, and a runtime that gives it out cannot merge it away: where it would have, it runs
other kernels and rounds elsewhere, and what was seen is not what users get. So all codes are asked for at once, and where that
changes an answer by a single bit, each half of them is asked for alone, and so on. A tensor that changes the answer on its own is
`unseen`: nobody can say which codes it has in the session that users get. Mostly it is what a sum reads, which a runtime adds to in
place; so those are asked for one by one, and the rest is not halved for their sake.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reverie.errors import ExportError
from reverie.plugins import name_of
from reverie.runtimes import Probe, Runtime, Session


@dataclass(frozen=True)
class Undisturbed:
    """A session as users get it, and probes that answer as it does.

    Args:
        session: The session.
        probes: Together they see every tensor that can be seen.
        unrounded: Tensors that the runtime does not put on their grids, because it computes on inside one kernel.
        unseen: Tensors that change the answer when they are asked for.
    """

    session: Session
    probes: tuple[Probe, ...]
    unrounded: frozenset[str]
    unseen: frozenset[str]

    def __call__(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """The logits, and the codes of the tensors that are seen and rounded, by name.

        Raises:
            ExportError: On these images a probe answers otherwise than the session.
        """
        logits = self.session(images)
        codes: dict[str, NDArray[Any]] = {}
        for probe in self.probes:
            answer, found = probe(images)
            if not np.array_equal(answer, logits):
                raise ExportError(
                    "logits: reading the codes must not change them, got the same on the images asked for and a difference of "
                    f"{np.abs(answer - logits).max():.1e} on others; ask for them too"
                )
            codes |= found
        return logits, codes


def undisturbed(
    runtime: Runtime,
    path: Path,
    names: Sequence[str],
    images: NDArray[np.float32],
    *,
    suspects: Set[str] = frozenset(),
    batch: int = 64,
    threads: int = 1,
) -> Undisturbed:
    """Probes for the codes of the tensors `names`, as few as leave the answers for `images` as they are.

    Args:
        suspects: Of the names, those that are likely to change the answer.
        images: All those that will be asked for: what changes one answer of a hundred would be seen too late.
        batch: Images at a time.

    Raises:
        ExportError: The runtime cannot execute the file or answers what is no number, the file lacks one of the tensors, or not a
            single one can be seen.
    """
    session = runtime.open(path, threads=threads)
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    expected = [session(part) for part in parts]
    if bad := sum(int(np.count_nonzero(~np.isfinite(logits))) for logits in expected):
        raise ExportError(
            f"{path}: logits must be finite, got {bad} NaN or infinite ones on {len(images)} images in {name_of(runtime)}; "
            "quantize with more bits, or compare on other images"
        )

    def found(asked: Sequence[str]) -> tuple[Probe, bool]:
        probe = runtime.probe(path, asked, threads=threads)
        return probe, all(np.array_equal(probe(part)[0], logits) for part, logits in zip(parts, expected, strict=True))

    def divided(asked: Sequence[str]) -> tuple[list[Probe], frozenset[str]]:
        if not asked:
            return [], frozenset()
        probe, same = found(asked)
        if same:
            return [probe], frozenset()
        if len(asked) == 1:
            return [], frozenset(asked)
        return joined(divided(asked[: len(asked) // 2]), divided(asked[len(asked) // 2 :]))

    def joined(*answers: tuple[list[Probe], frozenset[str]]) -> tuple[list[Probe], frozenset[str]]:
        return [probe for some, _ in answers for probe in some], frozenset().union(*(hidden for _, hidden in answers))

    whole, same = found(names)
    if same:
        return Undisturbed(session, (whole,), whole.unrounded, frozenset())
    # Of what is not rounded no code is asked for, whoever asks.
    apart = [name for name in names if name in suspects - whole.unrounded]
    harmless = [name for name in apart if found([name])[1]]
    rest = [name for name in names if name not in apart]
    halves = (names[: len(names) // 2], names[len(names) // 2 :]) if len(names) > 1 and not apart else (rest, harmless)
    probes, unseen = joined(*map(divided, halves))
    unseen |= frozenset(apart) - frozenset(harmless)
    if not probes:
        raise ExportError(
            f"{path}: reading codes must not change the logits, got other ones with each of the {len(names)} tensors; this version "
            f"of {name_of(runtime)} optimizes what is probed differently, try another"
        )
    return Undisturbed(session, tuple(probes), frozenset().union(*(probe.unrounded for probe in probes)), unseen)
