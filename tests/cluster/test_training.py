"""What Ray says of a training that ended, in words of ours; and a training that is out of memory is not tried again."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.exceptions
from ray.train import WorkerGroupError

from cluster.errors import CorruptShard, OutOfMemory, StageError
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, stop_ray
from cluster.training import launch, note_error, own_error, repeat_error


def failed(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("some lines\nof a traceback", dict(enumerate(failures)))


def test_the_error_of_ours_is_told_whichever_worker_had_it() -> None:
    ours = CorruptShard("is damaged", where="shard", remedy="Mend it")
    assert own_error(failed(RuntimeError("connection closed by peer"), ours)) is ours
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = OutOfMemory("is full", where="trainer.adapt", remedy="Take less")
    collateral = StageError("the loss of adapt at step 3 is nan")
    assert own_error(failed(collateral, wrapped)) is wrapped.__cause__


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."),
        RuntimeError("Worker exit detail: the worker was killed as the node was running low on memory"),
    ],
)
def test_a_worker_that_ray_ended_for_memory(error: Exception) -> None:
    said = own_error(failed(error))
    assert "its node ran out of memory" in said.what
    for key in ("accumulation", "gradient_checkpointing", "trainer.sharding", "cluster.memory_gib"):
        assert key in said.remedy


def test_a_worker_that_died_without_a_word() -> None:
    said = own_error(failed(ray.exceptions.RayActorError()))
    assert "died without a word" in said.what and "Run the same command again" in said.remedy
    assert "accumulation" in said.remedy and "cluster.memory_gib" in said.remedy


def test_a_full_object_store_and_what_nobody_knows() -> None:
    assert "object store is full" in own_error(failed(ray.exceptions.ObjectStoreFullError("x"))).what
    assert own_error(failed(ValueError("a bug"))).what == "training failed: of a traceback"


def test_what_one_try_notes_the_next_repeats(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    repeat_error(path)
    note_error(path, OutOfMemory("is full", where="trainer.adapt", remedy="Take less"))
    with pytest.raises(OutOfMemory) as caught:
        repeat_error(path)
    assert (caught.value.what, caught.value.where, caught.value.remedy) == ("is full", "trainer.adapt", "Take less")


@pytest.mark.ray
@pytest.mark.long
def test_out_of_memory_is_not_tried_again(tmp_path: Path) -> None:
    def work() -> None:
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        raise OutOfMemory("is full", where="trainer.adapt", remedy="Take less")

    settings = {"runner": "ray", "cpus": 2, "train_workers": 1, "max_failures": 2}
    try:
        with pytest.raises(OutOfMemory, match=r"trainer\.adapt: is full\. Take less"):
            launch(work, build_recipe(ClusterRecipe, settings, "test"), tmp_path / "out", 1, use_gpu=False)
    finally:
        stop_ray()
    assert (tmp_path / "tries").read_text() == "x"
    assert not list((tmp_path / "out").glob("out-of-memory-*"))
