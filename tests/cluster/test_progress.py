import io
import threading

import pytest
from rich.console import Console

from cluster import progress
from cluster.runner import _hushed


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
        bars.update(task, below=["loading"])
        tell()
        bars.update(task, below=["other words, as many lines"])
        tell()
        bars.advance(task, 5)
    lines = [line.split(" ", 1)[1] for line in sink.getvalue().splitlines()]
    assert lines == ["make: pictures 3 of 8", "make: pictures 3 of 8", "  loading", "make: pictures 8 of 8, done"]


def test_a_log_gets_a_sign_of_life_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    sink, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "console", Console(file=sink))
    bars = progress._Bars(disable=True, get_time=lambda: now[0])
    bars.add_task("plan: taking in prompts", total=9, completed=5)
    task = bars.add_task("make: pictures", total=8, below=["loading"])
    bars.add_task("full from the start", total=4, completed=4)
    bars.add_task("train", total=4, start=False)
    tell = progress._lines_of(bars, lambda: now[0])
    for second in range(0, 300, 10):
        now[0] = float(second)
        if second == 200:
            bars.advance(task, 3)
        tell()
    lines = [line.split(" ", 1)[1] for line in sink.getvalue().splitlines() if "loading" not in line]
    still = [f"make: pictures 0 of 8 ({minutes} min)" for minutes in (1, 2, 3)]
    last = ["make: pictures 3 of 8", "make: pictures 3 of 8 (4 min)"]
    first = ["plan: taking in prompts 5 of 9", "make: pictures 0 of 8", "full from the start 4 of 4"]
    assert lines == [*first, *still, *last]


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_below_a_bar_are_shown_until_it_is_full(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    sink = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=sink, force_terminal=terminal, width=100))
    with progress.progress_bars() as bars:
        task = bars.add_task("make: pictures", total=8)
        bars.update(task, completed=4, below=["render 3/s 90% busy", "kept so far 2 of 4"])
        bars.refresh() if terminal else progress._lines_of(bars)()
        assert "  render 3/s 90% busy" in sink.getvalue() and "  kept so far 2 of 4" in sink.getvalue()
        sink.truncate(0)
        bars.update(task, completed=8)
        bars.refresh() if terminal else progress._lines_of(bars)()
        assert "8" in sink.getvalue() and "busy" not in sink.getvalue()


def test_a_line_waits_while_stderr_is_turned_away(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bars() as bars:
        bars.add_task("plan", total=8)
        speaker = threading.Thread(target=progress._lines_of(bars))
        with _hushed():
            speaker.start()
            speaker.join(0.2)
            assert speaker.is_alive()
        speaker.join()
        assert "plan 0 of 8" in capfd.readouterr().err
