"""The rules, and the fast select against the obvious one that compares row by row."""

import hashlib
import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import RecipeError
from factory.balance import Attributes, audit
from factory.decisions import Decision
from factory.index import Columns, to_columns
from factory.recipe import SelectRecipe
from factory.select import Selection, summarise
from factory.select import select as select_columns


def columns_of(rows: list[dict[str, Any]], files: dict[str, str]) -> Columns:
    """What the index would hold of these ledger rows."""
    scores = sorted({name for row in rows for name, value in row.items() if isinstance(value, float)})
    return to_columns(
        pa.table(
            {
                "id": [row["id"] for row in rows],
                "outcome": [row["outcome"] for row in rows],
                "reason": [row["reason"] for row in rows],
                "group": [row.get("group", "") for row in rows],
                "attributes": [row.get("attributes", "{}") for row in rows],
                "has_text": [bool(row.get("prompt", "-")) for row in rows],
                "has_raw_text": [bool(row.get("raw_caption")) for row in rows],
                "edge_px": pa.array([min(row.get("width_px", 9999), row.get("height_px", 9999)) for row in rows]),
                "hash": np.array([int(row["phash"], 16) for row in rows], np.uint64),
                "colours": pa.array([row["colours"] for row in rows], pa.binary(12)),
                "made_sha256": pa.array([files.get(row["id"]) for row in rows], pa.string()),
                **{name: pa.array([row.get(name) for row in rows], pa.float64()) for name in scores},
            }
        )
    )


def chosen(rows: list[dict], files: dict[str, str], recipe: SelectRecipe, decisions: Any = None) -> Selection:
    # A dead row has no picture, whatever the table of files says.
    return select_columns(
        columns_of(rows, {r["id"]: files[r["id"]] for r in rows if r["outcome"] != "dead"}), recipe, decisions
    )


def select(*given: Any) -> list[dict[str, str]]:
    return chosen(*given).table().to_pylist()


def funnel_of(*given: Any) -> dict[str, Any]:
    return chosen(*given).funnel()


def entry(key: str, score: float, phash: str = "", colours: int = 0, outcome: str = "made", reason: str = "") -> dict:
    return {
        "id": key,
        "outcome": outcome,
        "reason": reason,
        "clip_score": score,
        "phash": phash or f"{hash(key) & (2**64 - 1):016x}",
        "colours": bytes([colours] * 12),
    }


RULES = SelectRecipe(min_clip=0.3, max_hamming_bits=2, max_colour_difference=6)
ROWS = [
    entry("a", 0.9, "00000000000000ff"),
    entry("b", 0.8, "00000000000000fe", colours=5),  # one bit and five shades from a
    entry("c", 0.7, "00000000000000ff", colours=90),  # the same drawing in other colours
    entry("d", 0.2, "ffff000000000000"),
    entry("e", 0.6, "00ff00ff00ff00ff"),
    entry("f", 0.5, "00ff00ff00ff00ff", colours=200),  # the very file of e
    entry("g", 0.0, outcome="dead", reason="render: ValueError: x"),
    entry("h", 0.9, outcome="rejected", reason="blank"),
]
FILES = {row["id"]: ("same" if row["id"] in "ef" else row["id"]) for row in ROWS}


def test_each_rule_gives_its_reason_and_the_funnel_adds_up() -> None:
    found = {row["id"]: (row["outcome"], row["reason"]) for row in select(ROWS, FILES, RULES)}
    assert found == {
        "a": ("kept", ""),
        "b": ("rejected", "near duplicate"),
        "c": ("kept", ""),
        "d": ("rejected", "clip below threshold"),
        "e": ("kept", ""),
        "f": ("rejected", "exact duplicate"),
        "g": ("dead", "render: ValueError: x"),
        "h": ("rejected", "blank"),
    }
    counts = funnel_of(ROWS, FILES, RULES)
    assert counts["planned"] == 8 == counts["kept"] + counts["rejected"] + counts["dead"]
    assert sum(counts["reasons"].values()) == counts["rejected"] + counts["dead"]


def test_the_order_of_arrival_changes_no_verdict() -> None:
    wanted = {row["id"]: row["outcome"] for row in select(ROWS, FILES, RULES)}
    for seed in range(20):
        shuffled = random.Random(seed).sample(ROWS, len(ROWS))
        assert {row["id"]: row["outcome"] for row in select(shuffled, FILES, RULES)} == wanted


def test_a_stricter_threshold_never_keeps_a_picture_under_it() -> None:
    stricter = SelectRecipe(min_clip=0.65, max_hamming_bits=2, max_colour_difference=6)
    kept = {row["id"] for row in select(ROWS, FILES, stricter) if row["outcome"] == "kept"}
    assert kept == {"a", "c"}


def people(**verdicts: str | None) -> dict[str, Decision]:
    """Decisions by the one-letter ids of ROWS; `reason` where a verdict is a reject."""
    found = {}
    for key, said in verdicts.items():
        verdict, _, reason = (said or "").partition(" ")
        found[key] = replace(Decision("0" * 64, verdict or None, reason), caption=None)
    return found


def outcomes(decisions: dict[str, Decision]) -> dict[str, str]:
    return {row["id"]: f"{row['outcome']} {row['reason']}".strip() for row in select(ROWS, FILES, RULES, decisions)}


def test_a_persons_reject_says_why_and_frees_the_place_of_its_duplicate() -> None:
    found = outcomes(people(a="reject odd hands", e="reject blurred"))
    assert found["a"] == "rejected human: odd hands"
    assert found["b"] == "kept"  # it was the near duplicate of a
    assert found["e"] == "rejected human: blurred" and found["f"] == "kept"
    assert funnel_of(ROWS, FILES, RULES, people(a="reject odd", e="reject x"))["reasons"]["rejected: human"] == 2


def test_a_persons_keep_lifts_thresholds_and_near_duplicates_but_nothing_more() -> None:
    found = outcomes(people(b="keep", d="keep", f="keep", g="keep"))
    assert found["a"] == found["b"] == found["d"] == "kept"
    assert found["f"] == "kept" and found["e"] == "rejected exact duplicate"  # the person chose which of the two
    assert found["g"].startswith("dead")
    both = outcomes(people(e="keep", f="keep"))
    assert both["e"] == "kept" and both["f"] == "rejected exact duplicate"
    assert outcomes(people(g="reject x"))["g"].startswith("dead")


def test_blank_is_a_threshold_too_and_strangers_and_empty_decisions_change_nothing() -> None:
    assert outcomes(people(h="keep"))["h"] == "kept"
    assert outcomes(people(z="keep", a=None)) == outcomes({})


def test_real_pictures_without_words_or_size_need_a_person() -> None:
    """A person's keep lifts the size rule; no word of theirs but a caption can stand for a missing one."""
    small = {**entry("a", 0.9, "00000000000000ff"), "prompt": "a fox", "width_px": 30, "height_px": 90}
    mute = {**entry("b", 0.9, "ff00000000000000"), "prompt": "", "width_px": 90, "height_px": 90}
    files, rules = {"a": "1", "b": "2"}, SelectRecipe(min_clip=0.3, min_size_px=48)

    def reasons(**decisions: Decision) -> list[str]:
        return [row["reason"] for row in select([small, mute], files, rules, decisions)]

    assert reasons() == ["too small", "no caption"]
    assert reasons(a=Decision("0" * 64, "keep"), b=Decision("1" * 64, "keep")) == ["", "no caption"]
    assert reasons(b=Decision("1" * 64, caption="an owl")) == ["too small", ""]


def row_by_row(entries, pictures, recipe, wanted: set[str], refused: set[str]) -> dict[str, tuple[str, str]]:
    """The rules said plainly: each row, best first, against every kept one before it."""
    verdict: dict[str, tuple[str, str]] = {}
    candidates = []
    for row in entries:
        key = row["id"]
        if row["outcome"] == "dead":
            verdict[key] = ("dead", row["reason"])
        elif key in refused:
            verdict[key] = ("rejected", "human: x")
        elif key in wanted:
            candidates.append(row)
        elif row["outcome"] != "made":
            verdict[key] = (row["outcome"], row["reason"])
        elif row["clip_score"] < recipe.min_clip:
            verdict[key] = ("rejected", "clip below threshold")
        else:
            candidates.append(row)
    candidates.sort(key=lambda r: (-r["clip_score"], r["id"]))
    keeper: dict[str, str] = {}
    for row in sorted(candidates, key=lambda r: r["id"] not in wanted):
        keeper.setdefault(pictures[row["id"]], row["id"])
    kept: list[dict] = []
    for row in candidates:
        near = any(
            (int(row["phash"], 16) ^ int(k["phash"], 16)).bit_count() <= recipe.max_hamming_bits
            and max(abs(a - b) for a, b in zip(row["colours"], k["colours"], strict=True))
            <= recipe.max_colour_difference
            for k in kept
        )
        if keeper[pictures[row["id"]]] != row["id"]:
            verdict[row["id"]] = ("rejected", "exact duplicate")
        elif near and row["id"] not in wanted:
            verdict[row["id"]] = ("rejected", "near duplicate")
        else:
            verdict[row["id"]] = ("kept", "")
            kept.append(row)
    return verdict


@pytest.mark.parametrize("seed", range(8))
def test_the_fast_select_says_what_the_obvious_one_says(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [rng.getrandbits(64) for _ in range(12)]
    rows, files = [], {}
    for i in range(240):
        key = hashlib.sha256(b"%d" % i).hexdigest()
        drawing = rng.choice(kinds) ^ (rng.randrange(2) << rng.randrange(64)) ^ (rng.randrange(2) << rng.randrange(64))
        outcome = rng.choices(["made", "rejected", "dead"], [20, 2, 1])[0]
        reason = {"made": "", "rejected": "blank", "dead": f"render: no. {i}"}[outcome]
        score = rng.choice([0.1, 0.4, 0.5, rng.random()])
        rows.append(entry(key, score, f"{drawing:016x}", rng.choice([0, 3, 6, 9]), outcome, reason))
        files[key] = f"{rng.randrange(200)}"
    keys = [row["id"] for row in rows]
    wanted, refused = set(rng.sample(keys, 12)), set(rng.sample(keys, 12))
    said = {key: Decision(key, "keep") for key in wanted - refused}
    said |= {key: Decision(key, "reject", "x") for key in refused}
    rules = SelectRecipe(min_clip=0.3, max_hamming_bits=rng.choice([0, 2, 3, 5]), max_colour_difference=4)
    found = {row["id"]: (row["outcome"], row["reason"]) for row in select(rows, files, rules, said)}
    assert found == row_by_row(rows, files, rules, wanted - refused, refused)
    assert {"exact duplicate", "near duplicate", "clip below threshold"} <= {reason for _, reason in found.values()}


def test_the_one_that_stands_for_a_duplicate_is_named() -> None:
    found = {row["id"]: row["cluster"] for row in select(ROWS, FILES, RULES)}
    assert found == {"a": "a", "b": "a", "c": "", "d": "", "e": "e", "f": "e", "g": "", "h": ""}


def judged(count: int = 40) -> list[dict[str, Any]]:
    """Rows of two groups and two tones, no duplicates; a second score that runs against the first."""
    rng = random.Random(3)
    return [
        {
            **entry(f"{i:03d}", round(0.5 + i / 100, 3), f"{rng.getrandbits(64):016x}"),
            "group": "people" if i % 4 else "things",
            "attributes": json.dumps({"tone": "dark" if i % 10 == 0 else "light"}),
            "aesthetic": float(count - i),
        }
        for i in range(count)
    ]


def reasons_of(rows: list[dict], **rules: Any) -> dict[str, str]:
    files = {row["id"]: row["id"] for row in rows}
    return {row["id"]: row["reason"] for row in select(rows, files, SelectRecipe(**{"max_hamming_bits": 0, **rules}))}


def test_rules_for_any_stored_score() -> None:
    rows = judged()
    rows[7]["aesthetic"] = None
    found = reasons_of(rows, scores={"aesthetic": {"least": 10, "most": 35}})
    assert found["007"] == "aesthetic is missing"
    assert found["000"] == found["004"] == "aesthetic above threshold" and found["005"] == ""
    assert found["031"] == "aesthetic below threshold" and found["030"] == ""
    with pytest.raises(RecipeError, match=r"no score beauty.*aesthetic, clip_score"):
        reasons_of(rows, scores={"beauty": {"least": 1}})


def test_the_best_share_is_taken_in_each_group_apart() -> None:
    found = reasons_of(judged(), scores={"clip_score": {"best_share": 0.5, "within": ["group"]}})
    kept = sorted(key for key, reason in found.items() if not reason)
    assert kept == sorted(
        [f"{i:03d}" for i in range(20, 40) if i % 4 == 0] + [f"{i:03d}" for i in range(40) if i % 4][-15:]
    )
    overall = reasons_of(judged(), scores={"clip_score": {"best_share": 0.5}})
    assert sorted(key for key, reason in overall.items() if not reason) == [f"{i:03d}" for i in range(20, 40)]


def test_the_best_by_another_score() -> None:
    found = reasons_of(judged(), rank_by="aesthetic", best=3)
    assert [key for key, reason in found.items() if not reason] == ["000", "001", "002"]
    assert found["003"] == "not among the best 3"


def test_caps_leave_the_best_of_each_combination_and_all_that_people_want() -> None:
    rows = judged()
    found = reasons_of(rows, caps=[{"attributes": ["group", "tone"], "most": 2}])
    kept = sorted(key for key, reason in found.items() if not reason)
    assert kept == ["000", "010", "020", "030", "032", "036", "038", "039"]
    assert found["001"] == "over the cap: people, light"
    files = {row["id"]: row["id"] for row in rows}
    rules = SelectRecipe(max_hamming_bits=0, caps=[{"attributes": ["tone"], "most_times": 1.5}])
    lifted = {r["id"]: r["reason"] for r in select(rows, files, rules, {"001": Decision("0" * 64, "keep")})}
    light = [k for k, reason in lifted.items() if not reason and int(k) % 10]
    assert len(light) == 6 and "001" in light, "1.5 times the four dark ones, the person's choice among them"


@pytest.mark.parametrize("cap", [{"most": 5}, {"most_times": 1.0}])
def test_a_cap_leaves_out_no_sample_that_lacks_the_attribute(cap: dict[str, Any]) -> None:
    """Rows 0 to 5 are women, 6 to 17 men, the twelve scenes have no gender; then a third of the men lose their tone."""
    rows = judged(30)
    for i, row in enumerate(rows):
        row["group"] = "people" if i < 18 else "scenes"
        row["attributes"] = json.dumps({"gender": "woman" if i < 6 else "man", "tone": "dark"} if i < 18 else {})
    found = reasons_of(rows, caps=[{"attributes": ["gender"], **cap}])
    most = cap.get("most", 6)
    assert sorted(key for key, reason in found.items() if not reason) == sorted(
        [f"{i:03d}" for i in (*range(6 - most, 6), *range(18 - most, 18), *range(18, 30))]
    )
    for row in rows[6:10]:
        row["attributes"] = json.dumps({"gender": "man"})
    found = reasons_of(rows, caps=[{"attributes": ["gender", "tone"], **cap}])
    assert not any(found[f"{i:03d}"] for i in (*range(6, 10), *range(18, 30)))
    for i in range(4):  # fewer without the attribute than of any combination: they are not the rarest one
        rows[i]["attributes"] = json.dumps({"gender": "man", "tone": "dark"})
    found = reasons_of(rows[:19], caps=[{"attributes": ["gender"], "most_times": 2}])
    assert sum(not reason for reason in found.values()) == 2 + 4 + 1


def test_people_can_be_left_out_or_alone_be_heard() -> None:
    said = people(d="keep", a="reject odd")
    ignored = select(ROWS, FILES, RULES.model_copy(update={"people": "ignore"}), said)
    assert ignored == select(ROWS, FILES, RULES)
    alone = {row["id"]: row["reason"] for row in select(ROWS, FILES, RULES.model_copy(update={"people": "only"}), said)}
    assert [key for key, reason in alone.items() if not reason] == ["d"] and alone["e"] == "not kept by a person"


def test_the_summary_shows_balance_and_what_lacks() -> None:
    rows = judged()
    rules = SelectRecipe(max_hamming_bits=0, min_clip=0.7, wanted=[{"attributes": ["tone"], "least": 5}])
    columns = columns_of(rows, {row["id"]: row["id"] for row in rows})
    summary = summarise(columns, select_columns(columns, rules), rules)
    assert summary["balance"]["tone"]["values"] == {"light": [36, 18], "dark": [4, 2]}
    assert summary["balance"]["tone"]["evenness_kept"] == round(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1)) / np.log(2), 4)
    assert summary["lacking"] == [
        {"group": "people", "attributes": {"tone": "dark"}, "lacking": 4, "plan": 8},
        {"group": "things", "attributes": {"tone": "dark"}, "lacking": 4, "plan": 8},
        {"group": "things", "attributes": {"tone": "light"}, "lacking": 1, "plan": 2},
    ]


def test_what_is_all_of_one_kind_has_an_evenness_of_0_without_a_minus() -> None:
    assert str(audit(Attributes(columns_of(judged(), {})), np.array([0]))["tone"]["evenness_kept"]) == "0.0"


def scored(better: str | None) -> Columns:
    """Ten pictures; `nsfw` of the first is 0.0, of the last 0.9, and its scorer says which way is better."""
    rows = [{**entry(f"{i:064x}", 0.5, f"{i * 0x0101010101010101:016x}"), "nsfw": i / 10} for i in range(10)]
    columns = columns_of(rows, {row["id"]: row["id"] for row in rows})
    return replace(columns, lower_is_better=frozenset({"nsfw"} if better == "lower" else ()))


@pytest.mark.parametrize("better", ["lower", "higher", None])
def test_the_best_share_and_the_best_go_by_the_scorer_s_own_direction(better: str | None) -> None:
    columns, low = scored(better), better == "lower"
    rules = SelectRecipe.model_validate({"max_hamming_bits": None, "scores": {"nsfw": {"best_share": 0.8}}})
    found = [row["reason"] for row in select_columns(columns, rules).table().to_pylist()]
    fallen = f"nsfw among the {'highest' if low else 'lowest'}"
    assert found == ([""] * 8 + [fallen] * 2 if low else [fallen] * 2 + [""] * 8)
    rules = SelectRecipe(max_hamming_bits=None, rank_by="nsfw", best=1)
    kept = select_columns(columns, rules).kept
    assert np.flatnonzero(kept).tolist() == [0 if low else 9]


def test_the_direction_comes_from_the_ledger_s_own_column() -> None:
    columns = {name: ["x"] for name in ("outcome", "reason", "group", "attributes", "made_sha256")}
    table = pa.table({**columns, "id": ["a"], "has_text": [True], "has_raw_text": [False], "edge_px": [9]})
    table = table.append_column("hash", pa.array([1], pa.uint64())).append_column(
        "colours", pa.array([bytes(12)], pa.binary(12))
    )
    for better in ("lower", "higher"):
        field = pa.field("nsfw", pa.float64(), metadata={"better": better})
        found = to_columns(table.append_column(field, pa.array([0.5])))
        assert found.lower_is_better == ({"nsfw"} if better == "lower" else set())


def test_null_switches_each_level_of_duplicates_off() -> None:
    rows = [
        entry("a", 0.9, "00000000000000ff"),
        entry("b", 0.8, "00000000000000ff"),  # the same hash, another file
        entry("c", 0.7, "ff00ff00ff00ff00"),
        entry("d", 0.6, "ff00ff00ff00ff00"),  # the very file of c
    ]
    files = {"a": "1", "b": "2", "c": "3", "d": "3"}

    def reasons(**rules: Any) -> dict[str, str]:
        return {row["id"]: row["reason"] for row in select(rows, files, SelectRecipe(**rules)) if row["reason"]}

    assert reasons() == {"b": "near duplicate", "d": "exact duplicate"}
    assert reasons(max_hamming_bits=0) == {"b": "near duplicate", "d": "exact duplicate"}
    assert reasons(max_hamming_bits=None) == {"d": "exact duplicate"}
    assert reasons(same_file=None) == {"b": "near duplicate", "d": "near duplicate"}
    assert reasons(same_file=None, max_hamming_bits=None, same_meaning=None) == {}
    assert reasons(same_file=False, max_hamming_bits=None) == {}
    told = SelectRecipe.model_fields["same_file"].description or ""
    assert "max_hamming_bits" in told and "same_meaning" in told, "which also take copies for one"
