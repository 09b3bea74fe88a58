"""A data set is made by the models that began it, however often its run is killed and started again."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.errors import LedgerConflict
from cluster.runner import InProcess
from cluster.stage import PENDING, Row, Stage
from cluster.storage import publish_bytes
from factory import same_models
from factory.ledger import commit_unit
from factory.make import make
from factory.plan import PLAN, PLAN_SCHEMA, table_bytes
from factory.recipe import FactoryRecipe, MakeRecipe
from factory.same_models import MODELS, refuse_other_models


def folder_of(place: Path, weights: bytes = b"weights") -> str:
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(weights)
    return str(place)


@pytest.fixture
def recipe(tmp_path: Path) -> MakeRecipe:
    """Two teachers, CLIP, a captioner and a head, each a folder; one teacher is of the hub."""
    models = tmp_path / "models"
    named = {name: folder_of(models / name) for name in ("photo", "clip", "captioner", "head", "other-clip")}
    return MakeRecipe.model_validate(
        {
            "teachers": {"photo": {"model": named["photo"]}, "hub": {"model": "owner/name"}},
            "captioner": {"kind": "transformers", "model": named["captioner"]},
            "scorer": {"model": named["clip"]},
            "scores": [{"kind": "aesthetic", "weights": named["head"], "clip": {"model": named["other-clip"]}}],
        }
    )


KEYS = {
    "photo": "factory.make.teachers.photo",
    "clip": "factory.make.scorer",
    "captioner": "factory.make.captioner",
    "head": "factory.make.scores.0",
    "other-clip": "factory.make.scores.0.clip",
}


@pytest.mark.parametrize("name", KEYS)
def test_each_model_that_changed_is_named_by_its_key(recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    data, weights = tmp_path / "dataset", tmp_path / "models" / name / "model.safetensors"
    refuse_other_models(recipe, data)
    publish_bytes(data / "ledger" / "unit-00000.parquet", b"any")
    noted = (data / MODELS).read_bytes()
    refuse_other_models(recipe, data)
    weights.write_bytes(b"retrain")  # as many bytes, at another time
    os.utime(weights, ns=(1, 1))
    with pytest.raises(LedgerConflict, match="was changed since this data set was begun") as told:
        refuse_other_models(recipe, data)
    assert told.value.where == KEYS[name] and (data / MODELS).read_bytes() == noted
    weights.write_bytes(b"weights")
    refuse_other_models(recipe, data)


def test_what_the_plan_does_not_know_may_change_until_a_unit_is_made(recipe: MakeRecipe, tmp_path: Path) -> None:
    data, models = tmp_path / "dataset", tmp_path / "models"
    refuse_other_models(recipe, data)
    (models / "clip" / "model.safetensors").write_bytes(b"a whole copy")
    refuse_other_models(recipe, data)
    (models / "photo" / "model.safetensors").write_bytes(b"ids vouch for the old ones")
    with pytest.raises(LedgerConflict, match="photo was changed"):
        refuse_other_models(recipe, data)


def test_a_folder_of_an_earlier_version_is_noted_as_it_is(recipe: MakeRecipe, tmp_path: Path) -> None:
    publish_bytes(tmp_path / "dataset" / "ledger" / "unit-00000.parquet", b"any")
    refuse_other_models(recipe, tmp_path / "dataset")
    assert (tmp_path / "dataset" / MODELS).exists()


def test_files_that_stayed_as_they_are_are_not_read_again(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_other_models(recipe, tmp_path / "dataset")
    read = list[str]()
    monkeypatch.setattr(same_models, "fresh_fingerprint", lambda model, revision: read.append(model) or f"{model}@main")
    refuse_other_models(recipe, tmp_path / "dataset")
    assert read == ["owner/name"], "which has no files here"


def test_a_resumed_make_refuses_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, teacher, clip = tmp_path / "dataset", folder_of(tmp_path / "teacher"), folder_of(tmp_path / "clip")
    writer = {"kind": "transformers", "model": "zoo:writer"}
    recipe = FactoryRecipe.model_validate(
        {
            "plan": {"taxonomy": "zoo:taxonomy.yaml", "prompts": 2, "writer": writer},
            "make": {"teacher": {"model": teacher, "batch_images": 1}, "scorer": {"model": clip}, "unit_images": 1},
        }
    )
    row = {"prompt": "p", "group": "g", "attributes": "{}", "outcome": PENDING, "reason": ""}
    rows = [{**row, "id": f"{i:064x}", "seed": i} for i in range(2)]
    publish_bytes(data / PLAN, table_bytes(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)))

    def commit(rows: list[Row]) -> list[Row]:
        if rows[0]["seed"] == 1 and (tmp_path / "stop").exists():
            raise KeyboardInterrupt
        commit_unit(data, rows)
        return rows

    monkeypatch.setattr(
        "factory.make.make_stages", lambda recipe, folder: [Stage("commit", lambda: commit, whole=True)]
    )
    (tmp_path / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        make(recipe, data, InProcess())
    (tmp_path / "stop").unlink()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"fine-tuned")
    with pytest.raises(LedgerConflict, match="was changed since"):
        make(recipe, data, InProcess())
    assert len(list((data / "ledger").iterdir())) == 1
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"weights")
    assert make(recipe, data, InProcess()) == 1
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"fine-tuned")
    assert make(recipe, data, InProcess()) == 0, "nothing is left to be drawn"
