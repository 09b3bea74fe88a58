"""The tables in miniature on tiny untrained models: every row ends in figures, a kill costs nothing, words follow from intervals."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import trainer.reproduce.data as data_module
import trainer.reproduce.runs as runs_module
from cluster.errors import LedgerConflict, RecipeError
from factory.pack import read_manifest
from factory.verify import verify
from trainer.reproduce.data import ensure_data
from trainer.reproduce.paper import COMPARISONS, EDGEFUSION, ROWS, row_named
from trainer.reproduce.recipe import TablesRecipe
from trainer.reproduce.tables import chosen_rows, claim, reproduce
from trainer.reproduce.verdicts import (
    A_DIFFERENCE,
    AGREES,
    CONTRADICTS,
    NO_DIFFERENCE,
    OTHER_WAY,
    SAME_WAY,
    judge,
    pooled,
    rank_agreement,
)

FRONT_DOOR = Path(__file__).parent.parent.parent / "edgefusion.py"
FEW = ("2/synt-cur", "3/none/L-pps+synt", EDGEFUSION)


def recipe_of(protocol: Path, **changes: Any) -> TablesRecipe:
    return TablesRecipe.model_validate(yaml.safe_load(protocol.read_text()) | changes)


@pytest.fixture(scope="module")
def whole(protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few rows."""
    out = tmp_path_factory.mktemp("whole") / "out"
    reproduce(recipe_of(protocol), out, [row_named(name) for name in FEW])
    return out


def figures(out: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text())["figures"] for path in sorted((out / "results").glob("*.json"))}


def test_rows_end_in_figures_pictures_and_a_page(whole: Path) -> None:
    report = json.loads((whole / "tables.json").read_text())
    cells = {(row["row"], row["steps"]) for row in report["rows"]}
    assert cells == {(FEW[0], 25), *((name, steps) for name in FEW[1:] for steps in (4, 2, 1))}
    for row in report["rows"]:
        assert row["clip_score"]["low"] <= row["clip_score"]["value"] <= row["clip_score"]["high"]
        assert row["clip_score"]["seeds"] == 1
    assert {v["comparison"]["about"] for v in report["verdicts"]} == {
        "phase 1 before phase 2",
        "EdgeFusion with 4 steps against 2",
    }
    page = (whole / "reproduction.md").read_text()
    assert "3 of 16 trainings are in" in page and "stand-in for the paper's people" in page
    assert "Rows with one seed only" in page and page.count("not run") == 6 + 3 * 7
    assert (whole / "results" / "3_synt-cur_L-pps+synt-seed0.png").exists()
    assert not list((whole / "scratch").iterdir()), "pipelines and pictures of finished rows are gone"


def test_a_finished_run_trains_nothing_again_and_rows_share_phase_one(whole: Path, protocol: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns for name in ("adapt", "distill", "data", "results") for p in (whole / name).rglob("*")
    }
    reproduce(recipe_of(protocol), whole, [row_named(name) for name in FEW])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [p.name for p in (whole / "adapt").iterdir()] == ["synt-cur-seed0"]
    assert len(list((whole / "distill").iterdir())) == 2
    mix = json.loads((whole / "distill" / "3_none_L-pps+synt-seed0" / "data.json").read_text())
    assert [Path(part["data"]).name for part in mix] == ["L-pps", "synt"]
    assert mix[0]["samples"] > mix[1]["samples"] and mix[0]["share"] > mix[1]["share"]


@pytest.mark.long
def test_killed_while_it_trains_it_ends_in_the_same_figures(whole: Path, protocol: Path, tmp_path: Path) -> None:
    """A real kill -9 of the command; what is left then is finished here."""
    out = begun(whole, tmp_path / "out")
    words = [sys.executable, str(FRONT_DOOR), "reproduce", "tables", "--recipe", str(protocol), "--out", str(out)]
    process = subprocess.Popen([*words, "--rows", FEW[0]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "adapt" / "synt-cur-seed0" / "data.json").exists() and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "results" / "2_synt-cur-seed0.json").exists()
    reproduce(recipe_of(protocol), out, [row_named(name) for name in FEW])
    assert figures(out) == figures(whole)


def test_interrupted_before_and_after_every_stage_it_goes_on(
    whole: Path, protocol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begun(whole, tmp_path / "out")
    died: list[str] = []

    def fragile(place: str) -> Any:
        stage, calls = getattr(runs_module, place), []

        def die(*given: Any, **named: Any) -> Any:
            calls.append(place)
            found = stage(*given, **named) if len(calls) > 1 else None
            if len(calls) <= 2:
                died.append(place)
                raise KeyboardInterrupt
            return found

        return die

    for place in ("train", "_assemble", "_evaluate", "_save_sheet"):
        monkeypatch.setattr(runs_module, place, fragile(place))
    for _ in range(8):
        with pytest.raises(KeyboardInterrupt):
            reproduce(recipe_of(protocol), out, [row_named(FEW[0])])
    reproduce(recipe_of(protocol), out, [row_named(FEW[0])])
    assert len(died) == 8 and figures(out)["2_synt-cur-seed0.json"] == figures(whole)["2_synt-cur-seed0.json"]


def begun(whole: Path, out: Path) -> Path:
    """A folder that holds the data and the teacher's figures, but no row."""
    out.mkdir()
    shutil.copy(whole / "protocol.json", out)
    shutil.copytree(whole / "data", out / "data")
    (out / "results").mkdir()
    for name in ("teacher.json", "teacher.png"):
        shutil.copy(whole / "results" / name, out / "results")
    return out


def test_the_data_sets_are_what_they_are_called(protocol: Path, whole: Path) -> None:
    recipe = recipe_of(protocol)
    for name in ("L-orig", "L-pp"):
        ensure_data(recipe, name, whole, lambda what: None)
    rows = {name: read_manifest(whole / "data" / name) for name in ("L-orig", "L-pp", "L-pps", "synt", "synt-cur")}
    assert all(verify(whole / "data" / name) == len(rows[name]) for name in rows)
    assert {row["id"] for row in rows["L-pp"]} <= {row["id"] for row in rows["L-orig"]}, "cleaning only takes away"
    assert len(rows["L-pp"]) < len(rows["L-orig"])
    texts = {row["id"]: row["prompt"] for row in rows["L-pps"]}
    both = [row for row in rows["L-pp"] if row["id"] in texts]
    # Of two duplicates the one with the better CLIP score stays, and scores depend on the words.
    assert len(both) > 0.8 * len(rows["L-pp"]), "nearly the same pictures"
    assert all(texts[row["id"]] != row["prompt"] for row in both), "other words"
    assert len(rows["synt-cur"]) == round(0.48 * len(rows["synt"]))


def test_the_stand_in_keeps_the_filter_clips_best(protocol: Path, whole: Path) -> None:
    from factory.pack import read_shard

    def scores(name: str) -> list[float]:
        shards = sorted((whole / "data" / name).glob("shard-*.tar"))
        return [json.loads(members["json"])["clip_score"] for shard in shards for _, members in read_shard(shard)]

    best = sorted(scores("synt"), reverse=True)
    assert sorted(scores("synt-cur"), reverse=True) == best[: len(scores("synt-cur"))]
    assert "judge" not in Path(data_module.__file__).read_text().replace("The judge has no say", "")


def test_another_protocol_is_refused_and_more_seeds_are_not(whole: Path, protocol: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerConflict, match="another protocol"):
        reproduce(recipe_of(protocol, adapt_steps=3), whole, [])
    reproduce(recipe_of(protocol, seeds=2, threads=2), whole, [])
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(LedgerConflict, match="not empty"):
        reproduce(recipe_of(protocol), tmp_path, [])
    with pytest.raises(RecipeError, match="no row is called '2/sint'"):
        chosen_rows(["2/sint"])
    assert [row.name for row in chosen_rows(["3/synt*"])] == ["3/synt/synt", "3/synt-cur/synt-cur", EDGEFUSION]


def test_keys_of_the_data_recipes_that_decide_no_picture_may_change(protocol: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((protocol.parent / "pocket.yaml").read_text())

    def with_changes(**make: Any) -> TablesRecipe:
        path = tmp_path / "pocket.yaml"
        path.write_text(yaml.safe_dump(tree | {"factory": tree["factory"] | {"make": tree["factory"]["make"] | make}}))
        return recipe_of(protocol, synt_recipe=str(path))

    plain = recipe_of(protocol)
    claim(plain, tmp_path / "out")
    workers = {"render_workers": 7, "score_workers": 3, "render_gpus": 1, "score_gpus": 0.5, "crop_gpus": 0.5}
    claim(with_changes(**workers), tmp_path / "out")
    # Their sums round otherwise.
    with pytest.raises(LedgerConflict, match="another protocol"):
        claim(with_changes(threads=5), tmp_path / "out")
    before = tmp_path / "before"
    before.mkdir()
    (before / "protocol.json").write_text(json.dumps({"digest": plain.digest(idle=())}))
    claim(plain, before)


def test_every_comparison_names_cells_that_the_paper_has() -> None:
    for comparison in COMPARISONS:
        for row, steps in (comparison.one, comparison.other):
            assert set(row_named(row).paper[steps]) == {"CLIP", "FID"}
    assert len({row.name for row in ROWS}) == 16


def test_words_follow_from_intervals() -> None:
    low, high, between = ({"value": v, "low": v - 1, "high": v + 1} for v in (0.0, 5.0, 1.5))
    assert judge(+0.01, 0.001, high, low) == AGREES
    assert judge(-0.01, 0.001, high, low) == CONTRADICTS
    assert judge(+0.01, 0.001, between, low) == SAME_WAY
    assert judge(-0.01, 0.001, between, low) == OTHER_WAY
    assert judge(0.001, 0.001, high, low) == A_DIFFERENCE
    assert judge(0.0, 0.001, between, low) == NO_DIFFERENCE


def test_seeds_widen_an_interval_by_what_they_differ() -> None:
    one = {"value": 1.0, "low": 0.9, "high": 1.2}
    alone = pooled([one])
    assert (alone["low"], alone["high"]) == pytest.approx((0.9, 1.2))
    same = pooled([one, one, one])
    assert (same["low"], same["high"]) == pytest.approx((0.9, 1.2)), "seeds answer the same captions"
    apart = pooled([{"value": v, "low": v, "high": v} for v in (1.0, 2.0, 3.0)])
    assert apart["value"] == 2.0 and apart["high"] - 2.0 == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_rank_agreement_knows_order_and_reverse() -> None:
    rows = [row for row in ROWS if row.table == 3]
    same = {(row.name, 4): {"clip_score": {"value": row.paper[4]["CLIP"] * 3}} for row in rows}
    other = {cell: {"clip_score": {"value": -f["clip_score"]["value"]}} for cell, f in same.items()}
    assert rank_agreement(same, 3, "clip_score") == (pytest.approx(1.0), 9)
    assert rank_agreement(other, 3, "clip_score") == (pytest.approx(-1.0), 9)
    assert rank_agreement(dict(list(same.items())[:3]), 3, "clip_score") is None


def test_what_a_data_set_is_taken_from_is_made_under_its_own_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a row of synt-cur and one of synt, in two processes, would make synt at once."""
    made: list[str] = []

    def ensure(recipe: TablesRecipe, name: str, out: Path, say: Any) -> Path:
        with (out / "locks" / f"data-{name}.lock").open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.append(name)
        return out

    monkeypatch.setattr(runs_module, "ensure_data", ensure)
    monkeypatch.setattr(runs_module, "train", lambda recipe, sources, folder, seed: None)
    runs_module.ensure_student(TablesRecipe(), row_named("2/synt-cur"), 0, tmp_path, lambda what: None)
    assert made == ["synt", "synt-cur"]
