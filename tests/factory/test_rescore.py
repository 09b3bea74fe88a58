"""A scorer for pictures that are made: its columns stand beside the ledger, which stays as it is, whoever is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from cluster.errors import LedgerConflict, RecipeError
from cluster.runner import InProcess
from factory.added import SCORES, added_sets, forget_units
from factory.cli import app
from factory.curate.catalogue import Catalogue, Filter
from factory.index import load_columns
from factory.make import select_and_pack
from factory.provenance import provenance
from factory.recipe import FactoryRecipe, ImportedScorer, PlainScorer, SelectRecipe
from factory.rescore import add_scores
from factory.scorers import Batch, Score
from factory.select import SELECTION

HERE = "later_scorers_of_a_test"


class Bright:
    """Kills its process when it has looked at so many units."""

    scores = (Score("bright", 0, 255, "higher"),)
    left = 10**9

    def __init__(self, plus: float = 0) -> None:
        self.plus = plus

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        Bright.left -= 1
        if Bright.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"bright": [float(picture.mean()) + self.plus for picture in batch.pictures]}


BRIGHT = ImportedScorer(use=f"{HERE}:Bright")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


@pytest.fixture
def recipe(dataset: Path) -> FactoryRecipe:
    return FactoryRecipe.model_validate(yaml.safe_load((dataset.parent / "recipe.yaml").read_text())["factory"])


def files(folder: Path, *parts: str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for part in parts
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


def killed_after(units: int, recipe: FactoryRecipe, data: Path) -> None:
    """In a process of its own."""
    child = os.fork()
    if not child:
        Bright.left = units
        add_scores(recipe.make, data, BRIGHT, InProcess())
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_killed_and_run_again_the_bytes_are_the_same_and_select_knows_the_score(
    dataset: Path, recipe: FactoryRecipe, tmp_path: Path
) -> None:
    other = tmp_path / "undisturbed"
    shutil.copytree(dataset, other)
    made = files(dataset, "ledger", "pictures")
    one, units = add_scores(recipe.make, other, BRIGHT, InProcess())
    assert units == 3 and one.columns == ("bright",)

    for done in (0, 1, 1):
        killed_after(done, recipe, dataset)
        assert "bright" not in load_columns(dataset, 8).scores, "half a column would reject the other half"
    assert len(list((dataset / SCORES / "bright").glob("unit-*.parquet"))) == 2
    assert add_scores(recipe.make, dataset, BRIGHT, InProcess())[1] == 1
    assert files(dataset, SCORES) == files(other, SCORES) and len(files(other, SCORES)) == 4
    assert add_scores(recipe.make, dataset, BRIGHT, InProcess())[1] == 0
    assert files(dataset, "ledger", "pictures") == made

    columns = load_columns(dataset, 8)
    values = columns.scores["bright"]
    assert np.isnan(values[5]) and 100 < np.nanmin(values) < np.nanmax(values) < 160
    half = float(np.nanmedian(values))
    rules = SelectRecipe.model_validate({"min_clip": -1, "max_hamming_bits": 0, "scores": {"bright": {"least": half}}})
    funnel = select_and_pack(recipe, dataset, rules, tmp_path / "view")
    assert funnel["kept"] == 12 and funnel["dead"] == 1 and funnel["rejected"] == 11


@pytest.mark.parametrize("order", ["no selection", "the ledger's", "another"])
def test_the_page_filters_and_sorts_by_it(dataset: Path, recipe: FactoryRecipe, order: str) -> None:
    """Once it covers every unit, each score at its own picture, however the selection is sorted."""
    if order != "no selection":
        select_and_pack(recipe, dataset)
    if order == "another":
        path = dataset / SELECTION
        pq.write_table(pq.read_table(path).sort_by([("id", "descending")]), path)
    before = Catalogue(dataset)
    add_scores(recipe.make, dataset, BRIGHT, InProcess())
    page, wanted = Catalogue(dataset), Filter(sort="bright", descending=True, outcome="")
    assert page.scores == [*before.scores, "bright"] and page.total == before.total
    columns = load_columns(dataset, 8)
    told = dict(zip((key.decode() for key in columns.ids.tolist()), columns.scores["bright"].tolist(), strict=True))
    rows = page.page(page.view(wanted), 0, 99)
    assert [row["scores"]["bright"] for row in rows] == sorted((told[row["id"]] for row in rows), reverse=True)
    assert all(row["scores"]["bright"] == told[row["id"]] for row in rows) and len(rows) == 23
    half = float(np.nanmedian(columns.scores["bright"]))
    found = page.page(page.view(Filter(scores={"bright": (half, None)})), 0, 99)
    assert {row["id"] for row in found} == {key for key, score in told.items() if score >= half}
    forget_units(dataset, ["unit-00001"])
    assert Catalogue(dataset).scores == before.scores


def test_units_that_are_made_anew_are_scored_anew(dataset: Path, recipe: FactoryRecipe) -> None:
    one, _ = add_scores(recipe.make, dataset, BRIGHT, InProcess())
    assert "bright" in load_columns(dataset, 8).scores
    assert "scores bright, added" in [one.part for one in provenance(recipe, dataset)]
    forget_units(dataset, ["unit-00001"])
    assert "bright" not in load_columns(dataset, 8).scores
    assert "scores bright, added" not in [one.part for one in provenance(recipe, dataset)], "nor in the card"
    assert add_scores(recipe.make, dataset, BRIGHT, InProcess())[1] == 1
    shutil.copy(one.file("unit-00001"), one.file("unit-00002"))
    with pytest.raises(LedgerConflict, match=r"unit-00002.*other pictures.*factory score"):
        load_columns(dataset, 8)
    assert add_scores(recipe.make, dataset, BRIGHT, InProcess())[1] == 1
    assert "bright" in load_columns(dataset, 8).scores


def test_two_scorers_do_not_share_a_column(dataset: Path, recipe: FactoryRecipe) -> None:
    add_scores(recipe.make, dataset, BRIGHT, InProcess())
    with pytest.raises(LedgerConflict, match=r"bright/scorer\.json: another scorer.*prefix"):
        add_scores(recipe.make, dataset, BRIGHT.model_copy(update={"options": {"plus": 1}}), InProcess())
    known = recipe.make.model_copy(update={"scores": [PlainScorer(kind="sharpness")]})
    with pytest.raises(RecipeError, match=r"has a score sharpness already.*prefix"):
        add_scores(known, dataset, PlainScorer(kind="sharpness"), InProcess())
    more = BRIGHT.model_copy(update={"options": {"plus": 1}, "prefix": "more_"})
    add_scores(recipe.make, dataset, more, InProcess())
    scores = load_columns(dataset, 8).scores
    assert np.nanmax(np.abs(scores["more_bright"] - scores["bright"] - 1)) < 1e-5
    assert [one.name for one in added_sets(dataset)] == ["bright", "more_bright"]


def test_by_the_command_line(dataset: Path) -> None:
    path = dataset.parent / "recipe.yaml"
    path.write_text(path.read_text() + "cluster: {runner: in-process}\n")
    words = ["score", str(dataset), "--recipe", str(path), "--scorer"]
    said = CliRunner().invoke(app, [*words, "sharpness"])
    assert said.exit_code == 0 and "sharpness of 3 units scored now" in said.output, said.output
    said = CliRunner().invoke(app, [*words, "{kind: sharpnes}"])
    assert isinstance(said.exception, RecipeError) and "--scorer" in str(said.exception)
    rule = [
        "--recipe",
        str(path),
        "--name",
        "sharp",
        "--rule",
        "scores.sharpness.best_share=0.5",
        "--rule",
        "min_clip=-1",
    ]
    said = CliRunner().invoke(app, ["select", str(dataset), *rule])
    assert said.exit_code == 0 and "kept 12" in said.output, said.output
    assert "scores sharpness, added" in (dataset / "views" / "sharp" / "README.md").read_text()
