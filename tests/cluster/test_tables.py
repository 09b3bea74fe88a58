"""Nothing of a table is cut, into a pipe or in a narrow terminal."""

import io
import re
import sys

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.tables import print_tables

WORDS = [f"runs/a-long-name-{i}/student" for i in range(6)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def table() -> Group:
    made = Table(*(f"heading{i}" for i in range(6)))
    made.add_row(*WORDS)
    return Group(made, Text("the end"))


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(table())
    said = capsys.readouterr().out
    assert any(all(word in line for word in WORDS) for line in said.splitlines()) and said.endswith("the end\n")


def test_a_narrow_terminal_gets_folded_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "dumb")  # of 80 columns
    print_tables(table())
    lines = sys.stdout.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    rows = [re.split("│", line)[1:-1] for line in lines if line.startswith("│")]
    assert ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)] == WORDS
