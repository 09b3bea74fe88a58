"""Which prompts calibrate a run's builds and which judge them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chain import Chain
from export.prompts import calibrating_first

GRID = ["a fox", "a key", "a hat"]


def test_what_calibrates_does_not_judge() -> None:
    """With a grid the same prompts did both."""
    asked: list[int] = []
    data = ["a key", "a cup", "", "a cup", "a fox", "a dog"]
    found = calibrating_first(GRID, lambda count: asked.append(count) or data, 3, 3)
    assert found == ["a cup", "a dog", "a cup", "a fox", "a key", "a hat"] and asked == [48]
    # Those that judge, and so their seeds, are those of before: prompts over and over, from the place after those that calibrated.
    assert calibrating_first(GRID, lambda _: data, 4, 3)[4:] == ["a key", "a hat", "a fox"]
    # Without a grid both are of the data.
    assert calibrating_first(["a", "b", "c", "d"], lambda _: ["a", "b", "c", "d"], 2, 2) == ["a", "b", "c", "d"]


def test_where_there_is_nothing_else_the_grid_calibrates_too() -> None:
    assert calibrating_first(["a", "b", "c"], lambda _: [], 2, 1) == ["a", "b", "c"]
    assert calibrating_first(["a"], lambda _: ["a"], 2, 1) == ["a", "a", "a"]


def test_a_run_hands_the_exporter_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("export.bundle.export_student", lambda student, prompts, *_: given.update(prompts=prompts))
    monkeypatch.setattr("factory.pack.first_prompts", lambda folder, count: ["a dog", "a fox", "a cup"][:count])
    data = tmp_path / "dataset"
    data.mkdir()
    (data / "manifest.parquet").write_bytes(json.dumps({}).encode())
    trainer = SimpleNamespace(
        grid_prompts=GRID, phases_run=lambda: ["adapt"], data_of=lambda _: [SimpleNamespace(own_view=None)]
    )
    export = SimpleNamespace(calibration_prompts=2, parity_prompts=3)
    run: Any = object.__new__(Chain)
    run.recipe, run.data, run.out = SimpleNamespace(trainer=trainer, export=export), data, tmp_path
    run.student = tmp_path / "student"
    bars: Any = SimpleNamespace(add_task=lambda *_, **__: 0, update=lambda *_, **__: None)
    run._export(bars)
    assert given["prompts"] == ["a dog", "a cup", "a hat", "a fox", "a key"]
    (data / "manifest.parquet").unlink()  # a trained run needs its data no more
    run._export(bars)
    assert set(given["prompts"]) == {*GRID}
