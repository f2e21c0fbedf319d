"""Ctrl-C and SIGTERM: the first one asks to stop after the step that is running, the second stops at once.

    with interrupts.heeded(progress.say):   the first signal only leaves a mark (and says so)
        ...
        if interrupts.asked(): save         a loop that can save at any step does so, marked or not
        interrupts.stop_if_asked()          every step of a stage (`progress.py`) ends with this

Outside `heeded` nothing is changed: Ctrl-C raises at once, and SIGTERM ends the process, which a run survives as it does a kill.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal was heeded. No `Exception`, so that nobody who catches those goes on after it.

    Args:
        number: Of the signal.
        told: For the user, such as how to go on.
    """

    def __init__(self, number: int, told: str = "interrupted; run the same command again") -> None:
        super().__init__(told)
        self.number = number


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked: list[int] = []


def asked() -> bool:
    """Whether a signal came that `stop_if_asked` will heed."""
    return bool(_asked)


def stop_if_asked() -> None:
    """Ends the step.

    Raises:
        Interrupted: A signal came.
    """
    if _asked:
        raise Interrupted(_asked[0])


@contextmanager
def heeded(tell: Callable[[str], object]) -> Iterator[None]:
    """Signals stop what happens inside as the module says. Only the main thread is sent any; in others this changes nothing.

    Args:
        tell: Is given a line for the user when the first signal comes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        _asked.append(number)
        for each in _SIGNALS:
            signal.signal(each, second)
        tell("stopping after this step; once more stops at once")

    def second(number: int, frame: FrameType | None) -> None:
        # A third one must not wait for anything, not even for the clearing up after the second.
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    before = {each: signal.signal(each, first) for each in _SIGNALS}
    try:
        yield
    finally:
        _asked.clear()
        for each, handler in before.items():
            signal.signal(each, handler)
