"""The zoo's autoencoder gets a sharper decoder; its latents stay, so nothing that was trained on them is lost.

A diffusion model's latents are a little wrong, and a decoder that only ever saw right ones blurs them. So half of what it learns from here are
the few-step student's own answers to noised pictures, for which the true picture is known, and a critic (PatchGAN, hinge loss) asks for
pictures that look drawn. No CLIP has a part in it: neither the filter's scores nor the judge's can be flattered.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from transformers import CLIPTextModel, CLIPTokenizer

from cluster.storage import publish_folder
from factory.pocket.clip import Pairs, tokens
from factory.pocket.fit import fit
from factory.pocket.grammar import sentence
from factory.pocket.teacher import STYLES, schedule
from factory.pocket.vae import decode, draw_batch, reconstruct, to_tensor
from factory.pocket.world import BACKGROUNDS, compose, describe

CRITIC_WEIGHT = 0.1
CRITIC_FROM = 300
"""Steps for which the critic only learns."""
LATENT_NOISE = 0.25
"""The most that is added to right latents, in their standard deviations."""
NOISED = range(99, 780, 20)
"""Timesteps of the student's grid from which its answer still is this picture and no other."""


class Decoding(nn.Module):
    """What is trained: the decoder's side of an autoencoder, and the critic of its pictures."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv, self.critic = vae.decoder, vae.post_quant_conv, new_critic()

    def put_into(self, vae: Any) -> None:
        vae.decoder, vae.post_quant_conv = self.decoder, self.post_quant_conv


def new_critic() -> nn.Sequential:
    """B x 3 x 64 x 64 pictures to B x 1 x 16 x 16 verdicts, each on a patch."""
    steps = [(3, 32, 4, 2), (32, 64, 4, 2), (64, 128, 3, 1), (128, 1, 3, 1)]
    layers: list[nn.Module] = []
    for inward, outward, kernel, stride in steps:
        layers += [spectral_norm(nn.Conv2d(inward, outward, kernel, stride, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


class Answers:
    """The few-step student's pictures of what it was shown with noise on it."""

    def __init__(self, zoo: Path, scaling_factor: float) -> None:
        folder = zoo / "student-fewstep"
        unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32, use_safetensors=True)
        self.unet = unet.eval().to(memory_format=torch.channels_last)
        encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, use_safetensors=True)
        self.encoder = encoder.eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        alphas: Any = schedule().alphas_cumprod
        self.alphas, self.scale = alphas, scaling_factor

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, texts: list[str], draw: torch.Generator) -> torch.Tensor:
        """Unscaled latents B x 16 x 8 x 8 and their captions to the student's guess at the same latents, in one call (v-prediction)."""
        at = torch.tensor(NOISED)[torch.randint(len(NOISED), (len(texts),), generator=draw)]
        signal, noise = self.alphas[at].sqrt().view(-1, 1, 1, 1), (1 - self.alphas[at]).sqrt().view(-1, 1, 1, 1)
        noisy = signal * latents * self.scale + noise * torch.randn(latents.shape, generator=draw)
        said = self.unet(noisy, at, self.encoder(tokens(self.tokenizer, texts)).last_hidden_state, return_dict=False)[0]
        return (signal * noisy - noise * said) / self.scale


def train_decoder(pairs: Pairs, pixels: np.ndarray, zoo: Path, *, steps: int, batch: int = 16) -> AutoencoderKL:
    """Go on from the decoder in `zoo/vae/model`; put what comes of it into `zoo/decoder/model` and the taught teacher's and the student's folders."""
    torch.manual_seed(6)
    vae: Any = AutoencoderKL.from_pretrained(zoo / "vae" / "model", dtype=torch.float32, use_safetensors=True)
    vae.requires_grad_(False).to(memory_format=torch.channels_last)
    answers = Answers(zoo, vae.config["scaling_factor"])
    known = np.array([i for i, (concept, _) in enumerate(pairs) if not concept.held_out])
    drawn = np.array([i for i in known if pairs[i][1] in STYLES and pairs[i][0].is_drawn])
    kept_out = np.array([i for i, (concept, _) in enumerate(pairs) if concept.held_out])
    model, half, names = Decoding(vae).requires_grad_(True), batch // 2, list(BACKGROUNDS)
    model.to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        rng, words, draw = np.random.default_rng((5, step)), random.Random(step), torch.Generator().manual_seed(step)
        picked, grounds = rng.choice(drawn, half), [names[int(rng.integers(len(names)))] for _ in range(half)]
        told = np.stack([compose(pixels[i], ground, rng) for i, ground in zip(picked, grounds, strict=True)])
        texts = [sentence(describe(*pairs[int(i)], ground), words) for i, ground in zip(picked, grounds, strict=True)]
        pictures = to_tensor(np.concatenate([draw_batch(pixels, rng.choice(known, batch - half), rng), told]))
        with torch.no_grad():
            latents = vae.encode(pictures, return_dict=False)[0].mean
        right, guessed = latents[:-half], answers(latents[-half:], texts, draw)
        amount = LATENT_NOISE / answers.scale * torch.rand(len(right), 1, 1, 1, generator=draw)
        right = right + amount * torch.randn(right.shape, generator=draw)
        model.put_into(vae)
        out = decode(vae, torch.cat([right, guessed]))
        loss = picture_loss(out[:-half], pictures[:-half])
        # The exact place of an edge is not to be had from a guess, so it counts less.
        missed = out[-half:] - pictures[-half:]
        loss = loss + 0.5 * missed.abs().mean() + missed.pow(2).mean()
        return loss + critic_loss(model.critic, out, pictures, CRITIC_WEIGHT if step >= CRITIC_FROM else 0.0)

    def on_save(average: Decoding, step: int) -> None:
        average.put_into(vae)
        psnr = reconstruct(vae, pixels, kept_out[:64], zoo / "decoder" / f"look-{step:06d}.png")
        print(f"decoder: step {step}, held-out PSNR {psnr:.2f} dB", flush=True)

    fit(
        model,
        loss_at,
        zoo / "decoder",
        steps=steps,
        learning_rate=3e-4,
        ema_decay=0.998,
        weight_decay=0.0,
        on_save=on_save,
    ).put_into(vae)
    finished = vae.half().to(memory_format=torch.contiguous_format)
    places = [zoo / "decoder" / "model", zoo / "people" / "model" / "vae", zoo / "student-fewstep" / "vae"]
    for place in places:
        publish_folder(place, finished.save_pretrained)
    return vae


def picture_loss(out: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """As the autoencoder learned: difference, squared difference, and that of neighbours, for outlines."""
    edges = sum((out.diff(dim=axis) - pictures.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return (out - pictures).abs().mean() + 10 * F.mse_loss(out, pictures) + 0.5 * edges


def critic_loss(critic: nn.Module, out: torch.Tensor, pictures: torch.Tensor, weight: float) -> torch.Tensor:
    """What both sides want, in one sum: of the first term only the decoder learns, of the others only the critic."""
    critic.requires_grad_(False)
    wanted = -weight * critic(out).mean() if weight else torch.zeros(())
    critic.requires_grad_(True)
    return wanted + F.relu(1 - critic(pictures)).mean() + F.relu(1 + critic(out.detach())).mean()
