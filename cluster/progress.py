"""Progress bars with counts, rates and time left, on stderr: the same for every long work."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

console = Console(stderr=True)


@contextmanager
def progress_bars() -> Generator[Progress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, _Rate(), TimeElapsedColumn(), Remaining(), console=console) as bars:
        yield bars


def bar_each(bars: Progress) -> Callable[[str, int, int], None]:
    """(what, done, of) -> None: keeps a bar for each `what` it is told of."""
    tasks: dict[str, TaskID] = {}

    def tick(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=of)
        bars.update(tasks[what], completed=done)

    return tick


class _Rate(TextColumn):
    """Items a second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Any:
        from rich.text import Text

        return Text(f"{task.speed:.1f}/s" if task.speed else "")
