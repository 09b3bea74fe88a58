"""Counts on the way: the rules of a row by itself as select judges them, and what is foretold from them."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from factory.foretell import foretell, lines
from factory.index import to_columns
from factory.recipe import SelectRecipe
from factory.select import select
from factory.tally import ROW_RULES, Strata, Tally, later_rules, verdict

WORDS = {"exact duplicate", "near duplicate"}


def random_row(rng: random.Random, key: int) -> dict[str, Any]:
    outcome, reason = rng.choice([("made", "")] * 8 + [("rejected", "blank"), ("dead", "render: ValueError: x")])
    return {
        "id": f"{key:064x}",
        "outcome": outcome,
        "reason": reason,
        "prompt": rng.choice(["a fox"] * 9 + [""]),
        "clip_score": rng.choice([0.1, 0.3, 0.5, 0.9]),
        "raw_caption": rng.choice(["fox"] * 4 + ["", None]),
        "raw_clip_score": rng.choice([0.1, 0.3, 0.5, 0.9]),
        "sharpness": rng.choice([None, 0.2, 0.8, float("nan")]),
        "width_px": rng.choice([None, 100, 600]),
        "height_px": rng.choice([0, 300, 900]),
        "group": "things",
        "attributes": json.dumps({"gender": rng.choice(["a", "b"])}),
    }


def random_rules(rng: random.Random) -> SelectRecipe:
    score = {"least": rng.choice([None, 0.2, 0.5]), "most": rng.choice([None, 0.7])}
    return SelectRecipe.model_validate(
        {
            "text": rng.choice(["caption", "raw"]),
            "min_clip": rng.choice([0.0, 0.3, 0.4]),
            "min_size_px": rng.choice([0, 200, 400]),
            "scores": rng.choice([{}, {"sharpness": score}, {"clip_score": {"most": 0.6}, "sharpness": score}]),
            "max_hamming_bits": 0,
        }
    )


@pytest.mark.parametrize("seed", range(30))
def test_a_row_by_itself_is_judged_as_select_judges_it(seed: int) -> None:
    rng = random.Random(seed)
    rows, rules = [random_row(rng, i) for i in range(60)], random_rules(rng)
    known = [[edge for edge in (row["width_px"], row["height_px"]) if edge] for row in rows]
    columns = to_columns(
        pa.table(
            {
                **{name: [row[name] for row in rows] for name in ("id", "outcome", "reason", "group", "attributes")},
                "has_text": [bool(row["prompt"]) for row in rows],
                "has_raw_text": [bool(row["raw_caption"]) for row in rows],
                "edge_px": pa.array([min(edges, default=1 << 30) for edges in known], pa.int64()),
                "hash": np.random.default_rng(seed).integers(0, 2**63, len(rows), dtype=np.uint64),
                "colours": pa.array([bytes(12)] * len(rows), pa.binary(12)),
                "made_sha256": pa.array([None if row["outcome"] == "dead" else row["id"] for row in rows], pa.string()),
                **{name: [row[name] for row in rows] for name in ("clip_score", "raw_clip_score")},
                "sharpness": pa.array([row["sharpness"] for row in rows], pa.float64()),
            }
        )
    )
    judged = select(columns, rules).table().to_pylist()
    assert not WORDS & {row["reason"] for row in judged}, "duplicates would hide what is asked here"
    assert [verdict(row, rules) for row in rows] == [row["reason"] for row in judged]


def test_what_later_rules_take_is_named() -> None:
    assert later_rules(SelectRecipe(min_clip=0.3, best=5)) == ["duplicates"]
    assert later_rules(SelectRecipe(same_file=None, max_hamming_bits=None, crop="centre")) == []
    assert later_rules(SelectRecipe(people="ignore")) == ["duplicates"]
    rules = SelectRecipe.model_validate(
        {
            "scores": {"nsfw": {"most": 0.2, "best_share": 0.8}},
            "same_meaning": 0.95,
            "caps": [{"attributes": ["gender"], "most": 5}],
            "people": "only",
        }
    )
    told = later_rules(rules)
    assert told == ["duplicates", "the best share of nsfw", "semantic duplicates", "the rule caps", "the rule people"]
    assert set(ROW_RULES) <= set(SelectRecipe.model_fields)


def rows_of(unit: int, keep: int, gender: str = "a") -> list[dict[str, Any]]:
    """Ten rows, `keep` of which stay by a CLIP score of at least 0.5."""
    return [
        {
            "id": f"{unit}-{i}",
            "outcome": "pending",
            "reason": "",
            "prompt": "a fox",
            "clip_score": 0.9 if i < keep else 0.1,
            "group": "people",
            "attributes": json.dumps({"gender": gender}),
        }
        for i in range(10)
    ]


def test_units_count_once_in_any_order_and_are_remembered() -> None:
    rules = SelectRecipe(min_clip=0.5)
    there, back = Tally(rules), Tally(rules)
    for number in (0, 2, 1, 2):
        there.add(number, rows_of(number, number))
    for number in (2, 1, 0):
        back.add(number, rows_of(number, number))
    assert there.facts() == back.facts() and (there.rows, there.kept) == (30, 3)
    assert there.fallen == {"clip below threshold": 27} and there.outcomes == {"made": 30}
    facts = json.loads(json.dumps(there.facts()))
    assert facts["upto"] == 3 and facts["more"] == []
    again = Tally.read(facts, rules, {0, 1, 2, 5})
    assert again.facts() == there.facts() and again.covers(2) and not again.covers(5)
    assert Tally.read(facts, rules, {0, 2}).rows == 0, "a unit was given back to make"
    assert Tally.read(facts, SelectRecipe(min_clip=0.6), {0, 1, 2}).rows == 0, "other rules"
    assert Tally.read({"upto": 1}, rules, {0}).rows == 0 and Tally.read({}, rules, set()).rows == 0


def test_what_will_be_kept_and_whether_it_is_enough() -> None:
    tally = Tally(SelectRecipe(min_clip=0.5, best=700))
    assert foretell(tally, 1000, None)["share"] is None and lines(foretell(tally, 1000, None)) == []
    for unit in range(10):
        tally.add(unit, rows_of(unit, 5))
    found = foretell(tally, 1000, per_s=10.0, images_per_prompt=4)
    assert (found["kept"], found["judged"], found["expected"]) == (50, 100, 500)
    assert found["share_95"] == [0.4038, 0.5962]  # Wilson's for 50 of 100
    assert (found["least"], found["most"]) == (50 + 363, 50 + 537)
    # 200 lack at a share of one half: 400 pictures, 4 a prompt.
    assert found["best"] | {"remedy": ""} == {
        "of": 700,
        "reached": "no",
        "lacking": 200,
        "more_prompts": 100,
        "eta_s": None,
        "remedy": "",
    }
    assert any("the 700 best will not be there: plan about 100 more prompts" in line for line in lines(found))
    assert "before duplicates" in lines(found)[0]
    tally.rules = SelectRecipe(min_clip=0.5, best=300)
    found = foretell(tally, 1000, per_s=10.0)
    assert "by that the 300 best will be there, in about 50 s" in lines(found)
    best = found["best"]
    assert best["reached"] == "yes" and best["eta_s"] == 50.0  # 250 more are 500 pictures more
    tally.rules = SelectRecipe(min_clip=0.5, best=510)
    assert foretell(tally, 1000, per_s=10.0)["best"]["reached"] == "open"


def two_teachers(upto: int) -> tuple[Tally, dict[tuple[str, ...], int]]:
    """100 samples of teacher a, of whom 9 in 10 stay, then 100 of b with 4 in 10, then a refill of 50 by a; units of 10."""
    tally = Tally(SelectRecipe(min_clip=0.5, best=150), Strata((0, 20), teachers=True))
    for unit in range(upto):
        name, keep = ("b", 4) if 10 <= unit < 20 else ("a", 9)
        rows = [{**row, "attributes": json.dumps({"teacher": name})} for row in rows_of(unit, keep)]
        tally.add(unit, rows)
    return tally, {("0", "a"): 100, ("0", "b"): 100, ("1", "a"): 50}


def test_teachers_and_refills_are_foretold_each_by_its_own_samples() -> None:
    tally, strata = two_teachers(10)
    found = foretell(tally, 250, None, strata=strata)
    assert (found["least"], found["most"]) == (90, 240), "of b and the refill nobody knows anything"
    assert found["share_95"][0] < 0.4 and found["share_95"][1] > 0.9 and found["best"]["reached"] == "open"
    assert "of 2 of 3 teachers and refills nothing is judged yet" in lines(found)[0]
    tally, strata = two_teachers(15)
    found = foretell(tally, 250, None, strata=strata)
    assert 110 + 10 < found["least"] < found["most"] < 110 + 33 + 50, "b goes by its own 20 of 50"
    tally, strata = two_teachers(25)
    found = foretell(tally, 250, None, strata=strata)
    assert found["least"] == found["most"] == found["expected"] == 175 and found["not_judged"] == 0


def test_counts_of_an_earlier_version_are_read_where_there_is_one_stratum_and_made_anew_elsewhere() -> None:
    tally, _ = two_teachers(25)
    facts = json.loads(json.dumps(tally.facts()))
    assert Tally.read(facts, tally.rules, set(range(25)), tally.strata).by_stratum == tally.by_stratum
    del facts["strata"]
    assert Tally.read(facts, tally.rules, set(range(25)), tally.strata).rows == 0
    plain = Tally.read(facts, tally.rules, set(range(25)))
    assert plain.rows == 250 and foretell(plain, 500, None) == foretell(tally, 500, None)


def test_which_wanted_combinations_will_lack() -> None:
    rules = SelectRecipe.model_validate({"min_clip": 0.5, "wanted": [{"attributes": ["gender"], "least": 40}]})
    tally = Tally(rules)
    tally.add(0, rows_of(0, 10, "a"))
    tally.add(1, rows_of(1, 2, "b"))
    planned = [{("people", "a"): 50, ("people", "b"): 50}]
    wanted = foretell(tally, 100, None, planned)["wanted"]
    # a: 10 and 40 of 40; b: 2 and 8 of 40, so 30 lack, which are 150 pictures at a fifth.
    assert (wanted["combinations"], wanted["short"], wanted["lacking"]) == (2, 1, 30)
    assert wanted["worst"] == [{"group": "people", "attributes": {"gender": "b"}, "lacking": 30, "plan": 150}]
    told = lines(foretell(tally, 100, None, planned))
    assert (
        "1 of 2 wanted combinations will lack 30 samples, most of all people, b" in told[-1] and "--refill" in told[-1]
    )
    again = Tally.read(json.loads(json.dumps(tally.facts())), rules, {0, 1})
    assert again.combinations == tally.combinations
