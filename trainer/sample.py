"""Pictures from a teacher or a student folder, and the student folder itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, TCDScheduler, UNet2DConditionModel

from cluster.errors import EdgeFusionError
from cluster.storage import publish_folder
from trainer.guidance import takes_guidance
from trainer.models import LORA, final_unet, open_pipeline
from trainer.recipe import TrainerRecipe
from trainer.trained_on import TRAINED_ON, trained_on


def save_student(recipe: TrainerRecipe, training: Path, folder: Path) -> None:
    """Write `folder`: the trained UNet with the teacher's encoders, as a diffusers pipeline folder; with a few-step scheduler after phase 2,
    with the teacher's own where only phase 1 was trained.

    Adapters are in the UNet's weights already; as a LoRA of their own they lie in `folder/lora`. `folder/trained_on.json` names the data of
    each phase.
    """
    teacher = open_pipeline(recipe.teacher, recipe.allow_pickle)
    place = final_unet(training)
    unet = UNet2DConditionModel.from_pretrained(place, use_safetensors=True)
    if place.parent.name == "distill":
        student = as_student(teacher, unet, recipe.distill.ddim_steps, recipe.distill.phases)
    else:
        student = as_teacher(teacher, unet)

    def write(partial: Path) -> None:
        student.to(torch.float16).save_pretrained(partial)
        if (place.parent / LORA).exists():
            shutil.copytree(place.parent / LORA, partial / LORA)
        if rows := trained_on(recipe, training):
            (partial / TRAINED_ON).write_text(json.dumps(rows, indent=2) + "\n")

    publish_folder(folder, write)


def as_student(
    teacher: Any, unet: UNet2DConditionModel, ddim_steps: int = 50, phases: int | None = None
) -> StableDiffusionPipeline:
    """The pipeline of a few-step student. Guidance is distilled into the weights: call it with `guidance_scale=1.0`, unless the
    UNet takes guidance.

    With `phases` the scheduler is TCD's, which a pipeline runs with eta 0: deterministic steps from edge to edge, as PCM's students
    learned them. (diffusers' LatentConsistencyModelPipeline cannot hold a student without a guidance input of the UNet.)
    """
    kind = TCDScheduler if phases else LCMScheduler
    return StableDiffusionPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer,
        unet=unet,
        scheduler=kind.from_config(  # pyright: ignore[reportArgumentType]
            teacher.scheduler.config, original_inference_steps=ddim_steps, clip_sample=False
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def as_teacher(teacher: Any, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The pipeline of a UNet that denoises as the teacher does, in many steps with guidance: a student after phase 1."""
    parts = {**teacher.components, "unet": unet, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def on_gpu(pipeline: Any) -> Any:
    """The same pipeline, moved to the GPU if there is one."""
    return pipeline.to("cuda") if torch.cuda.is_available() else pipeline


def is_few_step(pipeline: Any) -> bool:
    """Whether the pipeline is a student's, by its scheduler."""
    return isinstance(pipeline.scheduler, LCMScheduler | TCDScheduler)


def student_guidance(pipeline: Any, guidance: float) -> float:
    """The guidance scale to call a student with where a teacher would be called with `guidance`."""
    return guidance if takes_guidance(pipeline.unet) else 1.0


def generate(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float = 1.0, batch: int = 16
) -> list[np.ndarray]:
    """H x W x 3 uint8 pictures, one a prompt. Raises EdgeFusionError for an empty prompt, steps that the model does not have or a picture that
    is not a number."""
    if any(not prompt.strip() for prompt in prompts):
        raise EdgeFusionError("the prompt is empty", remedy='Say what to draw, for example "a red apple, 3d render"')
    pipeline.set_progress_bar_config(disable=True)
    found: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        try:
            with torch.inference_mode():
                pictures = pipeline(
                    part,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
                    output_type="np",
                )[0]
        except ValueError as error:  # a few-step scheduler has no more steps than its solver's grid
            raise EdgeFusionError(
                f"the model does not draw in {steps} steps ({(str(error).splitlines() or [''])[0]})",
                remedy="Take fewer; 1, 2 or 4 for a student",
            ) from error
        if not np.isfinite(pictures).all():
            raise EdgeFusionError("the model returned a picture that is not a number", remedy="Use float32 or retrain")
        found += list((pictures * 255).round().astype(np.uint8))
    return found


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
    """Rows of equal pictures as one white-framed picture, H x W x 3 uint8."""
    height, width = rows[0][0].shape[:2]
    across = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + gap) + gap, across * (width + gap) + gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = gap + y * (height + gap), gap + x * (width + gap)
            sheet[top : top + height, left : left + width] = picture
    return sheet
