"""What the documents say of commands is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from edgefusion import app

ROOT = Path(__file__).parent.parent
FRONT_DOOR = typer.main.get_command(app)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [
    (page.name, line)
    for page in PAGES
    for line in re.findall(r"^    (edgefusion .*)$", page.read_text().replace("\\\n", " "), re.MULTILINE)
    if " ..." not in line.partition("#")[0] and "|" not in line.partition("#")[0]
]
NAMED = sorted(
    {(page.name, name) for page in PAGES for name in re.findall(r"`edgefusion ([a-z][^`]*)`", page.read_text())}
)


def test_the_readme_shows_commands_of_all_wings() -> None:
    shown = {line.split()[1] for page, line in WRITTEN if page == "README.md"}
    assert {"run", "factory", "trainer", "export", "cluster", "recipe", "generate", "doctor"} <= shown


@pytest.mark.parametrize(("page", "line"), WRITTEN)
def test_a_command_as_it_is_written_is_one(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words are read as the front door would, in a folder that has what they name; nothing is done."""
    command, words = FRONT_DOOR, shlex.split(line, comments=True)[1:]
    monkeypatch.chdir(tmp_path)
    for path in (Path(word) for word in words if re.fullmatch(r"[a-z][\w.-]*(/[\w.-]+)*", word)):
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"no command: {line}"
    command.make_context(line, words)


@pytest.mark.parametrize(("page", "name"), NAMED)
def test_a_command_that_is_named_in_a_sentence_is_there(page: str, name: str) -> None:
    command, words = FRONT_DOOR, name.split()
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"{page} names edgefusion {name}"
        command = command.commands[words.pop(0)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_table_of_tests_is_the_makefiles_and_says_what_ci_runs() -> None:
    targets = set(re.findall(r"^(test[a-z-]*|check):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    ci = set(re.findall(r"^(?:make|if_time) ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    rows = re.findall(
        r"^\| `make ([a-z-]+)` \|.*\| (yes|no)\b[^|]*\|$", (ROOT / "docs" / "testing.md").read_text(), re.MULTILINE
    )
    assert {name for name, _ in rows} == targets
    assert {name for name, told in rows if told == "yes"} == ci
