"""Ctrl-C and SIGTERM, sent to this very process."""

import os
import signal
import threading

import pytest

from reverie import interrupts
from reverie.interrupts import Interrupted
from reverie.progress import Silent

SAID = "stopping after this step; once more stops at once"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_end(number):
    before, steps, said = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)], [], []
    with pytest.raises(Interrupted) as stopped, interrupts.heeded(said.append), Silent().stage("synthesize", total=3) as step:
        for part in range(3):
            if part == 1:
                os.kill(os.getpid(), number)
            # The step goes on, and a loop that looks can save.
            steps.append((part, interrupts.asked()))
            step()
    assert steps == [(0, False), (1, True)]
    assert (stopped.value.number, said) == (number, [SAID])
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert not interrupts.asked()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(second):
    reached = []
    with pytest.raises(Interrupted) as stopped, interrupts.heeded(str):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), second)
        reached.append(2)
    assert reached == [1] and stopped.value.number == second


def test_what_is_interrupted_is_no_error_that_anyone_could_swallow():
    assert issubclass(Interrupted, KeyboardInterrupt) and not issubclass(Interrupted, Exception)
    assert str(Interrupted(2)) == "interrupted; run the same command again"


def test_outside_a_step_changes_nothing_and_neither_does_another_thread():
    interrupts.stop_if_asked()
    before, found = signal.getsignal(signal.SIGINT), []

    def work():
        with interrupts.heeded(str):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
