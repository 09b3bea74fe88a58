"""Reading attributes back: which words are exchanged, what is counted, and that the judge reads real pictures right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from factory.models.clip import Clip
from factory.pack import Sample, pack
from factory.pocket.evalset import read_evalset
from factory.recipe import OpenClipScorer
from factory.stages import encode_picture
from trainer.attributes import agreement, ask
from trainer.judging import EvaluateRecipe
from trainer.measure import evaluate, table

GENDER = {"gender": {"man": ["man", "male"], "woman": ["woman", "female"]}}


def test_one_word_is_exchanged_and_nothing_else() -> None:
    prompts = ["a male cook with light skin", "a woman working as a cook with medium-light skin", "a fox"]
    records = [
        {"gender": "man", "tone": "light"},
        {"gender": "woman", "tone": "medium-light"},
        {"subject": "fox"},
    ]
    asked = ask(prompts, records, GENDER)
    assert set(asked) == {"gender", "tone"}, "one subject asks nothing"
    assert asked["gender"].wordings == [
        ["a male cook with light skin", "a female cook with light skin"],
        ["a man working as a cook with medium-light skin", prompts[1]],
    ]
    assert asked["gender"].own == [0, 1]
    assert asked["tone"].wordings[1] == ["a woman working as a cook with light skin", prompts[1]]


def test_a_prompt_that_does_not_say_its_value_is_not_asked() -> None:
    asked = ask(["a farmer", "a farmer on red"], [{"ground": "blue"}, {"ground": "red"}], {})
    assert asked["ground"].rows == [1]
    twice = ask(["a red apple on a red wall", "a fox on a blue wall"], [{"ground": "red"}, {"ground": "blue"}], {})
    assert twice["ground"].rows == [1], "which red is meant cannot be told"
    assert not ask(["a farmer", "a cook"], [{"ground": "blue"}, {"ground": "red"}], {})


def test_agreement_counts_the_nearest_wording() -> None:
    places = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}
    asked = ask(list(places), [{"colour": colour} for colour in places], {})
    pictures = np.array([places["red"], places["green"], places["green"]])
    share, count, chance = agreement(asked, pictures, lambda texts: np.array([places[t] for t in texts]))["colour"]
    assert (round(share.value, 6), count, round(chance, 6)) == (round(2 / 3, 6), 3, round(1 / 3, 6))


def test_a_judge_that_cannot_tell_agrees_by_chance() -> None:
    asked = ask(["red", "green"], [{"colour": "red"}, {"colour": "green"}], {})
    share, _, chance = agreement(asked, np.ones((2, 3)), lambda texts: np.ones((len(texts), 3)))["colour"]
    assert share.value == chance == 0.5


def test_evaluate_reads_attributes_from_real_pictures(tiny_models: Path, tmp_path: Path) -> None:
    shown = [s for s in read_evalset("trained") if s.record.get("gender") in ("man", "woman")][:48]
    samples = [
        Sample(
            hashlib.sha256(str(i).encode()).hexdigest(),
            encode_picture(s.picture, "png"),
            "png",
            s.caption,
            {"attributes": s.record},
        )
        for i, s in enumerate(shown)
    ]
    pack(samples, tmp_path / "data")
    settings = {
        "models": [str(tiny_models / "teacher")],
        "data": str(tmp_path / "data"),
        "judge": "zoo:judge",
        "attribute_words": GENDER,
        "teacher_steps": 1,
        "threads": 1,
        "count": 48,
    }
    report = evaluate(EvaluateRecipe.model_validate(settings), tmp_path / "out")
    real, noise = (row["attributes"] for row in report["rows"])
    assert real["gender"]["asked"] == noise["gender"]["asked"] > 40
    # An untrained model draws noise, of which nothing can be read.
    for key in ("gender", "tone", "background"):
        assert real[key]["low"] > real[key]["chance"], key
        assert real[key]["value"] > noise[key]["value"], key
    assert "gender as asked ↑" in [column.header for column in table(report).columns]


def test_the_judge_is_asked_in_the_prompts_own_words() -> None:
    """The reading here and the one that `zoo report` prints are of the same thing."""
    shown = [s for s in read_evalset("compositions") if s.record.get("gender") in ("man", "woman")][:96]
    clip = Clip(OpenClipScorer(model="zoo:judge"))
    asked = ask([s.caption for s in shown], [s.record for s in shown], GENDER)
    pictures = clip.pictures([s.picture for s in shown])
    assert agreement(asked, pictures, clip.texts)["tone"][0].value > 0.9
