"""What stages say of themselves while they work: by hand with a clock of our own, and the same from both runners."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.live import Flow
from cluster.live_ray import RayDesk
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, InProcess, OnRay, Runner
from cluster.stage import DEAD, PENDING, Row, Stage, Unit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_and_queues_by_hand() -> None:
    clock = Clock()
    flow = Flow([("render", 2), ("score", 1)], clock)
    assert [row["per_s"] for row in flow.read()] == [None, None]
    # Two workers render units of 8 in 4 s each, one after the other by 2 s; the scorer takes 1 s.
    for number in range(6):
        flow.begin("render", f"u{number}", 8)
        clock.now += 2
        flow.end("render", f"u{number}", 8, 4.0)
    render, score = flow.read()
    assert (render["per_s"], render["busy"], render["samples"], render["working"]) == (4.0, 1.0, 48, 0)
    assert (score["per_s"], score["waiting"], score["working"]) == (None, 48, 0)
    for number in range(3):
        flow.begin("score", f"u{number}", 8)
        clock.now += 1
        flow.end("score", f"u{number}", 8, 0.5)
    flow.begin("score", "u3", 8)
    _, score = flow.read()
    assert (score["per_s"], score["busy"], score["waiting"], score["working"]) == (8.0, 0.5, 16, 8)
    clock.now += 100
    assert flow.read()[0]["per_s"] < 1, "nothing came for long, so the rate falls"


def test_workers_that_end_together_are_no_faster_for_it() -> None:
    clock = Clock()
    flow = Flow([("render", 2)], clock)
    told: list[tuple[float, float | None]] = []
    # Two workers begin together and render units of 64 in 64 s each; the second one ends 4 s after the first.
    for number in range(8):
        clock.now = 64.0 * (number // 2 + 1) + 4 * (number % 2)
        flow.end("render", f"u{number}", 64, 64.0)
        told.append((flow.read()[0]["per_s"], flow.read()[0]["busy"]))
    assert told[:2] == [(1.0, None), (round(128 / 68, 3), None)], "the time since it began to work"
    assert told[2:] == [(2.0, 1.0)] * 6


def test_the_rate_of_many_workers_is_that_of_whole_rounds() -> None:
    clock = Clock()
    flow = Flow([("render", 100)], clock)
    for number in range(600):
        clock.now = 50.0 * (number // 100 + 1)
        flow.end("render", f"u{number}", 1, 50.0)
    assert (flow.read()[0]["per_s"], flow.read()[0]["busy"]) == (2.0, 1.0)


def test_a_unit_that_is_done_again_is_in_one_place() -> None:
    flow = Flow([("render", 2), ("score", 1)])
    flow.begin("render", "u", 4)
    flow.begin("render", "u", 4)  # its first worker died
    flow.end("render", "u", 4, 1.0)
    flow.begin("score", "u", 4)
    flow.end("render", "u", 4, 1.0)  # it lives after all
    assert [(row["working"], row["waiting"]) for row in flow.read()] == [(0, None), (4, 0)]
    flow.end("score", "u", 4, 1.0)
    flow.begin("score", "u", 4)  # and so does a scorer
    assert [(row["working"], row["waiting"]) for row in flow.read()] == [(0, None), (0, 0)]


def test_words_that_overtake_one_another_leave_no_unit_behind() -> None:
    flow = Flow([("render", 1), ("score", 1)])
    flow.told("worker", [("score", "u", 4, None, 0.0), ("score", "u", 4, 0.1, 0.0)])
    flow.told("worker", [("render", "u", 4, None, 0.3), ("render", "u", 4, 0.1, 0.2)])
    flow.told("worker", [("score", "v", 4, None, 0.0)])
    flow.told("worker", [("render", "v", 4, None, 0.3), ("render", "v", 4, 0.1, 0.2)])
    render, score = flow.read()
    assert (render["working"], score["waiting"], score["working"]) == (0, 0, 4), "v is with the scorer, u is out"
    assert (render["samples"], score["samples"]) == (8, 4)


class Actor:
    """Stands for the handle of a Ray actor: `told.remote(...)`."""

    def __init__(self) -> None:
        self.messages: list[list[tuple[object, ...]]] = []
        self.told = self

    def remote(self, worker: str, words: list[tuple[object, ...]]) -> None:
        self.messages.append(words)


def test_the_words_of_small_units_go_together_and_the_last_is_not_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, actor = RayDesk("flow"), Actor()
    monkeypatch.setattr(desk, "_found", lambda: actor)
    for number in range(100):
        desk.begin("render", f"u{number}", 1)
        desk.end("render", f"u{number}", 1, 0.0)
    desk.begin("render", "long", 1)
    end = time.monotonic() + 10
    while sum(map(len, actor.messages)) < 201 and time.monotonic() < end:
        time.sleep(0.01)  # nothing more is said, as if the worker were busy with `long`
    told = [word for words in actor.messages for word in words]
    assert [word[1] for word in told][-1] == "long" and len(told) == 201
    assert len(actor.messages) < 20 and all(word[4] >= 0 for word in told)


def units(count: int) -> list[Unit]:
    return [
        Unit(f"u{u}", [{"id": f"{u}-{i}", "outcome": DEAD if i == 3 else PENDING, "reason": ""} for i in range(4)])
        for u in range(count)
    ]


def stages() -> list[Stage]:
    def slow(rows: list[Row]) -> list[Row]:
        time.sleep(0.02)
        return rows

    return [
        Stage("draw", lambda: slow, workers=2, cpus=0.5),
        Stage("commit", lambda: slow, cpus=0.5, whole=True),
    ]


def seen(runner: Runner) -> list[dict[str, object]]:
    """What is told when the last of twelve units comes out."""
    assert runner.live() == []
    for number, _ in enumerate(runner.run(stages(), units(12)), 1):
        # What is told to an actor is not waited for.
        end = time.monotonic() + 10
        while number == 12 and time.monotonic() < end:
            found = runner.live()
            if found[-1]["samples"] == 48:
                return found
    raise AssertionError("the last unit was never told of")


@pytest.mark.ray
def test_ray_hands_out_a_unit_before_the_next_one_is_done(tmp_path: Path) -> None:
    def patient(rows: list[Row]) -> list[Row]:
        """Either unit may come first: Ray promises no order."""
        try:
            (tmp_path / "first").touch(exist_ok=False)
            return rows
        except FileExistsError:
            end = time.monotonic() + 60
        while not (tmp_path / "got").exists():
            if time.monotonic() > end:
                raise ValueError("the unit before was kept back")
            time.sleep(0.02)
        return rows

    ray = OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "test"))
    try:
        for unit in ray.run([Stage("draw", lambda: patient)], units(2)):
            (tmp_path / "got").touch()
            assert not [row for row in unit.rows if "kept back" in row["reason"]]
    finally:
        ray.close()


@pytest.mark.ray
def test_both_runners_tell_the_same_fields() -> None:
    ray = OnRay(build_recipe(ClusterRecipe, {"cpus": 2}, "test"))
    try:
        there = seen(ray)
    finally:
        ray.close()
    here = seen(InProcess())
    for rows in (here, there):
        assert [row["stage"] for row in rows] == ["draw", "commit"]
        # The dead row is no work of the first stage; the last takes units whole.
        assert [row["samples"] for row in rows] == [36, 48]
        assert [row["waiting"] for row in rows] == [None, 0] and [row["working"] for row in rows] == [0, 0]
        assert all(row["per_s"] and row["busy"] and row["seconds"] for row in rows)
    assert [row["workers"] for row in here] == [1, 1] and [row["workers"] for row in there] == [2, 1]
    assert [list(row) for row in here] == [list(row) for row in there]
