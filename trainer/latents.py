"""Pictures and prompts as the UNets see them: scaled latents and text states, from the teacher's frozen encoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from trainer.stream import Example


class Encoder:
    """The frozen VAE and text encoder of a pipeline. With `cache`, each sample is encoded once and then kept in memory."""

    def __init__(self, pipeline: StableDiffusionPipeline, size_px: int, device: torch.device, cache: bool) -> None:
        self.pipeline: Any = pipeline
        self.size_px, self.device, self.cache = size_px, device, cache
        pipeline.vae.requires_grad_(False).to(device)
        pipeline.text_encoder.requires_grad_(False).to(device)  # pyright: ignore[reportOptionalMemberAccess]
        self._latents: dict[str, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def latents(self, examples: list[Example]) -> torch.Tensor:
        """B C H W latents times the VAE's scaling factor; the mean of the posterior, so that caching changes nothing."""
        todo = [e for e in examples if e.id not in self._latents]
        fresh: dict[str, torch.Tensor] = {}
        if todo:
            pixels = np.stack([e.pixels(self.size_px) for e in todo])
            pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            vae = self.pipeline.vae
            mean = vae.encode(pictures.to(self.device, vae.dtype), return_dict=False)[0].mode().float()
            scaled = mean * vae.config.scaling_factor
            fresh = {e.id: row for e, row in zip(todo, scaled, strict=True)}
        if self.cache:
            self._latents |= fresh
        return torch.stack([fresh[e.id] if e.id in fresh else self._latents[e.id] for e in examples])

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> torch.Tensor:
        """B T D text states."""
        todo = sorted({p for p in prompts if p not in self._texts})
        fresh: dict[str, torch.Tensor] = {}
        if todo:
            tokenizer = self.pipeline.tokenizer
            tokens = tokenizer(
                todo, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
            )
            states = self.pipeline.text_encoder(tokens["input_ids"].to(self.device))[0].float()
            fresh = dict(zip(todo, states, strict=True))
        if self.cache:
            self._texts |= fresh
        return torch.stack([fresh[p] if p in fresh else self._texts[p] for p in prompts])


def encode_scaled(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """A UNet's latents of pictures B 3 H W in [-1, 1]: the mean of the posterior, shifted and scaled as the VAE's config says."""
    mean = vae.encode(pictures, return_dict=False)[0].mode()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures B 3 H W in about [-1, 1] of a UNet's latents, by the same arithmetic as a pipeline's."""
    shift = vae.config.shift_factor or 0.0
    return vae.decode(latents / vae.config.scaling_factor + shift, return_dict=False)[0]
