"""Prompts that the user brings, near repeats of prompts, and a making in which too much dies."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import RecipeError, StageError
from cluster.runner import InProcess
from cluster.stage import Row, Stage
from factory import make as making
from factory.plan import make_plan, write_checked
from factory.prompts import Alike, _words
from factory.recipe import FactoryRecipe
from factory.taxonomy import Group

PROMPTS = ["a red fox on snow", "a green owl at night, painted", "a key", "the tall grey lighthouse by the sea"]


def recipe_of(*paths: Path, make: dict | None = None, **keys) -> FactoryRecipe:
    return FactoryRecipe.model_validate(
        {
            "plan": {"kind": "file", "paths": [str(p) for p in paths], **keys},
            "make": {
                "teacher": {"kind": "diffusers", "model": "zoo:teacher", "size_px": 64, "batch_images": 4},
                "scorer": {"kind": "open_clip", "model": "zoo:clip"},
                "unit_images": 4,
                **(make or {}),
            },
        }
    )


def plan_of(recipe: FactoryRecipe, folder: Path) -> list[dict]:
    return pq.read_table(make_plan(recipe, 3, folder)).to_pylist()


def test_text_json_lines_and_parquet_give_the_same_plan(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeff" + "\n\n".join(PROMPTS))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    pq.write_table(pa.table({"prompt": PROMPTS}), tmp_path / "p.parquet")
    plans = [
        plan_of(recipe_of(tmp_path / f"p.{k}", images_per_prompt=2), tmp_path / k) for k in ("txt", "jsonl", "parquet")
    ]
    places = [[json.loads(row.pop("source")) for row in plan] for plan in plans]
    assert plans[0] == plans[1] == plans[2]
    for found, kind, lines in zip(
        places, ("txt", "jsonl", "parquet"), ((1, 3, 5, 7), (1, 2, 3, 4), (1, 2, 3, 4)), strict=True
    ):
        assert found == [{"file": f"p.{kind}", "at": line} for line in lines for _ in range(2)]
    assert [row["prompt"] for row in plans[0]] == [p for p in PROMPTS for _ in range(2)]
    assert len({row["id"] for row in plans[0]}) == 8 and {row["outcome"] for row in plans[0]} == {"pending"}


def test_attributes_groups_and_limits_of_brought_prompts(tmp_path: Path) -> None:
    rows = [{"text": p, "kind": "x" if i else None, "tone": i} for i, p in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"prompt_column": "text", "group_column": "kind", "attribute_columns": ["tone"], "limit": 3}
    plan = plan_of(recipe_of(tmp_path / "p.jsonl", **keys), tmp_path / "out")
    assert [(row["group"], row["attributes"]) for row in plan] == [
        ("prompts", '{"tone": "0"}'),
        ("x", '{"tone": "1"}'),
        ("x", '{"tone": "2"}'),
    ]


def test_bad_prompts_are_dead_in_their_place_and_bad_files_are_named(tmp_path: Path) -> None:
    lines = [b"a red fox", b"\xff\xfe broken", b"x" * 600, b"A RED fox!", b"a\x07bell", b"an owl"]
    (tmp_path / "p.txt").write_bytes(b"\n".join(lines))
    plan = plan_of(recipe_of(tmp_path / "p.txt"), tmp_path / "out")
    assert [row["outcome"] for row in plan] == ["pending", "dead", "dead", "dead", "dead", "pending"]
    assert plan[3]["reason"] == "plan: the prompt is too like an earlier one"
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(RecipeError, match="line 2"):
        plan_of(recipe_of(tmp_path / "q.jsonl"), tmp_path / "q")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "r.parquet")
    with pytest.raises(RecipeError, match="has no column prompt"):
        plan_of(recipe_of(tmp_path / "r.parquet"), tmp_path / "r")
    (tmp_path / "s.txt").write_text("\n\n")
    with pytest.raises(StageError, match="no usable prompt"):
        plan_of(recipe_of(tmp_path / "s.txt"), tmp_path / "s")
    with pytest.raises(RecipeError, match="there is no file"):
        plan_of(recipe_of(tmp_path / "t.txt"), tmp_path / "t")


@pytest.mark.parametrize("most", [0.3, 0.6, 0.75, 1.0])
def test_alike_is_exactly_the_jaccard_similarity_of_words(most: float) -> None:
    rng = random.Random(1)
    prompts = [
        " ".join(rng.choices(["a", "bb", "ccc", "dddd", "ee", "fox", "owl", "keys"], k=rng.randint(1, 8)))
        for _ in range(300)
    ]
    alike, kept = Alike(most), list[set[str]]()
    for prompt in prompts:
        words = set(prompt.split())
        near = any(len(words & other) / len(words | other) >= most - 1e-12 for other in kept)
        assert alike.find(prompt) == near, prompt
        if not near:
            kept.append(words)
            alike.add(prompt)
    assert 0 < len(kept) < 300
    assert not Alike(None).find("a")


def templated(count: int) -> list[str]:
    """Prompts of one template, whose long words all of them share."""
    rng = random.Random(5)
    names = ["".join(rng.choices("aeioubdgklmnprstv", k=rng.randint(3, 7))) for _ in range(400)]
    return [
        f"a professional photograph of a {rng.choice(names[:20])} {rng.choice(names)} near the {rng.choice(names)}, "
        f"dramatic illumination, {rng.choice(names[20:60])} background"
        for _ in range(count)
    ]


def brute_force(most: float, prompts: list[str]) -> list[bool]:
    """The definition: of each prompt whether one that was kept before has so large a share of all words of both in common."""
    kept, found = list[frozenset[str]](), list[bool]()
    for prompt in prompts:
        words = _words(prompt)
        found.append(any(len(words & other) >= most * len(words | other) for other in kept))
        kept += [] if found[-1] else [words]
    return found


def answers(most: float, prompts: list[str]) -> list[bool]:
    alike, found = Alike(most), list[bool]()
    for prompt in prompts:
        found.append(alike.find(prompt))
        if not found[-1]:
            alike.add(prompt)
    return found


WORDS = st.sampled_from([*"abcdefgh", "fox", "owl", "key", "photograph", "illumination", "Fox", "é", "!"])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(WORDS, max_size=9).map(" ".join), max_size=40),
    st.one_of(st.sampled_from([0.1, 0.2, 0.3, 1 / 3, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1.0]), st.floats(0.01, 1.0)),
    st.integers(0, 20),
)
def test_alike_answers_as_the_brute_force_does_whatever_order_the_words_are_in(
    prompts: list[str], most: float, worth: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factory.prompts._WORTH_ORDERING", worth)
        assert answers(most, prompts) == brute_force(most, prompts)


@pytest.mark.parametrize("most", [0.6, 0.8, 0.9])
def test_few_of_many_templated_prompts_are_compared(most: float) -> None:
    prompts, alike, pairs, compared = templated(1000), Alike(most), 0, 0
    for prompt in prompts:
        compared += sum(1 for _ in alike._candidates(_words(prompt)))
        pairs += len(alike._sets)
        if not alike.find(prompt):
            alike.add(prompt)
    assert compared < pairs / 5
    assert answers(most, prompts[:300]) == brute_force(most, prompts[:300])


def test_equal_words_among_20_000_templated_prompts_are_found_at_once() -> None:
    prompts = templated(19_000)
    prompts += [" ".join(reversed(prompt.split())) for prompt in prompts[:1000]]
    began = time.process_time()  # of this process, whoever else has the cores
    found = answers(1.0, prompts)
    assert time.process_time() - began < 2
    assert all(found[19_000:]) and sum(found[:19_000]) == 19_000 - len({_words(prompt) for prompt in prompts})


def test_a_written_repeat_is_written_anew_and_dead_only_after_all_tries() -> None:
    class Writer:
        def __init__(self) -> None:
            self.said = itertools.chain(["a fox", "a fox", "a fox", "an owl", "a fox"], itertools.repeat("a fox"))

        def write(self, records: list, seed: int) -> list[str]:
            return [next(self.said) for _ in records]

        def close(self) -> None: ...

    group = Group(name="g", share=1, must_mention=[], attributes={"subject": ["fox"]})
    found = write_checked(Writer(), [(group, {"subject": "fox"})] * 3, 3, 0, Alike(1.0))
    assert found[0] == ("a fox", "") and found[2][0] == "a fox"
    assert [wrong for _, wrong in found] == ["", "", "the prompt is too like an earlier one"]


def test_a_written_prompt_that_is_no_utf_8_in_every_try_is_dead_and_not_the_plan() -> None:
    class Writer:
        def write(self, records: list, seed: int) -> list[str]:
            return ["a fox \ud83d"] * len(records)

        def note_usage(self, journal: Path) -> None: ...

        def close(self) -> None: ...

    group = Group(name="g", share=1, must_mention=[], attributes={"subject": ["fox"]})
    found = write_checked(Writer(), [(group, {"subject": "fox"})], 2, 0, Alike(None))
    assert found == [("a fox ?", "the prompt is too long or holds odd characters")]


def test_attributes_and_groups_that_are_no_utf_8_are_mended(tmp_path: Path) -> None:
    rows = ['{"prompt": "a fox", "style": "caf\xe9", "kind": "\xe9"}', '{"prompt": "an owl", "style": "\\ud83d"}']
    (tmp_path / "p.jsonl").write_bytes("\n".join(rows).encode("latin-1"))
    keys = {"group_column": "kind", "attribute_columns": ["style"]}
    plan = plan_of(recipe_of(tmp_path / "p.jsonl", **keys), tmp_path / "out")
    assert [row["prompt"] for row in plan] == ["a fox", "an owl"] and {row["outcome"] for row in plan} == {"pending"}
    assert [row["attributes"] for row in plan] == ['{"style": "caf?"}', '{"style": "?"}']
    assert [row["group"] for row in plan] == ["?", "prompts"]


def test_a_making_in_which_too_much_dies_stops_once_it_means_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"prompt number {i}" for i in range(40)) + "\nprompt number 1\n")
    made: list[str] = []

    class Broken:
        def __call__(self, rows: list[Row]) -> list[Row]:
            if any(row["prompt"].endswith(("0", "2", "4", "6", "8")) for row in rows):
                raise ValueError("broken")
            return rows

    def run(share: float, after: int) -> int:
        made.clear()
        recipe = recipe_of(tmp_path / "p.txt", make={"max_dead_share": share, "dead_after": after})
        make_plan(recipe, 0, tmp_path)
        return making.make(recipe, tmp_path, InProcess(), lambda n: made.append("unit"))

    monkeypatch.setattr(making, "make_stages", lambda recipe, folder: [Stage("draw", Broken)])
    with pytest.raises(StageError, match=r"12 of 24 samples died.*max_dead_share \(0\.45\)"):
        run(0.45, 21)
    assert len(made) == 6
    assert run(0.55, 4) == 11  # half died, which is allowed; the repeat died in the plan and does not count
