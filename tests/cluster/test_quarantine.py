"""A row that kills its worker is found and buried alone; everything else is as if it had never been there."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import StageError
from cluster.quarantine import Attempts, apply_noted
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, InProcess, OnRay
from cluster.stage import DEAD, PENDING, Row, Stage, Unit

REASON = "deadly: killed its worker 2 times"


def units(count: int = 4, rows: int = 16) -> list[Unit]:
    return [
        Unit(f"unit-{u}", [{"id": f"{u}-{i}", "value": i, "outcome": PENDING, "reason": ""} for i in range(rows)])
        for u in range(count)
    ]


def stages(deadly: tuple[str, ...], graveyard: Path) -> list[Stage]:
    """A stage that dies of the rows `deadly` and leaves a file for each death, and one after it."""

    def kill(rows: list[Row]) -> list[Row]:
        for row in rows:
            if row["id"] in deadly:
                (graveyard / f"{row['id']}.{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [{**row, "square": row["value"] ** 2} for row in rows]

    def after(rows: list[Row]) -> list[Row]:
        return [{**row, "sum": row["square"] + 1} for row in rows]

    return [Stage("deadly", lambda: kill, workers=2, cpus=0.5), Stage("after", lambda: after, cpus=0.5)]


def wanted(deadly: tuple[str, ...]) -> dict[str, list[Row]]:
    """What no deaths at all would give, but for the deadly rows."""
    found = {unit.id: unit.rows for unit in InProcess().run(stages((), Path()), units())}
    grave = {"outcome": DEAD, "reason": REASON, "square": None, "sum": None}
    return {key: [{**row, **grave} if row["id"] in deadly else row for row in rows] for key, rows in found.items()}


@pytest.mark.ray
@pytest.mark.long
def test_on_ray_only_the_deadly_rows_are_lost(tmp_path: Path) -> None:
    deadly = ("1-3", "3-0", "3-9")
    ray = OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "test"))
    try:
        found = {unit.id: unit.rows for unit in ray.run(stages(deadly, tmp_path), units(), notes=tmp_path / "notes")}
    finally:
        ray.close()
    assert found == wanted(deadly)
    # 16 rows, then pieces of 2, then each twice alone.
    assert 4 <= len(list(tmp_path.glob("1-3.*"))) <= 6
    assert not (tmp_path / "notes").exists()


@pytest.mark.ray
@pytest.mark.long
def test_on_ray_a_stage_that_kills_its_workers_at_once_ends_the_run(tmp_path: Path) -> None:
    def suicide() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def too_large(rows: list[Row]) -> list[Row]:
        suicide()
        return rows

    for stage, words in (
        (Stage("open", suicide, cpus=0.5), "while it was opened"),  # pyright: ignore[reportArgumentType]
        (Stage("whole", lambda: too_large, cpus=0.5, whole=True), "which it must take whole"),
    ):
        ray = OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "test"))
        try:
            with pytest.raises(StageError, match=words):
                list(ray.run([stage], units(1), notes=tmp_path / "notes"))
        finally:
            ray.close()


ONE_RUN = """
import pickle, sys
from pathlib import Path
import tests_quarantine as t
from cluster.runner import InProcess
graves = Path(sys.argv[1])
found = {u.id: u.rows for u in InProcess(2).run(t.stages(("1-3",), graves), t.units(), notes=graves / "notes")}
(graves / "found.pickle").write_bytes(pickle.dumps(found))
"""


def test_in_this_process_a_few_reruns_bury_the_deadly_row(tmp_path: Path) -> None:
    (tmp_path / "tests_quarantine.py").write_text(Path(__file__).read_text())
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent.parent)])
    codes: list[int] = []
    while len(codes) < 8 and 0 not in codes:
        words = [sys.executable, "-c", ONE_RUN, str(tmp_path)]
        said = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
        codes.append(said.returncode)
        assert len(codes) == 1 or "a worker died in stage deadly" in said.stderr
    assert codes == [-signal.SIGKILL] * 4 + [0]
    assert pickle.loads((tmp_path / "found.pickle").read_bytes()) == wanted(("1-3",))


def test_what_another_run_left_proves_nothing_on_a_cluster(tmp_path: Path) -> None:
    """The head was switched off six times with the same row in work: no reason to bury it."""

    def dies(_rows: list[Row]) -> list[Row]:
        raise SystemExit

    stage, (unit,) = Stage("s", lambda: dies), units(1)
    for night in range(6):
        with pytest.raises(SystemExit):
            apply_noted(stage, dies, unit, Attempts(tmp_path, 2, run=f"night {night}"))
    done = apply_noted(stage, lambda rows: rows, unit, Attempts(tmp_path, 2, run="morning"))
    assert {row["outcome"] for row in done.rows} == {PENDING}
    for _ in range(2):
        with pytest.raises(SystemExit):
            apply_noted(stage, dies, unit, Attempts(tmp_path, 2, run="one night"))
    done = apply_noted(stage, lambda rows: rows, unit, Attempts(tmp_path, 2, run="one night"))
    assert sum(row["outcome"] == DEAD for row in done.rows) == 1


def test_an_exception_in_this_process_leaves_no_note(tmp_path: Path) -> None:
    def full(_rows: list[Row]) -> list[Row]:
        raise OSError(28, "No space left on device")

    with pytest.raises(StageError):
        list(InProcess().run([Stage("full", lambda: full)], units(1), notes=tmp_path / "notes"))
    assert not list((tmp_path / "notes").glob("*"))


def test_a_command_that_is_killed_while_it_commits_goes_on_however_often(tmp_path: Path) -> None:
    (unit,), commit = units(1), Stage("commit", lambda: lambda rows: rows, whole=True)
    for _ in range(4):  # as SIGKILL leaves it, each time of another run
        note = Attempts(tmp_path, 2, uuid.uuid4().hex, trust_other_runs=True).begin(commit, unit)
        ids = [row["id"] for row in unit.rows]
        Attempts(tmp_path, 2, note.run).save(commit, unit, replace(note, at_risk=ids))
    assert [one.rows for one in InProcess().run([commit], [unit], notes=tmp_path)] == [unit.rows]
