"""A training without enough memory ends in the keys that take less, and goes on when they are set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trainer.loop as loop
from chain import what_is_made
from cluster.errors import OutOfMemory
from trainer.checkpoints import newest_checkpoint
from trainer.memory import explain_decoder, explain_training, explains_memory
from trainer.recipe import DecoderRecipe, TrainerRecipe
from trainer.state import read_log

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.05 GiB is free. "
    "Including non-PyTorch memory, this process has 22.58 GiB memory in use. Of the allocated memory 21.99 GiB is allocated by PyTorch."
)


def recipe(models: Path, **changes: object) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 3, "checkpoint_s": 1e-9}
    tree = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1, "adapt": phase, "distill": phase}
    return TrainerRecipe.model_validate(tree | changes)


def test_a_training_out_of_memory_names_the_keys_and_goes_on_with_them(
    tiny_models, data, tmp_path, monkeypatch
) -> None:
    settings = recipe(tiny_models)
    run_out = {"adapt": 2, "distill": None}
    whole = loop.read_batch

    def short_of_memory(stream, encoder, step, batch, share):
        # What fits: two pictures at once.
        if step == run_out["adapt"] and share.stop - share.start > 2:
            raise torch.OutOfMemoryError(CUDA)
        return whole(stream, encoder, step, batch, share)

    monkeypatch.setattr(loop, "read_batch", short_of_memory)
    with pytest.raises(OutOfMemory) as caught:
        loop.train(settings, data=data, folder=tmp_path, seed=1)
    said = str(caught.value)
    assert said.startswith("trainer.adapt: ") and "in adapt with 4 images a batch in 1 part" in said
    assert "Tried to allocate 2.00 GiB" in said and "Of the allocated memory" not in said
    for key in ("trainer.adapt.accumulation", "trainer.gradient_checkpointing=true", "trainer.sharding=student"):
        assert key in caught.value.remedy
    assert "cluster.memory_gib" in caught.value.remedy and caught.value.exit_code == 3

    smaller = settings.model_copy(
        update={"adapt": settings.adapt.model_copy(update={"accumulation": 2}), "gradient_checkpointing": True}
    )
    assert newest_checkpoint(tmp_path / "adapt")[0] is not None
    loop.train(smaller, data, tmp_path, seed=1)  # on from the checkpoint of another accumulation
    assert [row["step"] for row in read_log(tmp_path / "adapt" / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "distill" / "unet").exists()


def test_a_run_takes_what_needs_less_memory_and_nothing_else() -> None:
    tree = {"trainer": {"size_px": 64, "sharding": "none", "adapt": {"accumulation": 1, "steps": 5}}}
    less = {"trainer": {"size_px": 64, "sharding": "all", "adapt": {"accumulation": 4, "steps": 5}}}
    other = {"trainer": {"size_px": 64, "sharding": "none", "adapt": {"accumulation": 1, "steps": 6}}}
    assert what_is_made(tree, True) == what_is_made(less, True) != what_is_made(other, True)


def test_what_is_set_already_is_not_proposed(tmp_path) -> None:
    phase = {"batch_images": 4, "accumulation": 4, "learning_rate": 1e-3, "steps": 3, "optimiser": "adamw-8bit"}
    tree = {"teacher": "m", "size_px": 32, "gradient_checkpointing": True, "teacher_dtype": "bfloat16"}
    settings = TrainerRecipe.model_validate(tree | {"adapt": phase | {"steps": 0}, "distill": phase})
    error = explain_training(MemoryError(), settings, None, tmp_path)
    assert error.where == "trainer.distill" and "in 4 parts (MemoryError)" in error.what
    for absent in ("accumulation", "gradient_checkpointing", "8bit", "teacher_dtype"):
        assert absent not in error.remedy
    assert "trainer.sharding=student" in error.remedy and "a smaller trainer.size_px" in error.remedy


def test_the_decoder_says_its_own_keys_and_other_errors_pass() -> None:
    @explains_memory(explain_decoder)
    def work(_recipe: DecoderRecipe, error: Exception) -> None:
        raise error

    settings = DecoderRecipe(data="d")
    with pytest.raises(OutOfMemory, match=r"16 images a batch \(CUDA out of memory.*Raise fit\.accumulation"):
        work(settings, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        work(settings, RuntimeError("shapes do not match"))
