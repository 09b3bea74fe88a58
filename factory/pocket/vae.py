"""The zoo's autoencoder: 64 x 64 x 3 pictures to 8 x 8 x 16 latents, a plain diffusers `AutoencoderKL`.

A little noise is added to the latent while the decoder learns, so that a near miss decodes to a near picture.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F

from factory.pocket.fit import fit, half_where_fast
from factory.pocket.world import BACKGROUNDS, SIZE, Concept, compose

KL_WEIGHT = 1e-4
LATENT_NOISE = 0.1
MSE_WEIGHT = 10.0
"""With 2.0 the picture error stopped falling at 27.5 dB; the edge term keeps outlines sharp."""


def new_vae() -> AutoencoderKL:
    vae: Any = AutoencoderKL.from_config(
        {
            "block_out_channels": [32, 64, 128, 128],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 16,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": SIZE,
        }
    )
    return vae.to(memory_format=torch.channels_last)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """B x H x W x C uint8 to B x C x H x W in [-1, 1]."""
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return tensor.contiguous(memory_format=torch.channels_last)


def draw_batch(pixels: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compose pictures `rows` on random backgrounds; B x 64 x 64 x 3 uint8."""
    names = list(BACKGROUNDS)
    return np.stack([compose(pixels[i], names[int(rng.integers(len(names)))], rng) for i in rows])


def train_vae(
    pairs: list[tuple[Concept, str]], pixels: np.ndarray, folder: Path, *, steps: int, batch: int = 16
) -> AutoencoderKL:
    """Train on every picture that is not held out and write the diffusers folder to `folder/model`."""
    torch.manual_seed(0)
    vae = new_vae()
    rows = np.array([i for i, (concept, _) in enumerate(pairs) if not concept.held_out])
    kept_out = np.array([i for i, (concept, _) in enumerate(pairs) if concept.held_out])

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((1, step))
        pictures = to_tensor(draw_batch(pixels, rng.choice(rows, batch), rng))
        noise = torch.Generator().manual_seed(step)
        with half_where_fast():
            posterior = vae.encode(pictures, return_dict=False)[0]
            latent = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
            latent = latent + LATENT_NOISE * torch.randn(latent.shape, generator=noise)
            out = decode(vae, latent).float()
        edges = sum((_difference(out, d) - _difference(pictures, d)).abs().mean() for d in (2, 3))
        kl = posterior.kl().float().mean() / latent[0].numel()
        return (out - pictures).abs().mean() + MSE_WEIGHT * F.mse_loss(out, pictures) + 0.5 * edges + KL_WEIGHT * kl

    def on_save(average: AutoencoderKL, step: int) -> None:
        psnr = reconstruct(average, pixels, kept_out[:64], folder / f"look-{step:06d}.png")
        print(f"vae: step {step}, held-out PSNR {psnr:.2f} dB", flush=True)

    vae = fit(vae, loss_at, folder, steps=steps, learning_rate=1e-3, ema_decay=0.998, weight_decay=0.0, on_save=on_save)
    latents = encode(vae, draw_batch(pixels, rows[::4], np.random.default_rng(2)))
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    contiguous = copy.deepcopy(vae).half()
    for weight in contiguous.parameters():
        weight.data = weight.data.contiguous()
    contiguous.save_pretrained(folder / "model")
    return vae


def _difference(pictures: torch.Tensor, axis: int) -> torch.Tensor:
    return pictures.diff(dim=axis)


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Unscaled latents B x 16 x 8 x 8 to pictures B x 3 x 64 x 64 in about [-1, 1]."""
    return vae.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Mean latents of B x 64 x 64 x 3 uint8 pictures, unscaled: B x 16 x 8 x 8."""
    return torch.cat(
        [
            vae.encode(to_tensor(part), return_dict=False)[0].mean
            for part in np.array_split(pictures, len(pictures) // 64 + 1)
        ]
    )


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray, rows: np.ndarray, path: Path) -> float:
    """Save originals above reconstructions; returns the mean PSNR in dB over pictures."""
    pictures = draw_batch(pixels, rows, np.random.default_rng(3))
    out = decode(vae, encode(vae, pictures)).clamp(-1, 1)
    mse = (out - to_tensor(pictures)).div(2).pow(2).mean(dim=(1, 2, 3))
    decoded = out.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows_of_16 = [
        np.concatenate([p[i : i + 16].transpose(1, 0, 2, 3).reshape(SIZE, -1, 3) for p in (pictures, decoded)])
        for i in range(0, len(rows) - 15, 16)
    ]
    Image.fromarray(np.concatenate(rows_of_16)).save(path)
    return float((-10 * mse.log10()).mean())
