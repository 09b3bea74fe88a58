"""Phase 2 as a loss: consistency distillation from the large teacher, with what the recipe adds to it.

Every number is drawn for the whole global batch from the step number; a rank takes its slice.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from cluster.errors import StageError
from trainer.adversary import Opponent
from trainer.draws import generator, read_batch
from trainer.guidance import embed_guidance
from trainer.latents import Encoder
from trainer.losses import Denoiser, NoiseSchedule, consistency_pair, phase_edge, pseudo_huber, squared
from trainer.mix import MixedStream
from trainer.recipe import DistillRecipe
from trainer.state import Average


class Distillation:
    """The loss of phase 2 at a step; `notes` are the parts of the last one, for the log."""

    def __init__(
        self,
        settings: DistillRecipe,
        teacher: UNet2DConditionModel,
        encoder: Encoder,
        stream: MixedStream,
        schedule: NoiseSchedule,
        seed: int,
        opponent: Opponent | None = None,
    ) -> None:
        """Raises StageError for phases whose edges the teacher's timesteps cannot hit."""
        self.settings, self.teacher, self.encoder, self.stream = settings, teacher, encoder, stream
        self.schedule, self.seed, self.opponent = schedule, seed, opponent
        self.timesteps = len(schedule.alpha)
        self.skip = self.timesteps // settings.ddim_steps
        self.notes: dict[str, float] = {}
        if settings.phases and self.timesteps % settings.ddim_steps:
            raise StageError(
                f"trainer.distill.ddim_steps ({settings.ddim_steps}) does not divide the teacher's {self.timesteps} timesteps, so "
                "the edges of the phases would lie between steps",
                remedy=f"Choose a divisor of {self.timesteps} that is a multiple of trainer.distill.phases",
            )

    def __call__(self, model: Any, average: Average, step: int, share: slice) -> torch.Tensor:
        settings = self.settings
        draw, batch = generator(self.seed, "distill", step), settings.batch_images
        clean, examples = read_batch(self.stream, self.encoder, step, batch, share)
        noise = torch.randn((batch, *clean.shape[1:]), generator=draw)[share].to(clean.device)
        t = (torch.randint(1, settings.ddim_steps + 1, (batch,), generator=draw) * self.skip - 1)[share].to(
            clean.device
        )
        spread = settings.guidance_max - settings.guidance_min
        w = (settings.guidance_min + spread * torch.rand(batch, generator=draw))[share].to(clean.device)
        told = embed_guidance(w) if settings.guidance_input else None
        edge = phase_edge(t, self.timesteps, settings.phases) if settings.phases else None
        text = self.encoder.texts_of(examples, self._emptied(step, share))
        target = average.model if settings.target == "average" else getattr(model, "module", model)
        guess, wanted = consistency_pair(
            self.schedule,
            denoiser(model, told=told),
            denoiser(target, told=told),
            denoiser(self.teacher, self.teacher.dtype),
            self.schedule.add_noise(clean, noise, t),
            t,
            self.skip,
            w,
            text,
            self.encoder.texts([""] * len(examples)),
            edge,
        )
        loss = squared(guess, wanted) if settings.loss == "l2" else pseudo_huber(guess, wanted, settings.huber_c)
        if self.opponent is None:
            return loss
        return self._judged(self.opponent, loss, guess, wanted, edge, text, step, share)

    def _emptied(self, step: int, share: slice) -> list[bool] | None:
        """Which samples are trained without their prompt; by numbers of their own, so that other shares change nothing else."""
        settings = self.settings
        if not settings.empty_prompt_share:
            return None
        drawn = torch.rand(settings.batch_images, generator=generator(self.seed, "empty prompts", step))
        return (drawn[share] < settings.empty_prompt_share).tolist()

    def _judged(
        self,
        opponent: Opponent,
        loss: torch.Tensor,
        guess: torch.Tensor,
        wanted: torch.Tensor,
        edge: torch.Tensor | None,
        text: torch.Tensor,
        step: int,
        share: slice,
    ) -> torch.Tensor:
        """The loss with both adversarial terms."""
        draw, batch = generator(self.seed, "adversary", step), self.settings.batch_images
        shape = (batch, *guess.shape[1:])
        one, other = (torch.randn(shape, generator=draw)[share].to(guess.device) for _ in range(2))
        span = self.timesteps // (self.settings.phases or 1)
        ahead = (torch.rand(batch, generator=draw) * span).long()[share].to(guess.device)
        start = torch.zeros_like(ahead) if edge is None else edge
        t = (start + ahead).clamp(max=self.timesteps - 1)
        if edge is None:  # consistency models without phases answer with clean latents
            fake, real = (self.schedule.add_noise(x, n, t) for x, n in ((guess, one), (wanted, other)))
        else:
            fake, real = (self.schedule.travel(x, n, edge, t) for x, n in ((guess, one), (wanted, other)))
        student, heads = opponent.losses(fake, real, t, text)
        self.notes = {
            "consistency": round(float(loss.detach()), 6),
            "adversarial": round(float(student.detach()), 6),
            "discriminator": round(float(heads.detach()), 6),
        }
        return loss + opponent.recipe.weight * student + heads


def denoiser(
    unet: UNet2DConditionModel, dtype: torch.dtype | None = None, told: torch.Tensor | None = None
) -> Denoiser:
    """The UNet as the equations want it; `dtype` is its weights' where that is not the latents', `told` the embedding of w."""
    more: dict[str, Any] = {} if told is None else {"timestep_cond": told}

    def predict(noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        said = unet(noisy.to(dtype or noisy.dtype), t, text.to(dtype or text.dtype), return_dict=False, **more)[0]
        return said.to(noisy.dtype)

    return predict
