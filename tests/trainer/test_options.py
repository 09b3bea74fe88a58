"""What phase 2 can do besides its defaults: each option trains, resumes exactly, ends in a folder that diffusers opens and export takes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, TCDScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load, load_file

import trainer.fit as fit
import trainer.loop as loop
from cluster.errors import RecipeError, StageError, TargetUnavailable
from cluster.recipe import build_recipe
from export.runtime import Build, scheduler_constants
from trainer.adversary import Heads, Opponent, hinge, teacher_features
from trainer.guidance import add_guidance_input, embed_guidance, fix_guidance
from trainer.models import open_pipeline
from trainer.options import AdversarialRecipe
from trainer.recipe import TrainerRecipe
from trainer.sample import generate, is_few_step, save_student, student_guidance
from trainer.state import read_log
from trainer.surgery import build_student

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora (peft)")


def recipe(models: Path, distill: dict, **changes: object) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 2, "checkpoint_s": 1e-9}
    # Phase 1 is left out where nothing needs it: its tests are elsewhere.
    adapt = phase | {"steps": 1 if "lora" in distill else 0}
    tree = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1, "adapt": adapt}
    return build_recipe(TrainerRecipe, tree | {"distill": phase | distill} | changes, "test.yaml")


OPTIONS = {
    "phased": {"phases": 4, "ddim_steps": 40},
    "adversarial": {"adversarial": {"learning_rate": 1e-2}},
    "phased and adversarial, own target, l2": {
        **{"phases": 2, "adversarial": {}, "target": "student", "loss": "l2"},
        "teacher": "student",
    },
    "guidance": {"guidance_input": True, "guidance_min": 2.0, "guidance_max": 6.0},
    "accumulation": {"accumulation": 2},
}


def resumed_at_every_step(settings: TrainerRecipe, data: Path, out: Path, monkeypatch) -> tuple[Path, Path]:
    """(a training undisturbed, one killed after each state it saved)."""
    loop.train(settings, data, out / "whole", seed=1)
    saved = fit.save_state

    def save_and_die(*args: object) -> None:
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_state", save_and_die)
    for _ in range(settings.distill.steps - 1):
        with pytest.raises(KeyboardInterrupt):
            loop.train(settings, data, out / "broken", seed=1)
    monkeypatch.setattr(fit, "save_state", saved)
    loop.train(settings, data, out / "broken", seed=1)
    return out / "whole", out / "broken"


def unet_bytes(folder: Path) -> bytes:
    return (folder / "distill" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tiny_models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the default training."""
    out = tmp_path_factory.mktemp("plain")
    loop.train(recipe(tiny_models, {}), data, out, seed=1)
    return unet_bytes(out)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.long
def test_an_option_trains_resumes_to_the_byte_and_draws(tiny_models, data, plain, tmp_path, monkeypatch, name) -> None:
    settings = recipe(tiny_models, OPTIONS[name])
    whole, broken = resumed_at_every_step(settings, data, tmp_path, monkeypatch)
    assert unet_bytes(whole) == unet_bytes(broken)
    logs = [read_log(folder / "distill" / "metrics.jsonl") for folder in (whole, broken)]
    measured = ("time_s", "images_per_s", "memory_gib", "began_step")
    kept = [[{k: v for k, v in row.items() if k not in measured} for row in log] for log in logs]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    if name == "accumulation":  # the same sums in another order
        theirs = load(plain)
        for tensor, ours in load(unet_bytes(whole)).items():
            torch.testing.assert_close(ours, theirs[tensor], rtol=1e-3, atol=1e-3)
    else:
        assert unet_bytes(whole) != plain
    assert ("discriminator" in kept[0][0]) == (settings.distill.adversarial is not None)
    save_student(settings, whole, tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert is_few_step(pipeline) and isinstance(pipeline.scheduler, TCDScheduler) == (
        settings.distill.phases is not None
    )
    scale = student_guidance(pipeline, 4.0)
    assert scale == (4.0 if name == "guidance" else 1.0)
    assert generate(pipeline, ["a fox"], [0], settings.distill.phases or 2, scale)[0].shape == (32, 32, 3)


def test_a_phased_students_bundle_takes_the_steps_of_its_pipeline(tiny_models, data, tmp_path, monkeypatch) -> None:
    """The table of constants that every runtime reads, against diffusers' own loop: no noise after a step."""
    settings = recipe(tiny_models, {"phases": 4, "ddim_steps": 40, "steps": 1})
    loop.train(settings, data, tmp_path, seed=1)
    save_student(settings, tmp_path, tmp_path / "student")
    pipeline = loop.open_pipeline(str(tmp_path / "student"))
    table = scheduler_constants(pipeline, 4)
    assert [row["t"] for row in table["steps"]] == [999, 749, 499, 249]
    assert not any("next_alpha" in row for row in table["steps"])
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("export.runtime.noise", lambda *_: latent[0].numpy())
    tokens = pipeline.tokenizer(["a fox"], padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        states = pipeline.text_encoder(tokens["input_ids"])[0]
        calls = {
            "text_encoder": lambda _: states.numpy(),
            "unet": lambda x: pipeline.unet(
                torch.from_numpy(x["latent"]), torch.from_numpy(x["timestep"]), states, return_dict=False
            )[0].numpy(),
        }
        ours = Build(calls, table, (1, 4, 8, 8)).denoise(np.zeros((1, 24)), 0)
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline("a fox", num_inference_steps=4, guidance_scale=1.0, latents=latent, output_type="latent")[0]
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-3, atol=1e-4)


@needs_peft
def test_lora_trains_adapters_alone_and_is_saved_apart_and_merged(tiny_models, data, tmp_path, monkeypatch) -> None:
    settings = recipe(tiny_models, {"lora": {"rank": 4}})
    whole, broken = resumed_at_every_step(settings, data, tmp_path, monkeypatch)
    assert unet_bytes(whole) == unet_bytes(broken)
    adapted = UNet2DConditionModel.from_pretrained(whole / "adapt" / "unet").state_dict()
    merged = UNet2DConditionModel.from_pretrained(whole / "distill" / "unet").state_dict()
    assert set(adapted) == set(merged)
    moved = {name for name in adapted if not torch.equal(adapted[name], merged[name])}
    assert moved and all(name.endswith(".weight") for name in moved) and "conv_in.weight" not in moved
    save_student(settings, whole, tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert not pipeline.unet.state_dict().keys() ^ adapted.keys()
    # The LoRA on the student of phase 1 is the merged one.
    pipeline.unet.load_state_dict(adapted)
    pipeline.load_lora_weights(tmp_path / "student" / "lora")
    latent, t, text = torch.randn(1, 4, 8, 8), torch.tensor([499]), torch.randn(1, 24, 16)
    theirs = UNet2DConditionModel.from_pretrained(whole / "distill" / "unet")
    with torch.no_grad():
        said = [unet(latent, t, text, return_dict=False)[0] for unet in (pipeline.unet, theirs)]
    torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "student" / "lora" / "pytorch_lora_weights.safetensors")


def test_lora_without_peft_is_refused_in_words(tiny_models, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TargetUnavailable, match=r"pip install 'edgefusion\[lora\]'"):
        loop.train(recipe(tiny_models, {"lora": {}}), data, tmp_path, seed=1)


def test_the_guidance_input_starts_as_no_change_and_can_be_fixed_again(tiny_models) -> None:
    torch.manual_seed(0)
    student = build_student(loop.open_pipeline(str(tiny_models / "teacher")).unet, "tiny").float()
    wider = add_guidance_input(student)
    w = torch.tensor([1.5, 4.0])
    torch.testing.assert_close(
        embed_guidance(w), StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256), rtol=1e-4, atol=1e-4
    )
    latent, t, text = torch.randn(2, 4, 8, 8), torch.tensor([499, 19]), torch.randn(2, 24, 16)
    with torch.no_grad():
        before = student(latent, t, text, return_dict=False)[0]
        assert torch.equal(wider(latent, t, text, timestep_cond=embed_guidance(w), return_dict=False)[0], before)
        wider.time_embedding.cond_proj.weight.normal_()
        told = wider(latent, t, text, timestep_cond=embed_guidance(torch.tensor([3.0, 3.0])), return_dict=False)[0]
        assert not torch.allclose(told, before, atol=1e-3)
        fixed = fix_guidance(wider, 3.0)
        torch.testing.assert_close(fixed(latent, t, text, return_dict=False)[0], told, rtol=1e-4, atol=1e-5)
    assert fixed.config["time_cond_proj_dim"] is None


def test_each_adversarial_term_has_its_own_gradient(tiny_models) -> None:
    pipeline = loop.open_pipeline(str(tiny_models / "teacher"))
    teacher = pipeline.unet.requires_grad_(False)
    opponent = Opponent(AdversarialRecipe(hidden_channels=8), teacher, loop.schedule_of(pipeline), seed=3)
    fake, real = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    t, text = torch.tensor([100, 700]), torch.randn(2, 24, 16)
    student, heads = opponent.losses(fake, real, t, text)
    own = list(opponent.heads.parameters())
    assert all(g is None for g in torch.autograd.grad(student, own, allow_unused=True, retain_graph=True))
    assert torch.autograd.grad(heads, fake, allow_unused=True, retain_graph=True)[0] is None
    assert float(torch.autograd.grad(student, fake, retain_graph=True)[0].abs().max()) > 0
    assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(heads, own) if g.ndim > 1)
    assert hinge(torch.ones(3), -torch.ones(3)) == 0 and hinge(torch.zeros(3), torch.zeros(3)) == 2
    features = teacher_features(teacher, real, t, text)
    assert len(features) == 5 and not teacher.mid_block._forward_hooks
    assert Heads([8, 16, 16, 16, 16], 8)(features).shape[0] == 2


def test_heads_learn_to_tell_two_kinds_of_latents_apart(tiny_models) -> None:
    pipeline = loop.open_pipeline(str(tiny_models / "teacher"))
    opponent = Opponent(AdversarialRecipe(), pipeline.unet.requires_grad_(False), loop.schedule_of(pipeline), seed=3)
    optimiser = torch.optim.AdamW(opponent.heads.parameters(), lr=1e-2)
    text, t, found = torch.randn(8, 24, 16), torch.full((8,), 200), []
    for step in range(30):
        draw = torch.Generator().manual_seed(step)
        real = torch.randn(8, 4, 8, 8, generator=draw)
        _, loss = opponent.losses(real + 1, torch.randn(8, 4, 8, 8, generator=draw), t, text)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert sum(found[-5:]) / 5 < 0.75 * found[0], "heads that tell nothing stay at 2"


REFUSED = {
    "for 4 or 8 phases choose ddim_steps 40": {"phases": 4},
    "raise guidance_max or leave guidance_input out": {"guidance_input": True},
    "lora trains no new layer": {"guidance_input": True, "guidance_max": 9.0, "lora": {}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_remedy(tiny_models, words) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(tiny_models, REFUSED[words])


def test_adapters_without_a_student_and_edges_between_steps_are_refused(tiny_models, data, tmp_path) -> None:
    adapt = {"steps": 0, "batch_images": 4, "learning_rate": 1e-3}
    with pytest.raises(RecipeError, match=r"set adapt\.steps or name a `start`"):
        recipe(tiny_models, {"lora": {}}, adapt=adapt)
    with pytest.raises(StageError, match="does not divide the teacher's 1000 timesteps"):
        loop.train(recipe(tiny_models, {"phases": 4, "ddim_steps": 48}, adapt=adapt), data, tmp_path, seed=1)


def test_the_chains_recipe_refuses_builds_that_cross_edges_or_lack_a_scale(tiny_models) -> None:
    from edgefusion import DEFAULT_RECIPE, Recipe

    def chain(*words: str) -> Recipe:
        from cluster.recipe import load_recipe

        return load_recipe(Recipe, DEFAULT_RECIPE, list(words))

    phased = ["trainer.distill.phases=4", "trainer.distill.ddim_steps=40"]
    with pytest.raises(RecipeError, match=r"export\.steps \(2\) is no multiple of trainer\.distill\.phases \(4\)"):
        chain(*phased)
    assert chain(*phased, "export.steps=4").trainer.distill.phases == 4
    guided = ["trainer.distill.guidance_input=true", "trainer.distill.guidance_max=6"]
    with pytest.raises(RecipeError, match="choose one from 4 to 7"):
        chain(*guided)
    assert chain(*guided, "export.guidance_scale=5").export.guidance_scale == 5
    assert chain(*guided, "export.guidance_range=[4,7]").export.guidance_range == (4, 7)
    with pytest.raises(
        RecipeError, match=r"export\.guidance_range reaches beyond what trainer\.distill teaches \(4 to 7"
    ):
        chain(*guided, "export.guidance_range=[3,7]")
    with pytest.raises(RecipeError, match=r"export\.guidance_range needs a student that takes guidance"):
        chain("export.guidance_range=[4,7]")


def test_a_student_as_large_as_its_teacher_needs_no_cut(tiny_models: Path, data: Path, tmp_path: Path) -> None:
    settings = recipe(tiny_models, {}, student="whole")
    loop.train(settings, data, tmp_path, seed=1)
    teacher = UNet2DConditionModel.from_pretrained(tiny_models / "teacher", subfolder="unet").state_dict()
    student = UNet2DConditionModel.from_pretrained(tmp_path / "distill" / "unet").state_dict()
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(student[key], teacher[key].float()) for key in teacher), "it learned nothing"
    save_student(settings, tmp_path, tmp_path / "student")
    assert generate(open_pipeline(str(tmp_path / "student")), ["a fox"], [0], 2)[0].shape == (32, 32, 3)


def test_nothing_is_adapted_where_nothing_was_cut(tiny_models: Path) -> None:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 1}
    with pytest.raises(RecipeError, match=r"student is whole.*set adapt\.steps to 0"):
        recipe(tiny_models, {}, student="whole", adapt=phase)
