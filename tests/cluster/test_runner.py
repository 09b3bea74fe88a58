"""The same stages on both runners give the same units, whatever happens to a worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import StageError
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, InProcess, OnRay, Runner, start_ray, window_units
from cluster.stage import PENDING, Row, Stage, Unit


def units(count: int) -> list[Unit]:
    rows = [
        [{"id": f"{u}-{i}", "value": u * 10 + i, "outcome": PENDING, "reason": ""} for i in range(4)]
        for u in range(count)
    ]
    return [Unit(f"unit-{u}", part) for u, part in enumerate(rows)]


def square_stage() -> Stage:
    def square(rows: list[Row]) -> list[Row]:
        if any(row["value"] == 12 for row in rows):
            raise ValueError("I do not like 12")
        return [{**row, "square": row["value"] ** 2} for row in rows]

    return Stage("square", lambda: square, workers=2, cpus=0.5)


def dying_stage(marker: Path) -> Stage:
    def die_once(rows: list[Row]) -> list[Row]:
        if rows[0]["id"].startswith("2-") and not marker.exists():
            marker.touch()
            os._exit(1)
        return [{**row, "pid": 0} for row in rows]

    return Stage("die", lambda: die_once, cpus=0.5)


def full_stage() -> Stage:
    def full(_rows: list[Row]) -> list[Row]:
        raise OSError(28, "No space left on device")

    return Stage("full", lambda: full, cpus=0.5)


def answers(runner: Runner, stages: list[Stage]) -> dict[str, list[Row]]:
    return {unit.id: unit.rows for unit in runner.run(stages, units(5))}


@pytest.mark.long
@pytest.mark.ray
def test_ray_answers_as_this_process_does_even_when_a_worker_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cluster.runner.window_units", lambda workers: 2
    )  # five units: two full windows and a short one
    recipe = build_recipe(ClusterRecipe, {"cpus": 2}, "test")
    ray = OnRay(recipe)
    try:
        start_ray(recipe)
        monkeypatch.chdir(tmp_path)  # Ray began elsewhere; relative paths are the driver's
        (tmp_path / "died").touch()
        wanted = answers(InProcess(), [square_stage(), dying_stage(tmp_path / "died")])
        (tmp_path / "died").unlink()
        assert answers(ray, [square_stage(), dying_stage(Path("died"))]) == wanted
        assert (tmp_path / "died").exists(), "no worker died, so nothing was shown"
        dead = [row for rows in wanted.values() for row in rows if row["outcome"] == "dead"]
        assert [row["id"] for row in dead] == ["1-2"] and "I do not like 12" in dead[0]["reason"]
        with pytest.raises(StageError, match="No space left"):
            answers(ray, [full_stage()])
    finally:
        ray.close()


def test_a_window_grows_with_the_widest_stage() -> None:
    assert (window_units(1), window_units(32), window_units(1024)) == (2048, 2048, 65536)
