import hashlib

import pytest

from cluster.errors import RecipeError, StageError
from cluster.runner import ClusterRecipe, InProcess
from cluster.stage import DEAD, PENDING, Stage, Unit, apply, gpus_granted


def unit(*values: int) -> Unit:
    return Unit("u", [{"id": str(v), "value": v, "outcome": PENDING, "reason": ""} for v in values])


def double(rows):
    if any(row["value"] < 0 for row in rows):
        raise ValueError("negative")
    return [{**row, "doubled": row["value"] * 2} for row in rows]


def test_a_bad_row_dies_alone_and_says_why() -> None:
    done = apply(Stage("double", lambda: double), double, unit(1, 2, -3, 4, 5))
    assert [row["doubled"] for row in done.rows] == [2, 4, None, 8, 10]
    assert [row["outcome"] for row in done.rows] == [PENDING, PENDING, DEAD, PENDING, PENDING]
    assert "double: ValueError: negative" in done.rows[2]["reason"]


def test_dead_rows_are_carried_but_not_worked_on() -> None:
    stage = Stage("double", lambda: double)
    again = apply(stage, double, apply(stage, double, unit(1, -2)))
    assert [row["outcome"] for row in again.rows] == [PENDING, DEAD]


def test_a_stage_that_loses_rows_is_refused() -> None:
    with pytest.raises(StageError, match="given 2 rows and returned 1"):
        apply(Stage("bad", lambda: double), lambda rows: rows[:1], unit(1, 2))


def test_a_full_disk_is_not_blamed_on_a_row() -> None:
    def full(_rows):
        raise OSError(28, "No space left on device")

    with pytest.raises(StageError, match="No space left"):
        apply(Stage("full", lambda: full), full, unit(1, 2))


def test_what_a_user_can_mend_is_not_blamed_on_a_row() -> None:
    def lacks(_rows):
        raise RecipeError("there is no model folder here")

    with pytest.raises(RecipeError, match="no model folder"):
        apply(Stage("render", lambda: lacks), lacks, unit(1, 2))


def test_a_unit_survives_arrow() -> None:
    before = unit(1, 2)
    assert Unit.from_bytes("u", before.to_bytes()) == before


def test_words_that_wait_are_small_and_pictures_are_left_as_they_are() -> None:
    words = Unit(
        "u",
        [
            {"id": hashlib.sha256(b"%d" % i).hexdigest(), "prompt": f"a flat picture of a boat, no. {i}"}
            for i in range(64)
        ],
    )
    pictures = Unit("u", [{"id": str(i), "picture": bytes(2**20)} for i in range(2)])
    assert len(words.to_bytes()) < sum(len(row["id"]) + len(row["prompt"]) for row in words.rows) / 1.8
    assert len(pictures.to_bytes()) > 2 * 2**20
    assert all(Unit.from_bytes("u", unit.to_bytes()) == unit for unit in (words, pictures))


def test_here_too_a_stage_gets_the_gpus_that_the_recipe_places() -> None:
    granted: list[float | None] = []

    def opened():
        granted.append(gpus_granted())
        return double

    stages = [Stage("render", opened, gpus=1), Stage("score", opened)]
    place = ClusterRecipe.model_validate({"stages": {"render": {"gpus": 0}, "score": {"gpus": 0.5}}}).placed
    assert len(list(InProcess(place=place).run(stages, [unit(1)]))) == 1
    assert granted == [0, 0.5] and gpus_granted() is None


def test_nothing_to_do_opens_nothing() -> None:
    def never():
        raise AssertionError("opened")

    assert list(InProcess().run([Stage("never", never)], [])) == []
