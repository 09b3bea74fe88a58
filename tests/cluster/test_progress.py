import io

import pytest
from rich.console import Console

from cluster import progress


def test_without_a_terminal_a_log_gets_lines_of_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=sink))
    with progress.progress_bars() as bars:
        task = bars.add_task("make: pictures", total=8)
        bars.add_task("train", total=4, start=False)
        tell = progress._lines_of(bars)
        bars.advance(task, 3)
        tell()
        tell()
        bars.advance(task, 5)
    lines = [line.split(" ", 1)[1] for line in sink.getvalue().splitlines()]
    assert lines == ["make: pictures 3 of 8", "make: pictures 8 of 8, done"]
