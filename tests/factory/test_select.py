import random

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
