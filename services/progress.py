"""Progress of a run: bars on a terminal, plain lines elsewhere. Knows nothing of what progresses."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class StageProgress:
    """One stage's progress, in its own unit. Use as a context manager."""

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self.console, self.title, self.unit = console, title, unit
        self.total: float | None = None
        self.done = 0.0
        self._started = self._printed = time.monotonic()
        self._first: tuple[float, float] | None = None  # time and `done` at the first update: a stage may go on
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<11}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bars.add_task(title, total=None, note="")

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        if kind is None:
            self._line(final=True)

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Say how far the stage is: `done` of `total` units, and a short note."""
        self.done, self.total = done, total
        self._first = self._first or (time.monotonic(), done)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._line(note=note)

    def _line(self, *, final: bool = False, note: str = "") -> None:
        if final and self._bars is not None:
            return  # the finished bar stays on the screen
        seconds = time.monotonic() - self._started
        of = f" of {self.total:,.0f}" if self.total is not None and not final else ""
        rate = f", {self._rate():,.0f} {self.unit}/s" if self._rate() >= 1 else ""
        note = f", {note}" if note else ""
        self.console.print(
            f"{self.title}: {self.done:,.0f}{of} {self.unit} in {seconds:.0f} s{rate}{note}",
            highlight=False,
            soft_wrap=True,
        )

    def _rate(self) -> float:
        """Units a second since the first update; what was done before does not count."""
        if self._first is None or time.monotonic() <= self._first[0]:
            return 0.0
        return (self.done - self._first[1]) / (time.monotonic() - self._first[0])
