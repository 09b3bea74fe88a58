"""The ablations on tiny untrained models: every row ends in figures, a kill costs nothing, words follow from intervals."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import trainer.reproduce.runs as runs_module
from cluster.errors import LedgerConflict, RecipeError, TargetUnavailable
from trainer.reproduce.ablations import BASE, ablate, rows_of, word_for
from trainer.reproduce.cli import app
from trainer.reproduce.recipe import AblationsRecipe
from trainer.reproduce.tables import chosen

pytestmark = pytest.mark.long
WITH_PEFT = importlib.util.find_spec("peft") is not None


def recipe_of(protocol: Path, **changes: object) -> AblationsRecipe:
    small = {"adapt_data": "synt", "distill_data": "synt", "phases": 2, "count": 4, "batch_images": 2}
    return AblationsRecipe.model_validate(yaml.safe_load(protocol.read_text()) | small | changes)


FEW = (BASE, "no-phase-1-same-compute", "phased-adversarial")


@pytest.fixture(scope="module")
def whole(protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few rows."""
    recipe, out = recipe_of(protocol), tmp_path_factory.mktemp("ablations") / "out"
    ablate(recipe, out, chosen(rows_of(recipe), FEW))
    return out


def test_rows_end_in_figures_and_words(protocol: Path, whole: Path) -> None:
    assert_whole(protocol, whole, list(FEW))


@pytest.mark.slow
def test_every_row_ends_in_figures_and_words(protocol: Path, tmp_path: Path) -> None:
    """A minute; without peft the row with adapters is left out."""
    recipe = recipe_of(protocol)
    rows = [row for row in rows_of(recipe) if WITH_PEFT or "lora" not in row.changes]
    ablate(recipe, tmp_path / "out", rows)
    assert_whole(protocol, tmp_path / "out", [row.name for row in rows])


def assert_whole(protocol: Path, whole: Path, names: list[str]) -> None:
    report = json.loads((whole / "ablations.json").read_text())
    assert {(row["row"], row["steps"]) for row in report["rows"]} == {(name, n) for name in names for n in (4, 2, 1)}
    assert {found["row"] for found in report["found"]} == set(names) - {BASE}
    assert len(report["found"]) == (len(names) - 1) * 3 * 4
    page = (whole / "ablations.md").read_text()
    assert all(f"| {name} | 4 | 1 |" in page for name in names)
    assert f"{len(names)} of {len(rows_of(recipe_of(protocol)))} trainings are in" in page
    assert not list((whole / "scratch").iterdir())


def test_rows_are_what_they_are_called(protocol: Path, whole: Path) -> None:
    assert [path.name for path in (whole / "adapt").iterdir()] == ["synt-seed0"], "rows share phase 1"
    logs = {
        path.parent.parent.name.removesuffix("-seed0"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in (whole / "distill").glob("*/distill/metrics.jsonl")
    }
    first = {name: log[0]["loss"] for name, log in logs.items()}
    assert len(set(first.values())) == len(first), "each trains on another loss"
    assert len(logs["no-phase-1-same-compute"]) == 4 and len(logs[BASE]) == 2
    assert {name for name, log in logs.items() if "discriminator" in log[0]} == {"phased-adversarial"}


def test_it_goes_on_where_it_was_interrupted(protocol: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    recipe, train, calls = recipe_of(protocol), runs_module.train, []

    def die(*given: object) -> None:
        calls.append(given)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        train(*given)

    monkeypatch.setattr(runs_module, "train", die)
    out, some = tmp_path / "out", chosen(rows_of(recipe), [BASE])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ablate(recipe, out, some)
    ablate(recipe, out, some)
    assert len(calls) == 4
    result = Path("results") / f"{BASE}-seed0.json"
    ours, theirs = (json.loads((folder / result).read_text())["figures"] for folder in (out, whole))
    assert ours == theirs
    with pytest.raises(LedgerConflict, match="another protocol"):
        ablate(recipe_of(protocol, phases=4), out, some)


def test_bad_wishes_are_refused_before_anything_runs(protocol: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = recipe_of(protocol)
    with pytest.raises(RecipeError, match="no row is called 'phase'"):
        chosen(rows_of(recipe), ["phase"])
    with pytest.raises(ValueError, match="does not divide"):
        recipe_of(protocol, phases=3)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TargetUnavailable, match="peft"):
        ablate(recipe, tmp_path / "out", rows_of(recipe))
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_found(protocol: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(recipe_of(protocol).model_dump(mode="json")))
    words = ["ablations", "--recipe", str(tmp_path / "protocol.yaml"), "--out", str(whole), "--rows", "phased-*"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "figures better" in said.output and "ablations.md" in said.output


def test_words_follow_from_intervals_and_the_metrics_direction() -> None:
    low, high, between = ({"value": v, "low": v - 1, "high": v + 1} for v in (0.0, 5.0, 1.5))
    assert word_for(high, low, True) == "better" and word_for(high, low, False) == "worse"
    assert word_for(low, high, True) == "worse" and word_for(low, high, False) == "better"
    assert word_for(between, low, True) == "not settled"
