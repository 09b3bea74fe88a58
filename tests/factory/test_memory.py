"""Out of memory halves the batch and goes on; any other error does not. Which device, type and revision a model has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import StageError
from cluster.stage import Stage, gpus_granted, open_stage
from factory.models import pick_device
from factory.models.caption import open_captioner
from factory.models.clip import Clip
from factory.models.image import Painter
from factory.models.memory import BatchSize, is_out_of_memory
from factory.models.text import open_writer
from factory.provenance import mark_of
from factory.recipe import DiffusersTeacher, MakeRecipe, OpenClipScorer, TransformersCaptioner, TransformersWriter
from factory.stages import make_stages


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


def test_a_captioner_short_of_memory_describes_every_picture(tiny_models, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TransformersCaptioner(model=str(tiny_models / "captioner"), max_new_tokens=4, batch_pictures=4)
    captioner: Any = open_captioner(recipe)
    pictures = [np.full((32, 32, 3), 60 * i, np.uint8) for i in range(3)]
    whole, generate, seen = captioner.describe(pictures), captioner.model.generate, list[int]()

    def scarce(**keys: Any) -> Any:
        seen.append(len(keys["input_ids"]))
        if seen[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**keys)

    monkeypatch.setattr(captioner.model, "generate", scarce)
    assert captioner.describe(pictures) == whole and seen == [4, 2, 2]


def test_writer_and_captioner_compute_in_the_type_that_is_asked_for(tiny_models) -> None:
    captioner: Any = open_captioner(
        TransformersCaptioner(model=str(tiny_models / "captioner"), dtype="bfloat16", max_new_tokens=4)
    )
    assert captioner.model.dtype == torch.bfloat16
    assert len(captioner.describe([np.zeros((32, 32, 3), np.uint8)])) == 1
    writer: Any = open_writer(TransformersWriter(model=str(tiny_models / "writer"), dtype="bfloat16", max_new_tokens=4))
    assert writer.model.dtype == torch.bfloat16 and len(writer.write([{"subject": "fox"}], seed=1)) == 1


def test_a_revision_goes_to_the_hub_and_into_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[Any] = []

    def fetched(place: str, **keys: Any) -> Any:
        asked.append((place, keys["revision"]))
        raise OSError("no network here")

    for name in ("AutoTokenizer", "AutoProcessor"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fetched)
    pinned = {"model": "owner/model", "revision": "0123abc"}
    for open_it in (
        lambda: open_writer(TransformersWriter(**pinned)),
        lambda: open_captioner(TransformersCaptioner(**pinned)),
    ):
        with pytest.raises(StageError, match="cannot be opened: no network here"):
            open_it()
    assert asked == [("owner/model", "0123abc")] * 2
    assert mark_of(TransformersWriter(**pinned)) == "owner/model@0123abc"


def test_a_clip_of_the_hub_is_fetched_at_its_revision(tiny_models, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def fetched(place: str, **keys: Any) -> str:
        asked.append((place, keys["revision"]))
        return str(tiny_models / "clip")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    clip = Clip(OpenClipScorer(model="owner/clip", revision="0123abc"))
    assert clip.texts(["a fox"]).shape == (1, 16) and asked == [("owner/clip", "0123abc")]
    with pytest.raises(ValueError, match="revision pins a hub name"):
        OpenClipScorer(model="ViT-B-32", pretrained="openai", revision="0123abc")


@pytest.mark.parametrize(
    ("there", "gpus", "device"), [(True, 0.1, "cuda"), (True, 0, "cpu"), (True, None, "cuda"), (False, 1, "cpu")]
)
def test_a_gpu_is_used_where_it_was_granted(
    monkeypatch: pytest.MonkeyPatch, there: bool, gpus: float | None, device: str
) -> None:
    """Ray leaves GPUs visible to workers that were given none. Outside of a stage nobody grants, and what is there may be used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    found: list[str] = []
    if gpus is None:
        found.append(pick_device())
    else:
        open_stage(Stage("score", lambda: found.append(pick_device()) or (lambda rows: rows), gpus=gpus))
    assert found == [device] and pick_device("cpu") == "cpu"
    assert gpus_granted() is None, "only while it is opened"


def test_a_gpu_that_is_asked_for_and_not_there_is_a_plain_error(monkeypatch: pytest.MonkeyPatch, tiny_models) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match=r"factory\.plan\.writer\.device: a GPU is asked for, and PyTorch finds none"):
        open_writer(TransformersWriter(model=str(tiny_models / "writer"), device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(StageError, match=r"the stage was given none.*render_gpus"):
        open_stage(Stage("caption", lambda: pick_device("cuda", "factory.make.captioner.device")))  # pyright: ignore


def test_stages_ask_for_what_the_recipe_says(tmp_path) -> None:
    crops = {"scorer": {"model": "zoo:clip"}, "score_gpus": 0.25, "crop_gpus": 0.5, "render_gpus": 1}
    stages = make_stages(MakeRecipe.model_validate(crops), tmp_path)
    assert {stage.name: stage.gpus for stage in stages} == {"crop": 0.5, "score": 0.25, "commit": 0.0}
