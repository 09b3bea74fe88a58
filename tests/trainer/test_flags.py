"""What a trainer knows from diffusers' script: schedules, Adam's numbers, empty prompts, mirrored pictures, TF32; and what the log tells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from pydantic import ValidationError

import trainer.loop as loop
import trainer.use as use
from cluster.errors import RecipeError
from cluster.runner import InProcess
from tests.trainer.test_fit import points, train
from trainer.distill import Distillation
from trainer.draws import read_batch
from trainer.encode import encode
from trainer.latents import Encoder
from trainer.mix import MixedStream, as_sources
from trainer.models import open_pipeline, student_for
from trainer.optimise import new_optimiser, rate_at
from trainer.recipe import DistillRecipe, EncodeRecipe, PhaseRecipe, TrainerRecipe
from trainer.state import METRICS, read_log
from trainer.surgery import build_student


def phase(**changes: Any) -> PhaseRecipe:
    return PhaseRecipe.model_validate({"steps": 60, "batch_images": 4, "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine-with-restarts", "polynomial"])
def test_a_schedule_is_diffusers_own_step_by_step(name) -> None:
    settings = phase(schedule=name, warmup_steps=7, schedule_cycles=3, schedule_power=2.0)
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name.replace("-", "_"), optimiser, None, 7, 60, num_cycles=3, power=2.0)
    ours = rate_at(settings)
    for step in range(60):
        assert ours(step) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimiser.step()
        theirs.step()


def test_left_out_the_rates_are_what_they_always_were() -> None:
    for settings in (phase(), phase(warmup_steps=5), phase(warmup_steps=5, cosine=True)):
        for step in range(60):
            rate = 1e-3 * min(1.0, (step + 1) / max(1, settings.warmup_steps))
            if settings.cosine:
                rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / 60))
            assert rate_at(settings)(step) == rate


def test_adams_numbers_reach_the_optimiser() -> None:
    for changes, betas, epsilon in (
        ({}, (0.9, 0.99), 1e-8),
        ({"adam_beta1": 0.8, "adam_beta2": 0.999, "adam_epsilon": 1e-6}, (0.8, 0.999), 1e-6),
    ):
        groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
        found = new_optimiser(phase(**changes), groups, torch.device("cpu")).param_groups[0]
        assert found["betas"] == betas and found["eps"] == epsilon


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"cosine": True, "schedule": "linear"}, "two ways for one learning rate"),
        ({"schedule": "polynomial", "learning_rate": 1e-8}, "must lie above it"),
        ({"schedule": "linear", "warmup_steps": 60}, "leaves schedule linear none of 60 steps"),
        ({"adam_beta2": 1.0}, "less than 1"),
    ],
)
def test_rates_that_make_no_sense_are_refused(changes, word) -> None:
    with pytest.raises(ValidationError, match=word):
        phase(**changes)


def test_the_log_tells_rate_gradient_and_memory_and_no_gpu_where_there_is_none(tmp_path) -> None:
    model = train(tmp_path / "whole", schedule="linear")
    rows = read_log(tmp_path / "whole" / METRICS)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * (60 - i) / 60 for i in range(60)], rel=1e-5)
    assert all(row["grad_norm"] > 0 and row["memory_gib"] > 0 and "gpu_percent" not in row for row in rows)
    tags = {tag for tag, _, _ in points(tmp_path / "whole")}
    assert {"loss", "learning_rate", "grad_norm", "memory_gib", "images_per_s"} <= tags and "gpu_percent" not in tags
    fell: list[int] = []

    def fall(draw: int, loss: torch.Tensor) -> torch.Tensor:
        if draw == 25 and not fell:
            fell.append(draw)
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", fall, schedule="linear")
    again = train(tmp_path / "broken", fall, schedule="linear")
    assert torch.equal(again.weight, model.weight)


def test_a_gpu_is_asked_and_one_that_does_not_answer_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 87)
    assert use.machine_use() == {"memory_gib": 3.0, "gpu_percent": 87.0}

    def no_library() -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", no_library)
    use._say_once.cache_clear()
    assert use.machine_use() == use.machine_use() == {"memory_gib": 3.0}
    assert caplog.text.count("pip install 'edgefusion[gpu]'") == 1


def recipe(models: Path, adapt: dict, distill: dict, **changes: Any) -> TrainerRecipe:
    common = {"batch_images": 4, "learning_rate": 1e-3, "steps": 1}
    tree = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1}
    return TrainerRecipe.model_validate(tree | {"adapt": common | adapt, "distill": common | distill} | changes)


@pytest.fixture
def precision() -> Iterator[None]:
    """What TF32 sets is the process's."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_the_parts_of_phase_1_are_logged_and_weighed_and_tf32_is_set(tiny_models, data, tmp_path, precision) -> None:
    weights = {"task_weight": 0.25, "output_weight": 2.0, "feature_weight": 0.5}
    loop.train(recipe(tiny_models, weights, {"steps": 0}), data, tmp_path / "plain", seed=1)
    assert not torch.backends.cuda.matmul.allow_tf32
    loop.train(recipe(tiny_models, weights, {"steps": 0}, tf32=True), data, tmp_path / "tf32", seed=1)
    assert torch.backends.cuda.matmul.allow_tf32
    (row,) = read_log(tmp_path / "plain" / "adapt" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(0.25 * row["task"] + 2 * row["output"] + 0.5 * row["features"], rel=1e-4)
    assert {"task", "output", "features"} <= {tag for tag, _, _ in points(tmp_path / "plain" / "adapt")}


def test_phase_2_trains_some_without_their_prompt_the_same_for_any_workers(
    tiny_models, data, tmp_path, monkeypatch
) -> None:
    settings = DistillRecipe(steps=1, batch_images=400, learning_rate=1e-3, empty_prompt_share=0.25)
    schedule: Any = SimpleNamespace(alpha=range(1000))
    none: Any = None
    loss = Distillation(settings, none, none, none, schedule, seed=1)
    whole = loss._emptied(3, slice(0, 400))
    assert whole is not None and 60 < sum(whole) < 140 and whole != loss._emptied(4, slice(0, 400))
    assert whole == [*(loss._emptied(3, slice(0, 150)) or []), *(loss._emptied(3, slice(150, 400)) or [])]

    asked: list[list[bool] | None] = []
    texts_of = Encoder.texts_of

    def note(self: Encoder, examples: list[Any], empty: list[bool] | None = None) -> torch.Tensor:
        asked.append(empty)
        return texts_of(self, examples, empty)

    monkeypatch.setattr(Encoder, "texts_of", note)
    for share in (0.0, 0.999):
        loop.train(
            recipe(tiny_models, {"steps": 0}, {"empty_prompt_share": share}), data, tmp_path / str(share), seed=1
        )
    assert asked == [None, None, [True] * 4, [True] * 4]  # each looks at one step more than it learns from


def test_mirrored_pictures_are_drawn_by_the_step_alone_and_kept_apart(tiny_models, data) -> None:
    pipeline, device = open_pipeline(str(tiny_models / "teacher")), torch.device("cpu")
    stream = MixedStream(as_sources(data), seed=1)
    plain, turned = (Encoder(pipeline, 32, device, cache=True, flip_seed=seed) for seed in (None, 1))
    straight, examples = read_batch(stream, plain, 0, 12, slice(0, 12))
    mirror = plain.latents(examples, [True] * 12)
    mixed, _ = read_batch(stream, turned, 0, 12, slice(0, 12))
    which = [not torch.allclose(m, s, atol=1e-5) for m, s in zip(mixed, straight, strict=True)]
    assert 0 < sum(which) < 12
    for row, is_mirror in enumerate(which):
        torch.testing.assert_close(mixed[row], (mirror if is_mirror else straight)[row], rtol=1e-4, atol=1e-5)
    halves = torch.cat([read_batch(stream, turned, 0, 12, part)[0] for part in (slice(0, 5), slice(5, 12))])
    torch.testing.assert_close(halves, mixed, rtol=1e-4, atol=1e-5)
    stream.close()


def test_encodings_cannot_be_mirrored(tiny_models, data, tmp_path) -> None:
    import shutil

    own = shutil.copytree(data, tmp_path / "own")
    teacher = str(tiny_models / "teacher")
    encode(EncodeRecipe(data=str(own), teacher=teacher, size_px=32, threads=1), InProcess())
    settings = recipe(tiny_models, {}, {"steps": 0}, random_flip=True)
    with pytest.raises(RecipeError, match=r"trainer\.random_flip: .*encodings=ignore"):
        loop.train(settings, own, tmp_path / "out", seed=1)
    loop.train(settings.model_copy(update={"encodings": "ignore"}), own, tmp_path / "out", seed=1)
    assert (tmp_path / "out" / "adapt" / "unet").exists()


def test_a_bk_sdm_folder_is_where_the_student_starts(tiny_models, tmp_path) -> None:
    pipeline = open_pipeline(str(tiny_models / "teacher"))
    student = build_student(pipeline.unet, "tiny").float()
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.5)
    student.save_pretrained(tmp_path / "unet")
    other = open_pipeline(str(tiny_models / "teacher"))
    other.unet = student
    other.save_pretrained(tmp_path / "pipeline")  # as nota-ai/bk-sdm-tiny is laid out
    for name in ("unet", "pipeline"):
        settings = recipe(tiny_models, {}, {}, start=str(tmp_path / name))
        found = student_for("adapt", settings, pipeline, tmp_path / "none")
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), student.parameters(), strict=True))
        assert all(weight.requires_grad for weight in found.parameters())
