import random
from dataclasses import replace

from factory.decisions import Decision
from factory.recipe import SelectRecipe
from factory.select import funnel, select


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
    counts = funnel(select(ROWS, FILES, RULES))
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
    assert funnel(select(ROWS, FILES, RULES, people(a="reject odd", e="reject x")))["reasons"]["rejected: human"] == 2


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
