"""A Ray that cannot be joined, and a stage without a place, end in plain words and at once."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import ray.exceptions

from cluster.connect import explain, knock, see_that_it_fits
from cluster.errors import RecipeError, StageError
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, OnRay, _stage_error, start_ray
from cluster.stage import PENDING, Stage, Unit


def recipe(**settings: object) -> ClusterRecipe:
    return build_recipe(ClusterRecipe, settings, "test")


def test_an_address_where_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(StageError, match=f"nothing answers at {address}"):
        start_ray(recipe(address=address))
    with pytest.raises(StageError, match=r"nothing answers at no-such-host\.invalid:6379"):
        start_ray(recipe(address="no-such-host.invalid:6379"))
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as there:
        knock(f"[::1]:{there.getsockname()[1]}")
    knock("auto")
    knock("ray://head:10001")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.59.0 Python: 3.12.1", "another version.*2.59.0"),
        ("InvalidAuthToken: bad", "refuses the token"),
        ("The current node timed out during startup.", "did not start in time"),
        ("first line\nsecond line", r"cannot be reached \(first line\)"),
    ],
)
def test_what_ray_says_in_words_of_ours(said: str, words: str) -> None:
    error = explain("local", Exception(said))
    assert error.remedy
    with pytest.raises(StageError, match=words):
        raise error


def test_what_hides_in_a_cause_is_told() -> None:
    error = ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379")
    error.__cause__ = RuntimeError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect")
    assert "refuses the token" in str(explain("192.0.2.1:6379", error))
    error.__cause__ = RuntimeError("RPC error: Deadline Exceeded\nmore")
    assert "(Failed to connect to Ray cluster at 192.0.2.1:6379: RPC error: Deadline Exceeded)" in str(
        explain("x", error)
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("OutOfDiskError", "object store is full"),
        ("ObjectStoreFullError", "object store is full"),
        ("OutOfMemoryError", "ran out of memory"),
    ],
)
def test_a_full_node_is_not_called_a_failed_worker(kind: str, words: str) -> None:
    inner: Exception = getattr(ray.exceptions, kind)("told by Ray")
    outer = ray.exceptions.RaySystemError("wrapped")
    outer.__cause__ = inner
    for error in (inner, outer, ray.exceptions.RaySystemError(f"ray.exceptions.{kind}: as text")):
        told = _stage_error(error)
        assert words in told.what and "same command then goes on" in told.remedy
    assert "a worker failed" in _stage_error(ray.exceptions.RaySystemError("something else")).what


@pytest.mark.ray
def test_a_stage_that_no_node_can_hold_ends_a_local_run() -> None:
    unit = Unit("unit-0", [{"id": "a", "outcome": PENDING, "reason": ""}])
    runner = OnRay(recipe(cpus=2))
    try:
        for stage, words in (
            (Stage("wide", lambda: list, cpus=3), "a worker of stage wide needs 3 CPU, and no node has that"),
            (Stage("render", lambda: list, gpus=64), "needs 1 CPU, 64 GPU"),
        ):
            with pytest.raises(StageError, match=words):
                list(runner.run([stage], [unit]))
    finally:
        runner.close()


def test_a_local_ray_has_slots_for_all_stages_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first stage took them all, and nothing was committed before it was through."""
    given: dict[str, object] = {}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", given.update)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    stages = [Stage("render", idle, 2, cpus=1), Stage("score", idle, 1, cpus=0.5), Stage("commit", idle, 1, cpus=0.1)]
    for settings, slots in (({}, 3), ({"cpus": 2}, 2)):
        start_ray(recipe(**settings), stages)
        assert given["num_cpus"] == slots
    start_ray(recipe(), [Stage("render", idle, 1, cpus=64), *stages[1:]])
    assert given["num_cpus"] == 2, "no worker as wide as that fits"


def test_stages_that_wait_for_each_other_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    render, score = Stage("render", idle, 2, cpus=1), Stage("score", idle, 1, cpus=0.5)
    see_that_it_fits([Stage("render", idle, 1, cpus=1), score], {}, local=True)
    assert not caplog.records
    see_that_it_fits([render, score], {}, local=True)
    assert "want 2.5 CPU slots at the same time, and Ray has 2" in caplog.text


def idle() -> Any:
    raise AssertionError("nobody opens it")


def test_a_recipe_with_a_password_is_refused_without_repeating_it() -> None:
    for url in ("s3://me:hunter2@bucket/x", "http://:hunter2@host/v1"):
        with pytest.raises(RecipeError, match="address holds a password") as caught:
            recipe(address=url)
        assert "hunter2" not in str(caught.value)
    assert recipe(address="ray://head:10001").address == "ray://head:10001"
