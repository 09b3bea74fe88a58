"""Pictures and prompts as the UNets see them: scaled latents and text states, from the teacher's frozen encoders."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from trainer.stream import Example


class Encoder:
    """The frozen VAE and text encoder of a pipeline, on the device from their first use on.

    What a data set brings encoded is taken as it is. With `cache`, each other sample is encoded once and then kept in memory.
    Float sums depend on the size of a batch, so batches are filled up: what is in memory already must not change what the rest becomes,
    or a resumed training, which has nothing in memory, would not be the undisturbed one.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        size_px: int,
        device: torch.device,
        cache: bool,
        flip_seed: int | None = None,
    ) -> None:
        """With `flip_seed`, `trainer.draws.read_batch` mirrors pictures at random by that seed."""
        self.pipeline: Any = pipeline
        self.size_px, self.device, self.cache, self.flip_seed = size_px, device, cache, flip_seed
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
        self._latents: dict[bytes, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def latents(self, examples: list[Example], mirrored: list[bool] | None = None) -> torch.Tensor:
        """B C H W latents times the VAE's scaling factor; the mean of the posterior, so that caching changes nothing.

        Of the picture's mirror image where `mirrored` says so, which a sample that comes encoded has not.
        """
        turned = mirrored or [False] * len(examples)
        # By the picture, not the id: two data sets may show one id cropped in two ways.
        keys = [
            b"" if e.encoded else hashlib.sha256(e.picture).digest() + b"m" * m
            for e, m in zip(examples, turned, strict=True)
        ]
        todo = {
            k: (e, m)
            for k, e, m in zip(keys, examples, turned, strict=True)
            if not e.encoded and k not in self._latents
        }
        fresh: dict[bytes, torch.Tensor] = {}
        if todo:
            live = sum(not e.encoded for e in examples)
            pixels = np.stack(_filled([e.pixels(self.size_px)[:, :: -1 if m else 1] for e, m in todo.values()], live))
            pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            vae = self.pipeline.vae.to(self.device)
            fresh = dict(zip(todo, encode_scaled(vae, pictures.to(self.device, vae.dtype)).float(), strict=False))
        if self.cache:
            self._latents |= fresh
        return torch.stack(
            [
                e.encoded.latents.to(self.device) if e.encoded else fresh[k] if k in fresh else self._latents[k]
                for k, e in zip(keys, examples, strict=True)
            ]
        )

    def texts_of(self, examples: list[Example], empty: list[bool] | None = None) -> torch.Tensor:
        """B T D text states of the examples' prompts; of the empty prompt where `empty` says so."""
        drop = empty or [False] * len(examples)
        asked = ["" if d else e.prompt for e, d in zip(examples, drop, strict=True) if d or not e.encoded]
        live = iter(self.texts(asked)) if asked else iter(())
        return torch.stack(
            [
                e.encoded.text.to(self.device) if e.encoded and not d else next(live)
                for e, d in zip(examples, drop, strict=True)
            ]
        )

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> torch.Tensor:
        """B T D text states."""
        if "" in prompts and "" not in self._texts:
            self._texts[""] = self._states([""])[0]  # it comes at every step, so it is kept, and made by itself
        todo = sorted({p for p in prompts if p and p not in self._texts})
        fresh: dict[str, torch.Tensor] = {}
        if todo:
            fresh = dict(zip(todo, self._states(_filled(todo, len(prompts))), strict=False))
        if self.cache:
            self._texts |= fresh
        return torch.stack([fresh[p] if p in fresh else self._texts[p] for p in prompts])

    def _states(self, prompts: list[str]) -> torch.Tensor:
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        return self.pipeline.text_encoder.to(self.device)(tokens["input_ids"].to(self.device))[0].float()


def _filled(batch: list[Any], size: int) -> list[Any]:
    """The batch and, up to `size`, its last one again."""
    return batch + [batch[-1]] * (size - len(batch))


def encode_scaled(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """A UNet's latents of pictures B 3 H W in [-1, 1]: the mean of the posterior, shifted and scaled as the VAE's config says."""
    mean = vae.encode(pictures, return_dict=False)[0].mode()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures B 3 H W in about [-1, 1] of a UNet's latents, by the same arithmetic as a pipeline's."""
    shift = vae.config.shift_factor or 0.0
    return vae.decode(latents / vae.config.scaling_factor + shift, return_dict=False)[0]
