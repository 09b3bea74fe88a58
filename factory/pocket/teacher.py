"""The zoo's teacher: an SD-v1-shaped UNet on the zoo's latents, v-prediction, in a `StableDiffusionPipeline` folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from cluster.storage import publish_folder
from factory.pocket.clip import Pairs, tokens
from factory.pocket.fit import fit, keep
from factory.pocket.grammar import sentence
from factory.pocket.vae import encode
from factory.pocket.world import BACKGROUNDS, Concept, compose, describe

STYLES = ("3d", "flat")
"""The teacher draws the two styles that share their outlines; the third stays for the CLIPs and for raw pictures."""

UNCONDITIONAL_SHARE = 0.1


def is_trained_on(pair: tuple[Concept, str]) -> bool:
    """The teacher learns from this concept in this style."""
    concept, style = pair
    return style in STYLES and concept.is_drawn and not concept.held_out


def new_unet() -> UNet2DConditionModel:
    """22 million parameters, 191 MMAC a forward pass; `addition_embed_type` adds a pooled text embedding to the time embedding."""
    config = {
        "sample_size": 8,
        "in_channels": 16,
        "out_channels": 16,
        "block_out_channels": [64, 128, 192, 192],
        "layers_per_block": 2,
        "cross_attention_dim": 128,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
    }
    return UNet2DConditionModel.from_config(config)  # pyright: ignore[reportReturnType]


def schedule() -> DDIMScheduler:
    """SD's scaled-linear schedule with v-prediction."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def cache_latents(
    pairs: Pairs, pixels: np.ndarray, vae: AutoencoderKL, path: Path, copies: int = 8
) -> dict[str, torch.Tensor]:
    """Encode every trained picture `copies` times, each time placed anew on another background; kept in `path`.

    Returns latents N x 16 x 8 x 8 (scaled to unit deviation), and per latent its row and background index.
    """
    if path.exists():
        return torch.load(path, weights_only=True)
    rng, names = np.random.default_rng(8), list(BACKGROUNDS)
    rows = [i for i, pair in enumerate(pairs) if is_trained_on(pair)]
    order = [(row, ground) for row in rows for ground in rng.permutation(len(names))[:copies]]
    pictures = np.stack([compose(pixels[row], names[ground], rng) for row, ground in order])
    found = {
        "latents": encode(vae, pictures) * vae.config["scaling_factor"],
        "rows": torch.tensor([row for row, _ in order]),
        "grounds": torch.tensor([int(ground) for _, ground in order]),
    }
    keep(found, path)
    return found


def train_teacher(
    pairs: Pairs, pixels: np.ndarray, zoo: Path, *, steps: int, warm: bool = False, batch: int = 32
) -> UNet2DConditionModel:
    """Train on cached latents of the VAE and the text encoder in `zoo`; write the pipeline to `zoo/teacher/model`.

    With `warm`, the weights there are where training begins, and its text encoder stays.
    """
    place = zoo / "teacher" / "model"
    vae = AutoencoderKL.from_pretrained(zoo / "vae" / "model", dtype=torch.float32, use_safetensors=True)
    encoder = CLIPTextModel.from_pretrained(
        place / "text_encoder" if warm else zoo / "clip" / "text_encoder", dtype=torch.float32, use_safetensors=True
    ).eval()
    tokenizer = CLIPTokenizer.from_pretrained(zoo / "clip" / "model")
    data = cache_latents(pairs, pixels, vae, zoo / "teacher" / "latents.pt")
    torch.manual_seed(2)
    unet, noiser, names = new_unet(), schedule(), list(BACKGROUNDS)
    start: Any = (
        UNet2DConditionModel.from_pretrained(place / "unet", dtype=torch.float32, use_safetensors=True)
        if warm
        else None
    )
    # Professions have many near-equal compositions; each object must not be drowned by them.
    weight = torch.tensor([0.4 if pairs[int(r)][0].is_person else 1.0 for r in data["rows"]])

    def loss_at(step: int) -> torch.Tensor:
        draw, words = torch.Generator().manual_seed(step), random.Random(step)
        picked = torch.multinomial(weight, batch, generator=draw)
        records = [describe(*pairs[int(data["rows"][i])], names[int(data["grounds"][i])]) for i in picked]
        texts = ["" if words.random() < UNCONDITIONAL_SHARE else sentence(r, words) for r in records]
        with torch.no_grad():
            states = encoder(tokens(tokenizer, texts)).last_hidden_state
        clean = data["latents"][picked]
        noise = torch.randn(clean.shape, generator=draw)
        times = torch.randint(0, 1000, (batch,), generator=draw)
        noisy = noiser.add_noise(clean, noise, times)  # pyright: ignore[reportArgumentType]
        wanted = noiser.get_velocity(clean, noise, times)  # pyright: ignore[reportArgumentType]
        return F.mse_loss(unet(noisy, times, states, return_dict=False)[0], wanted)

    def on_save(average: UNet2DConditionModel, step: int) -> None:
        pipeline = assemble(average, vae, encoder, tokenizer)
        sample_grid(pipeline, pairs, zoo / "teacher" / f"look-{step:06d}.png")

    rate: dict[str, Any] = {"learning_rate": 6e-4, "weight_decay": 0.01}
    unet = fit(unet, loss_at, zoo / "teacher", steps=steps, on_save=on_save, start=start, **rate)
    publish_folder(place, assemble(unet, vae, encoder, tokenizer).to(torch.float16).save_pretrained)
    return unet


def assemble(
    unet: UNet2DConditionModel, vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def sample_grid(pipeline: StableDiffusionPipeline, pairs: Pairs, path: Path, count: int = 32, steps: int = 20) -> None:
    """A fixed set of prompts and seeds, eight pictures a row."""
    rng, words, names = np.random.default_rng(9), random.Random(9), list(BACKGROUNDS)
    rows = [i for i, pair in enumerate(pairs) if is_trained_on(pair)]
    prompts = [
        sentence(describe(*pairs[int(i)], names[int(rng.integers(len(names)))]), words) for i in rng.choice(rows, count)
    ]
    seeds = [torch.Generator().manual_seed(i) for i in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pictures = pipeline(prompts, num_inference_steps=steps, guidance_scale=4.0, generator=seeds, output_type="np")[
            0
        ]
    from PIL import Image

    grid = (np.asarray(pictures) * 255).round().astype(np.uint8).reshape(count // 8, 8, 64, 64, 3)
    Image.fromarray(grid.transpose(0, 2, 1, 3, 4).reshape(count // 8 * 64, 512, 3)).save(path)
