"""Progress bars with counts, rates and time left, on stderr: the same for every long work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from cluster.machine import every

console = Console(stderr=True)
_LINE_S = 10.0
_SIGN_S = 60.0
"""A log is told this often that work goes on, though nothing changed."""
speaking = threading.Lock()
"""Held by whoever turns stderr away for a while: what a log is told then would be lost."""


@contextmanager
def progress_bars() -> Generator[Progress]:
    """Bars in a terminal; in a file or a pipe a line now and then, so that a log shows that work goes on."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    plain = not console.is_terminal
    with (
        _Bars(*columns, _Rate(), TimeElapsedColumn(), Remaining(), console=console, disable=plain) as bars,
        every(_LINE_S, _lines_of(bars)) if plain else nullcontext(),
    ):
        yield bars


def _lines_of(bars: Progress, clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """Prints what has changed since it was last called, and now and then what has not; rates below a line are no change, but that there are
    any is."""
    told: dict[TaskID, tuple[str, int]] = {}
    spoke = clock()

    def tell() -> None:
        with speaking:
            _tell()

    def _tell() -> None:
        nonlocal spoke
        for task in list(bars.tasks):
            count = f" {task.completed:.0f} of {task.total:.0f}" if task.total and task.total > 1 else ""
            line = f"{task.description}{count}{', done' if task.finished else ''}"
            below = _below(task)
            if told.get(task.id) != (line, len(below)) and (task.started or task.completed):
                told[task.id] = (line, len(below))
                _say(line, below)
                spoke = clock()
        # A plan that took in fewer than its limit never fills its bar: only the last one that is not full is at work.
        at_work = [task for task in bars.tasks if task.id in told and not _is_full(task)]
        if at_work and clock() - spoke >= _SIGN_S:
            task = at_work[-1]
            _say(f"{told[task.id][0]} ({(task.elapsed or 0) / 60:.0f} min)", _below(task))
            spoke = clock()

    return tell


def _say(line: str, below: Iterable[str]) -> None:
    for text in (line, *(f"  {one}" for one in below)):
        console.print(f"{time.strftime('%H:%M:%S')} {text}", soft_wrap=True, markup=False, highlight=False)


def _is_full(task: Task) -> bool:
    """Also one that was full from the start, which rich does not call finished."""
    return task.finished or (task.total is not None and task.completed >= task.total)


def bar_each(bars: Progress) -> Callable[[str, int, int], None]:
    """(what, done, of) -> None: keeps a bar for each `what` it is told of."""
    tasks: dict[str, TaskID] = {}

    def tick(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=of)
        bars.update(tasks[what], completed=done)

    return tick


def _below(task: Task) -> list[str]:
    """The lines that stand below a task's bar: its field `below`, none once it is finished."""
    return [] if task.finished else list(task.fields.get("below", []))


class _Bars(Progress):
    """Bars with lines below them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield from (Text(f"  {line}", style="dim") for line in _below(task))


class _Rate(TextColumn):
    """Items a second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Any:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")
