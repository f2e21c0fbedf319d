"""Progress on a terminal: a bar for the stage, one for the whole, a line for each stage that is over, and images as they are made."""

import os
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from reverie.progress import Pictures, Timed, duration_text
from reverie.progress._pictures import Painter, choose_painter

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Showing images takes at most this share of the time, and there are not more strips of them than a screen holds.
_SHARE, _STRIPS = 0.01, 6
_SECONDS_BETWEEN_STRIPS = 3.0
# A bar wider than this says no more.
_BAR = 40


class Bars(Timed):
    """On standard error."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        # Of the last strip of images: when it came, and how long showing it took.
        self._strips, self._shown_at, self._showing = 0, float("-inf"), 0.0
        self._share = 0.0

    def say(self, text: str) -> None:
        # Rich writes it above the bars that are being drawn.
        self._screen.print(text, markup=False, highlight=False)

    def show(self, pictures: Pictures) -> None:
        """A strip of them above the bars, where the terminal can show pictures and there is time for it."""
        now = self._clock()
        wait = max(_SECONDS_BETWEEN_STRIPS, self._showing / _SHARE)
        if self._painter is None or self._strips == _STRIPS or now - self._shown_at < wait:
            return
        from rich.segment import ControlType, Segment, Segments

        # What Rich takes for a control sequence, whichever, is written as it is.
        raw = Segment(self._painter(pictures(), self._screen.width - 1), None, [(ControlType.CARRIAGE_RETURN,)])
        self._screen.print(Segments([raw]), end="")
        self._strips, self._shown_at, self._showing = self._strips + 1, now, self._clock() - now

    @cached_property
    def _screen(self) -> "Console":
        # Takes 0.1 s to import, which nobody without a terminal should wait for.
        from rich.console import Console

        return Console(stderr=True)

    @cached_property
    def _painter(self) -> Painter | None:
        if not self._screen.is_terminal or self._screen.no_color:
            return None
        return choose_painter(os.environ, true_colour=self._screen.color_system == "truecolor")

    def _show(self, event: str) -> None:
        if event == "start":
            from rich.live import Live

            self._loss = ""
            # Gone when the stage is over: a line stays.
            self._live = Live(get_renderable=self._rows, console=self._screen, refresh_per_second=8, transient=True)
            self._live.start()
        elif event == "advance":
            self._loss = self.note or self._loss
        else:
            self._live.stop()
            whole = self.done >= self.total
            if self.total == 1:
                steps = [] if whole else ["stopped"]
            else:
                steps = [f"{self.total} steps" if whole else f"stopped at {self.done} of {self.total} steps"]
            parts = [*steps, f"in {duration_text(self.seconds)}", *([self._loss] if self._loss else [])]
            self._screen.print(f"{self.name:<17} {', '.join(parts)}", style="green" if whole else "red", highlight=False)

    def _rows(self) -> "RenderableType":
        """The stage, and below it the whole; text that the terminal has no room for is cut, not wrapped."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        table.add_column(width=17, no_wrap=True)
        table.add_column(ratio=None, width=min(_BAR, max(10, self._screen.width // 4)))
        table.add_column(justify="right", width=4)
        table.add_column(no_wrap=True, overflow="ellipsis")
        left = self.seconds_left
        told = [] if left is None else [f"{duration_text(left)} left"]
        told += [self._loss] if self._loss else []
        # Of a single step nobody knows how much is done.
        bar = ProgressBar(total=1, completed=self.fraction, pulse=self.total == 1)
        table.add_row(self.name, bar, f"{self.fraction:.0%}" if self.total > 1 else "", ", ".join(told))
        overall = self.seconds_left_overall
        if overall is not None:
            so_far = self.seconds_overall
            # What is left may turn out to be more than was thought; what is done stays done.
            share = self._share = max(self._share, so_far / max(so_far + overall, 1e-9))
            number = f"stage {list(self.plan_of_stages).index(self.name) + 1} of {len(self.plan_of_stages)}"
            told = [f"{duration_text(overall)} left", number]
            table.add_row("all stages", ProgressBar(total=1, completed=share), f"{share:.0%}", ", ".join(told), style="dim")
        return table
