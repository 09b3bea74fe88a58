"""Training on one selection of several: by the recipe's own views, and by those that were packed after the pictures were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from chain import Chain, Recipe
from cluster.errors import EdgeFusionError, LedgerConflict, RecipeError
from cluster.recipe import load_recipe
from factory.card import write_card
from factory.cli import app
from factory.decisions import Overlay
from factory.pack import first_prompts, read_manifest

POCKET = Path(__file__).parent.parent / "recipes" / "pocket.yaml"


@pytest.fixture(scope="module")
def made(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe with the view `few`, output folder in which the data set is packed and nothing is trained)."""
    folder = tmp_path_factory.mktemp("made")
    tree = yaml.safe_load(POCKET.read_text())
    plan, make, trainer = tree["factory"]["plan"], tree["factory"]["make"], tree["trainer"]
    tree["cluster"]["runner"] = "in-process"
    plan |= {"taxonomy": str(tiny_models / "taxonomy.yaml"), "prompts": 24}
    plan["writer"]["model"] = str(tiny_models / "writer")
    make["teacher"] |= {"model": str(tiny_models / "teacher"), "size_px": 32, "steps": 2, "batch_images": 4}
    make |= {"scorer": {"kind": "open_clip", "model": str(tiny_models / "clip")}, "unit_images": 8, "threads": 1}
    tree["factory"]["select"] = {"min_clip": -1.0, "max_hamming_bits": 0, "max_colour_difference": 0}
    tree["factory"]["views"] = {"few": {"best": 6}}
    trainer |= {"teacher": str(tiny_models / "teacher"), "start": None, "size_px": 32, "threads": 1}
    trainer |= {"judge": None, "grid_prompts": []}
    trainer["adapt"] |= {"steps": 2, "batch_images": 4}
    trainer["distill"] |= {"steps": 2, "batch_images": 4}
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    Chain(load_recipe(Recipe, recipe), folder / "out").run("select")
    return recipe, folder / "out"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(made[1], tmp_path / "out")
    return made[0], tmp_path / "out"


def chain(recipe: Path, out: Path, *overrides: str) -> Chain:
    return Chain(load_recipe(Recipe, recipe, overrides), out)


def trained_on(out: Path) -> list[tuple[str, int]]:
    facts = json.loads((out / "training" / "data.json").read_text())
    return [(fact["data"], fact["samples"]) for fact in facts]


def select(out: Path, *words: str) -> None:
    done = CliRunner().invoke(app, ["select", str(out / "dataset"), *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_a_view_of_the_recipe_is_trained_on_and_no_other_afterwards(copy: tuple[Path, Path]) -> None:
    """How to train may change until training began: the pictures are the same."""
    recipe, out = copy
    run = chain(recipe, out, "trainer.own_view=few", "trainer.adapt.steps=1")
    assert run.run("student")
    view = out / "dataset" / "views" / "few"
    assert trained_on(out) == [(str(view.resolve()), 6)]
    assert run._prompts(4) == first_prompts(view, 4)
    for other in ("trainer.own_view=null", "trainer.own_view=late"):
        with pytest.raises(
            LedgerConflict, match=r'another recipe: trainer\.own_view is "few" there and (null|"late") now'
        ):
            chain(recipe, out, other, "trainer.adapt.steps=1")
    # A limit decides nothing that is made, and errors say to raise it.
    limits = ("factory.make.max_dead_share=0.9", "factory.make.dead_after=1", "trainer.max_corrupt_share=0.2")
    assert not chain(recipe, out, "trainer.own_view=few", "trainer.adapt.steps=1", *limits).run("student")


def test_what_was_selected_after_making_is_trained_on(copy: tuple[Path, Path]) -> None:
    recipe, out = copy
    with pytest.raises(
        RecipeError, match=r"trainer\.own_view is late, .*; there are: few\. .*factory select .* --name late"
    ):
        chain(recipe, out, "trainer.own_view=late").run("student")
    assert not (out / "training").exists()
    select(out, "--name", "late", "--rule", "best=5")
    overlay, ids = Overlay(out / "dataset"), [row["id"] for row in read_manifest(out / "dataset" / "views" / "late")]
    overlay.decide(ids[0], {"verdict": "reject", "reason": "odd"}, "ada")
    with pytest.raises(LedgerConflict, match=r"own_view is late, which was packed before people decided anew"):
        chain(recipe, out, "trainer.own_view=late").run("student")
    select(out, "--name", "late", "--rule", "best=5")
    assert chain(recipe, out, "trainer.own_view=late").run("student")
    view = out / "dataset" / "views" / "late"
    assert trained_on(out) == [(str(view.resolve()), 5)] and ids[0] not in {row["id"] for row in read_manifest(view)}


def test_what_stopped_between_the_manifest_and_the_card_is_not_done(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = copy
    manifest, card = out / "dataset" / "manifest.parquet", out / "dataset" / "README.md"
    manifest.unlink()  # as when samples are given another try in a finished data set
    told = card.read_text()
    card.write_text("of before")

    def full(folder: Path, *more: Any) -> Path:
        if manifest.exists():  # the main selection comes last
            raise OSError("no space left")
        return write_card(folder, *more)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("factory.views.write_card", full)
        chain(recipe, out).run("select")
    assert manifest.exists(), "the counts of before would have said that all is done"
    assert chain(recipe, out).run("select") and card.read_text() == told
    assert not chain(recipe, out).run("select")


def test_builds_of_a_student_of_phase_1_alone_are_refused_before_the_hours(copy: tuple[Path, Path]) -> None:
    recipe, out = copy
    with pytest.raises(RecipeError, match="phase 1 alone") as told:
        chain(recipe, out, "trainer.distill.steps=0").run("export")
    assert told.value.where == "trainer.distill.steps" and not (out / "training").exists()


def test_a_view_that_nobody_knows_takes_no_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgeFusionError, match=r"trainer\.own_view is fwe, .*there are: few"):
        chain(made[0], tmp_path / "out", "trainer.own_view=fwe").run()
    with pytest.raises(EdgeFusionError, match="none but the main one"):
        chain(made[0], tmp_path / "out", "trainer.own_view=fwe", "factory.views={}").run()
    assert not (tmp_path / "out").exists()


def test_what_another_driver_did_meanwhile_is_neither_done_again_nor_forgotten(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    late = chain(made[0], tmp_path / "out")  # looked at the folder before the other one did anything
    shutil.copytree(made[1], tmp_path / "out")
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert not late.run("select")
    assert (tmp_path / "out" / "run.json").read_bytes() == before and late.facts["funnel"]["kept"]
