"""Out of memory halves the batch and goes on; any other error does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.errors import StageError
from factory.models.image import Painter
from factory.models.memory import BatchSize, is_out_of_memory
from factory.recipe import DiffusersTeacher


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(error: Exception) -> None:
    seen, size = list[int](), BatchSize(8, "key")

    def run(part: list[int]) -> list[int]:
        seen.append(len(part))
        if len(part) > 2:
            raise error
        return [2 * one for one in part]

    assert size.map(list(range(5)), run) == [0, 2, 4, 6, 8]
    assert seen == [8, 4, 2, 2, 2]
    assert size.map([7], run) == [14] and seen[-1] == 2


def test_what_does_not_fit_alone_stops_the_run_with_its_key() -> None:
    def run(part: list[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(StageError, match=r"the\.key: not even one picture fits"):
        BatchSize(4, "the.key").map([1, 2], run)


def test_other_errors_pass() -> None:
    def run(part: list[int]) -> list[int]:
        raise RuntimeError("sizes do not fit")

    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="sizes do not fit"):
        BatchSize(4, "key").map([1, 2], run)


def test_a_teacher_short_of_memory_draws_every_picture(tiny_models, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter(DiffusersTeacher(model=str(tiny_models / "teacher"), steps=2, size_px=32, batch_images=4))
    prompts, seeds = ["a fox", "a key", "an owl"], [1, 2, 3]
    whole, forward = painter.paint(prompts, seeds), painter.pipeline.unet.forward

    def scarce(sample: torch.Tensor, *args: object, **keys: object) -> object:
        if len(sample) > 4:  # with guidance, two for each picture
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **keys)

    monkeypatch.setattr(painter.pipeline.unet, "forward", scarce)
    halved = painter.paint(prompts, seeds)
    assert painter.batch.now == 2
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(whole, halved, strict=True)) <= 1
