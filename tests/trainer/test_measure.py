"""Comparing models: what is drawn once, what is counted, and what is refused or left out in words."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import trainer.measure as measure_module
from cluster.errors import RecipeError
from factory.models.clip import Clip
from factory.recipe import OpenClipScorer
from trainer.cli import app
from trainer.judging import EvaluateRecipe
from trainer.measure import evaluate, measure, read_questions, table
from trainer.models import open_pipeline
from trainer.sample import as_student
from trainer.stream import ShardStream


@pytest.fixture(scope="module")
def student(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = open_pipeline(str(tiny_models / "teacher"))
    folder = tmp_path_factory.mktemp("student")
    as_student(teacher, teacher.unet).save_pretrained(folder)
    return folder


def recipe(models: Path, data: Path | None, *names: str | Path, **changes) -> EvaluateRecipe:
    settings = {
        "models": [str(name) for name in names],
        "judge": str(models / "clip"),
        "data": str(data) if data else None,
        "steps": [2, 1],
        "teacher_steps": 2,
        "batch_images": 4,
        "threads": 1,
    }
    return EvaluateRecipe.model_validate(settings | changes)


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in (folder / "pictures").rglob("*.png")}


def test_teacher_and_student_are_compared_and_nothing_is_drawn_twice(tiny_models, student, data, tmp_path) -> None:
    settings = recipe(tiny_models, data, tiny_models / "teacher", student)
    report = evaluate(settings, tmp_path)
    real, teacher, two, one = report["rows"]
    assert (real["steps"], teacher["steps"], two["steps"], one["steps"]) == (None, 2, 2, 1)
    assert teacher["guidance"] == 7.5 and two["guidance"] == 1.0
    for row in (teacher, two, one):
        for name in ("recall_at_1", "clip_score", "cmmd", "fid_judge"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    assert report["among"] == 12 and real["cmmd"] is None
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    assert "R@1" in str([c.header for c in table(report).columns])

    before = files(tmp_path)
    assert len(before) == 3 * 12
    assert evaluate(settings, tmp_path) == report
    assert files(tmp_path) == before


def test_interrupted_it_ends_in_the_same_pictures_and_figures(
    tiny_models, student, data, tmp_path, monkeypatch
) -> None:
    settings = recipe(tiny_models, data, student)
    wanted = evaluate(settings, tmp_path / "whole")
    drawn, count = measure_module.publish_bytes, []

    def die(path, content):
        drawn(path, content)
        count.append(path)
        if len(count) in (3, 9):  # inside a batch
            raise KeyboardInterrupt

    monkeypatch.setattr(measure_module, "publish_bytes", die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings, tmp_path / "broken")
    assert evaluate(settings, tmp_path / "broken") == wanted
    pictures = {p.name: p.read_bytes() for p in (tmp_path / "whole").rglob("*.png")}
    assert {p.name: p.read_bytes() for p in (tmp_path / "broken").rglob("*.png")} == pictures


def test_a_retrained_model_is_drawn_anew(tiny_models, student, data, tmp_path) -> None:
    import shutil

    shutil.copytree(student, tmp_path / "other")
    (tmp_path / "other" / "note.txt").write_text("retrained")
    evaluate(recipe(tiny_models, data, student, steps=[1]), tmp_path / "out")
    first = len(files(tmp_path / "out"))
    evaluate(recipe(tiny_models, data, tmp_path / "other", steps=[1]), tmp_path / "out")
    assert len(files(tmp_path / "out")) == 2 * first


def test_without_references_distances_are_absent_and_say_why(tiny_models, student, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n\na key\na fox\nan owl\n")
    report = evaluate(
        recipe(tiny_models, None, student, prompts=str(tmp_path / "prompts.txt"), steps=[1]), tmp_path / "out"
    )
    (row,) = report["rows"]
    assert report["prompts"] == 3 and row["cmmd"] is None and row["fid_judge"] is None
    assert "no reference pictures" in report["absent"]["cmmd"] and "--fidelity" in report["absent"]["fid"]
    assert "no cmmd" in str(table(report).caption)


def test_no_more_samples_are_read_than_are_asked_about(tiny_models, data, monkeypatch) -> None:
    read, seen = ShardStream.read, []
    monkeypatch.setattr(ShardStream, "read", lambda self, row: (seen.append(row), read(self, row))[1])
    assert len(read_questions(recipe(tiny_models, data, "m", count=3)).prompts) == 3
    assert len(seen) == 3


def test_references_follow_the_number_of_pictures_and_fewer_are_said(tiny_models, student, data, tmp_path) -> None:
    from PIL import Image

    from trainer.measure import _FEWEST_REFERENCES

    (tmp_path / "prompts.txt").write_text("".join(f"thing {i}\n" for i in range(14)))
    asks = {"prompts": str(tmp_path / "prompts.txt")}
    assert _FEWEST_REFERENCES == 2048
    assert len(read_questions(recipe(tiny_models, data, "m", **asks)).references) == 12  # all that there are
    assert len(read_questions(recipe(tiny_models, data, "m", **asks, references=5)).references) == 5
    report = evaluate(recipe(tiny_models, data, student, **asks, references=5, count=14, steps=[1]), tmp_path / "out")
    assert report["notes"] == ["5 reference pictures stand against 14 drawn ones: FIDs fall with both numbers"]
    assert "5 reference pictures" in str(table(report).caption)
    # The paper's set is a folder of pictures beside COCO's captions.
    (tmp_path / "real").mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30 + i, 3), 40 * i, np.uint8)).save(tmp_path / "real" / f"{i}.png")
    found = read_questions(recipe(tiny_models, tmp_path / "real", "m", **asks))
    assert [read().shape for read in found.references] == [(20, 20, 3)] * 3 and not found.paired
    with pytest.raises(RecipeError, match="pictures say no prompts"):
        read_questions(recipe(tiny_models, tmp_path / "real", "m"))


def test_the_judge_sees_pictures_at_the_size_that_is_asked_for(tiny_models, tmp_path) -> None:
    from trainer.judge import Judge

    class Sizes:
        batch = 2

        def pictures(self, pictures: list[np.ndarray], /) -> np.ndarray:
            return np.array([picture.shape[:2] for picture in pictures])

    pictures = [lambda: np.zeros((64, 64, 3), np.uint8)] * 3
    assert Judge(Sizes(), "j", tmp_path, 32).embed("", pictures, "k", lambda *_: None).tolist() == [[32, 32]] * 3
    assert Judge(Sizes(), "j", tmp_path).embed("", pictures, "k", lambda *_: None).tolist() == [[64, 64]] * 3


def test_prompts_of_one_meaning_are_asked_once(tiny_models, tmp_path) -> None:
    import hashlib

    from factory.pack import Sample, pack
    from factory.stages import encode_picture

    picture = encode_picture(np.zeros((32, 32, 3), np.uint8), "png")
    samples = [
        Sample(
            hashlib.sha256(bytes([i])).hexdigest(), picture, "png", f"say {i}", {"attributes": {"subject": str(i % 4)}}
        )
        for i in range(12)
    ]
    pack(samples, tmp_path)
    found = read_questions(recipe(tiny_models, tmp_path, "m"))
    assert len(found.prompts) == 4 and len(found.references) == 12 and found.paired


def test_a_better_model_scores_better() -> None:
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(300, 16))
    real = texts + rng.normal(size=texts.shape)
    good, bad = (texts + noise * rng.normal(size=texts.shape) for noise in (1, 4))
    better, worse = measure(good, texts, real, 256), measure(bad, texts, real, 256)
    assert better["recall_at_1"]["low"] > worse["recall_at_1"]["high"]
    assert better["clip_score"]["low"] > worse["clip_score"]["high"]
    assert better["cmmd"]["value"] < worse["cmmd"]["value"] and better["fid_judge"]["high"] < worse["fid_judge"]["low"]


def test_embeddings_of_one_judge_are_not_taken_for_anothers(tiny_models, student, data, tmp_path, monkeypatch) -> None:
    """Many models share a weight tag such as `openai`."""

    def opened(scorer: OpenClipScorer) -> Any:
        clip = Clip(OpenClipScorer(model=str(tiny_models / "clip")))
        turn = -1.0 if scorer.model == "ViT-B-16" else 1.0
        return types.SimpleNamespace(batch=4, texts=clip.texts, pictures=lambda p: turn * clip.pictures(p))

    monkeypatch.setattr(measure_module, "Clip", opened)
    scores = {
        judge: evaluate(
            recipe(tiny_models, data, student, judge=judge, judge_pretrained="openai", steps=[1]), tmp_path
        )["rows"][-1]["clip_score"]["value"]
        for judge in ("ViT-B-32", "ViT-B-16")
    }
    assert scores["ViT-B-16"] == pytest.approx(-scores["ViT-B-32"]) and scores["ViT-B-32"] != 0


def test_one_prompt_beside_reference_pictures_is_refused_in_words(tiny_models, student, data, tmp_path) -> None:
    (tmp_path / "one.txt").write_text("a fox\n")
    with pytest.raises(RecipeError, match=r"one\.txt: one prompt, or one reference picture"):
        evaluate(recipe(tiny_models, data, student, prompts=str(tmp_path / "one.txt")), tmp_path / "out")


def test_the_command_prints_the_table(tiny_models, student, data, tmp_path) -> None:
    words = ["evaluate", str(student), "--data", str(data), "--judge", str(tiny_models / "clip"), "--steps", "1"]
    said = CliRunner().invoke(app, [*words, "--count", "4", "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    assert "CMMD" in said.output and "4 prompts, R@1 among 4" in said.output
