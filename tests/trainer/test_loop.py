"""What training promises: exact resume, the recipe's checks, and the full-size models of recipes/edgefusion.yaml."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import trainer.fit as fit
import trainer.loop as loop
from cluster.errors import CorruptShard, StageError
from cluster.recipe import load_recipe
from edgefusion import DEFAULT_RECIPE, Recipe
from factory.recipe import OpenClipScorer
from trainer.evaluate import write_samples
from trainer.features import Features, feature_names
from trainer.losses import NoiseSchedule, consistency_pair, feature_loss, pseudo_huber
from trainer.models import open_pipeline
from trainer.recipe import AdaptRecipe, DistillRecipe, TrainerRecipe
from trainer.sample import is_few_step, save_student
from trainer.surgery import build_student

SD15 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def recipe(models: Path, **changes: object) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 4, "checkpoint_s": 1e-9}
    return TrainerRecipe.model_validate(
        {
            "teacher": str(models / "teacher"),
            "size_px": 32,
            "threads": 1,
            "adapt": AdaptRecipe(**phase),
            "distill": DistillRecipe(**phase),
            **changes,
        }
    )


def weights(folder: Path) -> bytes:
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_interrupted_at_every_step_equals_undisturbed(tiny_models, data, tmp_path, monkeypatch) -> None:
    settings = recipe(tiny_models)
    loop.train(settings, data, tmp_path / "whole", seed=1)

    class Killed(Exception):
        pass

    def kill_after_save(*args: object) -> None:
        saved(*args)
        raise Killed

    saved = fit.save_state
    monkeypatch.setattr(fit, "save_state", kill_after_save)
    for _ in range(2 * 3):  # nothing is new to save before the first step of a phase
        with pytest.raises(Killed):
            loop.train(settings, data, tmp_path / "broken", seed=1)
    monkeypatch.setattr(fit, "save_state", saved)
    loop.train(settings, data, tmp_path / "broken", seed=1)
    for phase in loop.PHASES:
        assert weights(tmp_path / "broken" / phase) == weights(tmp_path / "whole" / phase)
    losses = [[row["loss"] for row in loop_log(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_teacher_keeps_no_features_once_phase_1_is_over(tiny_models, data, tmp_path, monkeypatch) -> None:
    """Else phase 2 would hold six of its feature maps from one pass to the next."""
    hooks: dict[str, int] = {}

    def look(phase: str, *rest: object) -> object:
        unet = next(one for one in seen if one is not None)
        hooks[phase] = sum(len(module._forward_hooks) for module in unet.modules())
        return whole(phase, *rest)

    seen: list = []
    whole, opened = loop.fit, loop.open_pipeline
    monkeypatch.setattr(loop, "fit", look)
    monkeypatch.setattr(loop, "open_pipeline", lambda *given: (found := opened(*given), seen.append(found.unet))[0])
    loop.train(recipe(tiny_models), data, tmp_path, seed=1)
    assert hooks["adapt"] > 0 and hooks["distill"] == 0


def loop_log(folder: Path) -> list[dict]:
    from trainer.state import read_log

    return read_log(folder / "distill" / "metrics.jsonl")


def test_training_lowers_the_loss_and_moves_every_tensor(tiny_models, data, tmp_path) -> None:
    longer = {"batch_images": 12, "learning_rate": 3e-3, "steps": 30, "ema_decay": 0.0}
    settings = recipe(
        tiny_models,
        adapt=AdaptRecipe(**longer, empty_prompt_share=0),
        distill={"steps": 0, "batch_images": 1, "learning_rate": 1},
    )
    loop.train(settings, data, tmp_path, seed=1)
    from trainer.state import read_log

    rows = [row["loss"] for row in read_log(tmp_path / "adapt" / "metrics.jsonl")]
    assert sum(rows[-5:]) < 0.8 * sum(rows[:5])
    before = build_student(loop.open_pipeline(settings.teacher).unet, "tiny").state_dict()
    after = UNet2DConditionModel.from_pretrained(tmp_path / "adapt" / "unet").state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_damaged_checkpoint_and_another_recipes_are_refused(tiny_models, data, tmp_path, monkeypatch) -> None:
    def stop(*args: object) -> None:
        saved(*args)
        raise KeyboardInterrupt

    saved = fit.save_state
    monkeypatch.setattr(fit, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe(tiny_models), data, tmp_path, seed=1)
    monkeypatch.setattr(fit, "save_state", saved)
    with pytest.raises(CorruptShard, match=r"another recipe.*trainer\.teacher_dtype: then"):
        loop.train(recipe(tiny_models, teacher_dtype="bfloat16"), data, tmp_path, seed=1)
    (state,) = (tmp_path / "adapt" / "checkpoints").glob("*/optimiser.pt")
    state.write_bytes(state.read_bytes()[:-5000])
    with pytest.raises(CorruptShard, match=r"step-00000001: optimiser\.pt is damaged"):
        loop.train(recipe(tiny_models), data, tmp_path, seed=1)


def test_moments_of_8_bits_belong_to_weights_that_lie_plainly(tiny_models, data, tmp_path, monkeypatch) -> None:
    """bitsandbytes walks weights and moments as flat memory, and a checkpoint keeps them plainly laid out."""
    plain: list[bool] = []

    def stand_in(settings, groups, device):
        plain.extend(tensor.is_contiguous() for group in groups for tensor in group["params"])
        return torch.optim.AdamW(groups, lr=settings.learning_rate)

    monkeypatch.setattr(fit, "new_optimiser", stand_in)
    once = {"batch_images": 4, "learning_rate": 1e-3, "steps": 1, "optimiser": "adamw-8bit"}
    loop.train(recipe(tiny_models, adapt=once, distill=once), data, tmp_path, seed=1)
    assert plain and all(plain)


def test_what_a_named_model_predicts_must_be_what_the_teacher_does(tiny_models, data, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_models / "teacher", other)
    config = other / "scheduler" / "scheduler_config.json"
    said = json.loads(config.read_text())
    there, here = ("epsilon", said["prediction_type"])
    assert here == "v_prediction"
    config.write_text(json.dumps(said | {"prediction_type": there}))
    once = {"batch_images": 4, "learning_rate": 1e-3, "steps": 1}
    taught = {**once, "teacher": str(other)}
    with pytest.raises(StageError, match=r"other predicts epsilon, and trainer\.teacher v_prediction"):
        loop.train(recipe(tiny_models, distill=taught), data, tmp_path / "out", seed=1)
    whole = recipe(tiny_models, start=str(other), student="whole", adapt={**once, "steps": 0})
    with pytest.raises(StageError, match="other predicts epsilon"):
        loop.train(whole, data, tmp_path / "whole", seed=1)


def test_after_phase_1_alone_the_student_draws_as_a_teacher_does(tiny_models, data, tmp_path) -> None:
    once = {"batch_images": 4, "learning_rate": 1e-3}
    settings = recipe(tiny_models, adapt=once | {"steps": 1}, distill=once | {"steps": 0})
    loop.train(settings, data, tmp_path / "training", seed=1)
    student = tmp_path / "student"
    save_student(settings, tmp_path / "training", student)
    assert not is_few_step(open_pipeline(str(student)))
    judge = OpenClipScorer(kind="open_clip", model=str(tiny_models / "clip"))
    write_samples(settings.teacher, student, ["a fox", "an owl"], 1, 2.0, judge, 1, tmp_path / "samples")
    rows = json.loads((tmp_path / "samples" / "samples.json").read_text())["rows"]
    assert [(row["name"], row["steps"]) for row in rows] == [("teacher", 25), ("student-25", 25)]


def test_a_start_of_another_shape_is_refused(tiny_models, data, tmp_path) -> None:
    with pytest.raises(StageError, match="is no tiny student"):
        loop.train(recipe(tiny_models, start=str(tiny_models / "teacher")), data, tmp_path, seed=1)


def test_a_start_of_another_size_is_refused_though_widths_agree(tiny_models, tmp_path) -> None:
    pipeline = open_pipeline(str(tiny_models / "teacher"))
    for size in ("base", "small"):
        build_student(pipeline.unet, size).float().save_pretrained(tmp_path / size)
    starts = {"base": tmp_path / "base", "small": tmp_path / "small", "whole": tiny_models / "teacher"}
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 1}
    for student in starts:
        for start, place in starts.items():
            adapt = phase | {"steps": int(student != "whole")}
            settings = recipe(tiny_models, adapt=adapt, distill=phase, student=student, start=str(place))
            if student == start:
                loop.student_for("adapt", settings, pipeline, tmp_path / "none")
                continue
            differs = "mid_block_type" if {student, start} == {"base", "small"} else "layers_per_block"
            with pytest.raises(StageError, match=rf"is no {student} student of .*: its {differs} is ") as caught:
                loop.student_for("adapt", settings, pipeline, tmp_path / "none")
            assert str(place) in str(caught.value) and "as trainer.student" in str(caught.value)


def test_the_paper_recipe_builds_its_student_at_full_size() -> None:
    settings = load_recipe(Recipe, DEFAULT_RECIPE.with_name("edgefusion.yaml"))
    with torch.device("meta"):
        teacher = UNet2DConditionModel.from_config(SD15)
        student = build_student(teacher, settings.trainer.student)
    assert sum(p.numel() for p in student.parameters()) == 323_384_964
    assert settings.trainer.size_px // 8 == SD15["sample_size"]


@pytest.mark.slow
def test_one_step_of_both_phases_at_full_size() -> None:
    """SD-v1.5's architecture with random weights on 64 x 64 latents: about 12 GB and two minutes."""
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(SD15).requires_grad_(False)
    student = build_student(teacher, "tiny").requires_grad_(True)
    student.enable_gradient_checkpointing()
    student.train()
    schedule = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9991, 0.0047, 1000), "epsilon")
    latent, t, text = torch.randn(1, 4, 64, 64), torch.tensor([499]), torch.randn(1, 77, 768)
    names = feature_names(4, 2, "tiny")
    own, theirs = Features(student, names[0]), Features(teacher, names[1])
    student(latent, t, text)
    teacher(latent, t, text)
    feature_loss(own.take(need_grad=True), theirs.take()).backward()
    own.close()
    theirs.close()

    def run(unet: UNet2DConditionModel):
        return lambda noisy, time, states: unet(noisy, time, states, return_dict=False)[0]

    w, empty = torch.tensor([7.0]), torch.zeros_like(text)
    pair = consistency_pair(schedule, run(student), run(student), run(teacher), latent, t, 20, w, text, empty)
    loss = pseudo_huber(*pair)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in student.parameters())


def test_a_finished_training_needs_no_data_and_keeps_what_it_noted(tiny_models, data, tmp_path) -> None:
    """As after a kill between its end and the student's folder."""
    loop.train(recipe(tiny_models), data, tmp_path, seed=1)
    noted = (tmp_path / "data.json").read_bytes()
    loop.train(recipe(tiny_models), {}, tmp_path, seed=1)
    assert (tmp_path / "data.json").read_bytes() == noted != b"[]\n"
