"""The text-to-image teacher through diffusers. A picture is a function of its row alone: own seed, fixed batch size."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.errors import StageError
from factory.models import first_line, pick_device, quiet, resolve, weights_of
from factory.models.memory import BatchSize
from factory.recipe import DiffusersTeacher


class Painter:
    """An opened pipeline."""

    def __init__(self, recipe: DiffusersTeacher, key: str = "factory.make.teacher", device: str | None = None) -> None:
        """`key` is where the recipe says so: errors name it. `device` is the best that may be used if left out."""
        import diffusers
        import torch

        quiet()
        samplers = {
            "dpm++": diffusers.DPMSolverMultistepScheduler,
            "ddim": diffusers.DDIMScheduler,
            "euler": diffusers.EulerDiscreteScheduler,
            "lcm": diffusers.LCMScheduler,
        }
        self.recipe, place = recipe, resolve(recipe.model)
        self.batch = BatchSize(recipe.batch_images, f"{key}.batch_images")
        try:
            pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
                place,
                revision=recipe.revision,
                dtype=getattr(torch, recipe.dtype),
                safety_checker=None,
                **weights_of(recipe.allow_pickle),
            )
        except (OSError, ValueError) as error:
            raise StageError(
                f"the teacher {recipe.model} cannot be opened: {first_line(error, f'{key}.allow_pickle')}",
                remedy=f"Check {key}.model; hub names need a network or a filled cache",
            ) from error
        pipeline.scheduler = samplers[recipe.sampler].from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(device or pick_device())

    def paint(self, prompts: list[str], seeds: list[int]) -> list[np.ndarray]:
        """Pictures H x W x 3 uint8, one a prompt. Neighbours and retries change no bit."""
        import torch

        def run(some: list[tuple[str, int]]) -> list[np.ndarray]:
            with torch.inference_mode():
                pictures = self.pipeline(
                    [prompt for prompt, _ in some],
                    negative_prompt=[self.recipe.negative_prompt] * len(some),
                    num_inference_steps=self.recipe.steps,
                    guidance_scale=self.recipe.guidance,
                    height=self.recipe.size_px,
                    width=self.recipe.size_px,
                    generator=[torch.Generator().manual_seed(seed) for _, seed in some],
                    output_type="np",
                )[0]
            if not np.isfinite(pictures).all():
                raise ValueError("the teacher returned a picture that is not a number")
            return list((pictures * 255).round().astype(np.uint8))

        return self.batch.map(list(zip(prompts, seeds, strict=True)), run)
