"""What a run tells of its machine, on ledgers whose times are known."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.calibrate import measure, unit_seconds
from cluster.errors import EdgeFusionError
from cluster.needs import Need, RunView
from cluster.recipe import load_recipe
from cluster.runner import ClusterRecipe
from cluster.simulate_view import scoring_rate
from edgefusion import Recipe, app, make_needs


def test_workers_in_step_are_told_by_their_rounds() -> None:
    # Two workers of 3 s a unit, in step, and one unit of an unfinished round.
    times = [100.0, 100.1, 103.0, 103.1, 106.0, 106.1, 109.0]
    assert unit_seconds(times, 2) == (pytest.approx([3, 3, 3, 3]), False)
    # A restart in the middle is no slow unit.
    assert unit_seconds([0, 1, 2, 3, 60, 61, 62], 1) == ([1, 1, 1, 1, 1], True)
    assert unit_seconds([0, 1, 2, 3], 2) == ([], False)


def draws(workers: int, workers_min: int | None = None, stage: str = "render") -> Callable[[Any], list[Need]]:
    return lambda _: [Need("make", stage, workers, 1, workers_min=workers_min), Need("make", "score", 7, 1)]


def write_run(folder: Path, times: list[float], make_s: float = 50.0, images: int = 4, **cluster: Any) -> None:
    """Units of `images` pictures, ten bytes' worth of pictures file each; the last unit holds one."""
    recipe = {
        "cluster": {"runner": "ray", "train_workers": 2, **cluster},
        "factory": {"make": {"unit_images": images}},
    }
    (folder / "dataset" / "ledger").mkdir(parents=True)
    (folder / "dataset" / "pictures").mkdir()
    for i, when in enumerate(times):
        path = folder / "dataset" / "ledger" / f"unit-{i:05d}.parquet"
        pq.write_table(pa.table({"id": list(range(images if i < len(times) - 1 else 1))}), path)
        os.utime(path, (when, when))
        (folder / "dataset" / "pictures" / path.name).write_bytes(b"x" * 4000)
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "seconds": {"make": make_s}}))
    (folder / "training" / "adapt").mkdir(parents=True)
    (folder / "training" / "adapt" / "metrics.jsonl").write_text('{"images_per_s": 1}\n{"images_per_s": 30}\n{"im')


def test_a_rate_is_free_of_start_up(tmp_path: Path) -> None:
    write_run(tmp_path, [1000.0, 1002.0, 1004.0, 1006.0, 1006.5], make_s=50.0)
    found = measure(tmp_path, draws(1), start_s=20, window_s=5)
    # Make took 50 s; the first whole unit was written 6 s before the last one and took 2 s; the short one is within what is left.
    assert (found.make_per_s, found.units, found.phases) == (2.0, 3, {"adapt": 15.0})
    assert found.load_s == pytest.approx(50 - 6 - 2 - 25)
    assert found.unit_spread == pytest.approx(0, abs=1e-6)
    assert 5 * 4000 / 17 < found.image_bytes < 5 * 8000 / 17


def test_an_interrupted_run_does_not_tell_how_long_opening_takes(tmp_path: Path) -> None:
    write_run(tmp_path, [0.0, 1.0, 2.0, 3.0, 500.0, 501.0, 502.0, 502.5])
    found = measure(tmp_path, draws(1))
    assert found.load_s is None and found.make_per_s == pytest.approx(4.0)


def test_what_is_no_run_or_too_short_is_told(tmp_path: Path) -> None:
    with pytest.raises(EdgeFusionError, match="holds no run"):
        measure(tmp_path, draws(1))
    write_run(tmp_path, [0.0, 1.0, 2.0, 2.5])
    with pytest.raises(EdgeFusionError, match="a rate takes 6"):
        measure(tmp_path, draws(2))


IN_STEP = [100.0, 100.1, 103.0, 103.1, 106.0, 106.1, 109.0]
"""Two workers of 3 s a unit, and a short unit at the end."""


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("recipes/edgefusion.yaml", ["cluster.stages={render: {workers: 2}}"]),
        ("recipes/edgefusion.yaml", ["factory.make.render_workers=2"]),
        ("recipes/edgefusion-wild.yaml", ["factory.make.render_workers=2", "factory.make.score_workers=5"]),
        ("recipes/edgefusion-wild.yaml", ["factory.make.captioner=null", "factory.make.score_workers=2"]),
    ],
)
def test_workers_are_counted_where_the_recipe_placed_them(tmp_path: Path, recipe: str, changes: list[str]) -> None:
    settings = load_recipe(Recipe, Path(recipe), changes)
    write_run(tmp_path, IN_STEP, images=settings.factory.make.unit_images)
    facts = {"recipe": settings.model_dump(mode="json"), "seconds": {"make": 50}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    found = measure(tmp_path, make_needs)
    assert found.make_per_s == pytest.approx(settings.factory.make.unit_images / 3), "of each of the two"


def test_workers_that_nobody_counted_are_told(tmp_path: Path) -> None:
    write_run(tmp_path, IN_STEP)
    with pytest.raises(EdgeFusionError, match="with 1 to 2 workers of stage crop, and nothing says how many"):
        measure(tmp_path, draws(2, 1, "crop"))
    assert measure(tmp_path, draws(2, 2)).phases == {"adapt": 15.0}


def note_units(folder: Path, stage: str, seconds: float, times: int = 3) -> None:
    (folder / "log").mkdir(exist_ok=True)
    event = {"time": "2026-11-27T00:00:00", "event": "unit", "stage": stage, "rows": 4, "seconds": seconds}
    with (folder / "log" / f"{stage}.jsonl").open("a") as file:
        file.write(f"{json.dumps(event)}\n" * times)


def test_stages_beside_are_as_fast_as_the_run_noted(tmp_path: Path) -> None:
    write_run(tmp_path, IN_STEP)
    assert measure(tmp_path, draws(2)).beside == {}
    live = {
        "stages": [{"stage": "score", "samples": 30, "seconds": 15.0}, {"stage": "crop", "samples": 0, "seconds": 0}]
    }
    (tmp_path / "dataset" / "index").mkdir()
    (tmp_path / "dataset" / "index" / "live.json").write_text(json.dumps(live))
    assert measure(tmp_path, draws(2)).beside == {"score": 2.0}
    note_units(tmp_path, "score", 1.0)
    note_units(tmp_path, "score", 3.0)
    note_units(tmp_path, "crop", 0.5)
    note_units(tmp_path, "render", 9.0)
    assert measure(tmp_path, draws(2)).beside == {"score": 2.0, "crop": 8.0}


def test_a_log_of_problems_alone_tells_no_rate(tmp_path: Path) -> None:
    write_run(tmp_path, IN_STEP, log="problems")
    note_units(tmp_path, "score", 1.0)
    assert measure(tmp_path, draws(2)).beside == {}


def test_the_slower_of_scoring_and_cropping_sets_the_pace() -> None:
    view = RunView("x", ClusterRecipe(), {}, needs=(Need("make", "crop", 1, 1), Need("make", "score", 4, 1)))
    captions = replace(view, needs=(*view.needs, Need("make", "caption", 2, 1, 1)))
    assert scoring_rate(view, {}) == math.inf
    assert scoring_rate(captions, {"score": 2.0, "crop": 20.0}) == 2.0
    assert scoring_rate(captions, {"score": 2.0, "crop": 4.0}) == 1.0, "4 a second of one who crops, for four scorers"
    assert scoring_rate(view, {"score": 2.0, "crop": 4.0}) == 2.0
    assert scoring_rate(captions, {"crop": 4.0, "score": 9.0}, 0.5) == 0.5


def test_the_simulation_knows_the_scorers_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("simpy")
    recipe = Path("recipes/edgefusion.yaml")
    settings = load_recipe(Recipe, recipe, ["factory.make.render_workers=2"])
    write_run(tmp_path, IN_STEP, images=settings.factory.make.unit_images)
    facts = {"recipe": settings.model_dump(mode="json"), "seconds": {"make": 50}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    note_units(tmp_path, "score", 400.0)
    words = ["--from-run", str(tmp_path), "--train-per-s", "20", "--repeats", "1", "--samples", "2000"]
    said = CliRunner().invoke(app, ["cluster", "simulate", str(recipe), *words])
    assert said.exit_code == 0, said.output
    assert "score 0.01 a scorer" in " ".join(said.output.split())
    limits = said.output.partition("What limits")[2].partition("Predicted from")[0]
    assert "scoring" in limits, "without the run's scorers it would name none"


def test_training_that_went_on_with_fewer_workers_tells_no_rate(tmp_path: Path) -> None:
    write_run(tmp_path, IN_STEP, train_workers_min=1)
    assert measure(tmp_path, draws(2)).phases == {}
