"""The models that a training opens, cuts, learns from and leaves, each refused in plain words where parts do not belong together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from cluster.errors import EdgeFusionError, StageError
from factory.models import check_pipeline, first_line, refuse_unknown, resolve, weights_of
from trainer.guidance import takes_guidance
from trainer.losses import NoiseSchedule
from trainer.options import PHASES
from trainer.progress import is_finished
from trainer.recipe import TrainerRecipe
from trainer.surgery import SurgeryError, build_student, student_config

LORA = "lora"
# Widths alone do not tell base, small and the whole teacher apart.
_SHAPE = ("block_out_channels", "layers_per_block", "mid_block_type", "down_block_types", "up_block_types")


def open_pipeline(model: str, allow_pickle: bool = False) -> Any:
    """A StableDiffusionPipeline (or one of its kin) in float32; raises StageError, or RecipeError for a name of nothing."""
    check_pipeline(model)
    try:
        return DiffusionPipeline.from_pretrained(
            resolve(model), dtype=torch.float32, safety_checker=None, **weights_of(allow_pickle)
        )
    except (OSError, ValueError) as error:
        refuse_unknown(model, error)
        raise StageError(
            f"{model} cannot be opened: {first_line(error)}",
            remedy="Give a diffusers pipeline folder; hub names need a network or a filled cache",
        ) from error


def open_unet(model: str, allow_pickle: bool = False, prediction: str | None = None) -> UNet2DConditionModel:
    """The UNet of a pipeline, or of a folder that holds nothing but a UNet; float32. Raises StageError for a pipeline whose UNet predicts
    something else than `prediction`; a folder of a UNet does not say what it predicts."""
    place = Path(resolve(model))
    if (place / "config.json").exists() and not (place / "model_index.json").exists():
        try:
            return UNet2DConditionModel.from_pretrained(place, dtype=torch.float32, **weights_of(allow_pickle))
        except (OSError, ValueError) as error:
            raise StageError(
                f"{model} cannot be opened: {first_line(error, 'trainer.allow_pickle')}",
                remedy="Give a diffusers pipeline folder, or the folder of a UNet",
            ) from error
    pipeline = open_pipeline(model, allow_pickle)
    said = pipeline.scheduler.config.prediction_type
    if prediction is not None and said != prediction:
        raise StageError(
            f"{model} predicts {said}, and trainer.teacher {prediction}", remedy="Use models that predict the same"
        )
    return pipeline.unet


def schedule_of(pipeline: Any) -> NoiseSchedule:
    """The training schedule and prediction type of a pipeline's scheduler."""
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise StageError(f"the teacher predicts {prediction}", remedy="Use a teacher of epsilon or v_prediction")
    return NoiseSchedule.from_alphas_cumprod(pipeline.scheduler.alphas_cumprod, prediction)


def final_unet(folder: Path) -> Path:
    """The UNet of the last phase that ran."""
    for phase in reversed(PHASES):
        if is_finished(folder, phase):
            return folder / phase / "unet"
    raise EdgeFusionError(
        "no phase was trained", where=str(folder), remedy="Set trainer.adapt.steps or trainer.distill.steps"
    )


def refuse_misfit(unet: Any, pipeline: Any, what: str, remedy: str) -> None:
    """Raises StageError for a UNet that cannot read the pipeline's text states or draw its VAE's latents."""
    config, text = unet.config, pipeline.text_encoder.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    widths = set(width) if isinstance(width, list | tuple) else {width}
    if widths != {text.hidden_size}:
        raise StageError(
            f"{what} reads text states of width {', '.join(map(str, sorted(widths)))}, and the text encoder makes {text.hidden_size}",
            remedy=remedy,
        )
    channels = pipeline.vae.config.latent_channels
    if {config.in_channels, config.out_channels} != {channels}:
        raise StageError(
            f"{what} takes latents of {config.in_channels} channels and gives {config.out_channels}, and the VAE's have {channels}",
            remedy=remedy,
        )


def student_for(phase: str, recipe: TrainerRecipe, pipeline: Any, folder: Path) -> UNet2DConditionModel:
    """The student as `phase` begins: what the phase before left, `trainer.start`, or the teacher's own blocks; raises StageError."""
    before = folder / "adapt" / "unet"
    if phase == "distill" and before.exists():
        return UNet2DConditionModel.from_pretrained(before, use_safetensors=True)
    teacher, size = pipeline.unet, recipe.student
    try:
        if recipe.start is None:
            return (
                copy.deepcopy(teacher).requires_grad_(True) if size == "whole" else build_student(teacher, size).float()
            )
        wanted = teacher.config if size == "whole" else student_config(dict(teacher.config), size)
    except SurgeryError as error:
        raise StageError(
            f"{recipe.teacher} cannot be cut: {error}", remedy="Choose another trainer.student or teacher"
        ) from error
    student: Any = open_unet(recipe.start, recipe.allow_pickle, schedule_of(pipeline).prediction)
    out = "Leave trainer.start out to cut the student from the teacher"
    for name in _SHAPE:
        there, needed = _plain(student.config[name]), _plain(wanted[name])
        if there != needed:
            raise StageError(
                f"trainer.start {recipe.start} is no {size} student of {recipe.teacher}: its {name} is {there}, not {needed}",
                remedy=f"Name its own size as trainer.student, or leave trainer.start out to cut a {size} one from the teacher",
            )
    refuse_misfit(student, pipeline, f"trainer.start {recipe.start}", out)
    if phase == "distill" and takes_guidance(student) and not recipe.distill.guidance_input:
        raise StageError(
            f"trainer.start {recipe.start} takes guidance as an input",
            remedy="Set trainer.distill.guidance_input=true with guidance_min below guidance_max, or start from another",
        )
    return student.float()


def _plain(value: Any) -> Any:
    """Configs come with lists from files and with tuples from defaults."""
    return list(value) if isinstance(value, list | tuple) else value


def teacher_of(name: str, student: UNet2DConditionModel, pipeline: Any, allow_pickle: bool = False) -> Any:
    """The UNet that phase 2 learns from where the recipe names one."""
    if name == "student":
        teacher: Any = copy.deepcopy(student)
    else:
        teacher = open_unet(name, allow_pickle, schedule_of(pipeline).prediction)
        refuse_misfit(
            teacher, pipeline, f"trainer.distill.teacher {name}", "Leave it out to learn from trainer.teacher"
        )
    return teacher.requires_grad_(False).eval()
