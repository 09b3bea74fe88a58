"""A small decoder that stands in for a VAE's: distilled from its pictures, saved as a diffusers AutoencoderTiny.

The pipeline divides latents by `scaling_factor` before it decodes. The small decoder's is 1 and its shift 0, so it is fed the
UNet's own latents (unit variance, as its tanh clamp wants) and the same call draws the same picture. Latents B C H W, pictures
B 3 H W in [-1, 1].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import LedgerConflict, RecipeError, StageError
from cluster.storage import publish_bytes, publish_folder
from factory.models import first_line, quiet, resolve, weights_of
from trainer.checkpoints import forget_checkpoints
from trainer.fit import fit
from trainer.identity import Identity, decoder_identity
from trainer.latent_files import LatentFiles
from trainer.latents import decode_scaled
from trainer.memory import explain_decoder, explains_memory
from trainer.metrics import mean_interval
from trainer.recipe import DecoderRecipe
from trainer.stream import EndlessOrder, open_samples
from trainer.workers import new_accelerator

PUBLISHED_WIDTH = 64
L1_WEIGHT = 0.1
_JUDGED = 512
_MODEL, _REPORT = "model", "report.json"
Tick = Callable[[int, int], object]
"""(done, of how many) -> anything."""


@explains_memory(explain_decoder)
def train_decoder(recipe: DecoderRecipe, folder: Path, tick: Tick = lambda done, of: None) -> dict[str, Any]:
    """Fill `folder`: `model` (AutoencoderTiny), `report.json`, `look.png`; returns the report. Run again to go on.

    `tick` hears how far encoding is; training writes `fit/metrics.jsonl`. Raises RecipeError for a decoder that costs too much,
    OutOfMemory where memory does not reach, LedgerConflict for a folder that holds a finished one of another recipe.
    """
    if (folder / _REPORT).exists() and (folder / _MODEL).exists():
        report = json.loads((folder / _REPORT).read_text())
        _refuse_another(recipe, DecoderRecipe.model_validate(report["recipe"]), folder)
        forget_checkpoints(folder / "fit")  # a kill may have left them
        return report
    torch.set_num_threads(recipe.threads)
    quiet()
    accelerator = new_accelerator(recipe.mixed_precision)
    vae = open_vae(recipe.model, recipe.allow_pickle).to(accelerator.device)
    size = recipe.size_px or int(vae.config.sample_size)
    torch.manual_seed(recipe.seed)
    tiny, costs = new_decoder(vae, recipe, size)
    samples = open_samples(Path(recipe.data))
    files = LatentFiles(folder / "latents", samples, vae, size, recipe)
    files.fill(tick)
    identity = decoder_identity(recipe, files.digest)
    tiny.decoder.to(memory_format=torch.channels_last)  # twice as fast on CPUs
    decoder = fit("fit", recipe.fit, identity, tiny.decoder, _loss(recipe, vae, files), folder / "fit", accelerator)
    tiny.decoder = decoder.float().cpu().to(memory_format=torch.contiguous_format)
    _mark_encoder(tiny)
    report = _judge(recipe, vae, tiny.to(accelerator.device), files, folder) | costs
    publish_folder(folder / _MODEL, tiny.cpu().save_pretrained)
    publish_bytes(folder / _REPORT, (json.dumps(report, indent=2) + "\n").encode())
    forget_checkpoints(folder / "fit")
    samples.close()
    return report


def _refuse_another(recipe: DecoderRecipe, there: DecoderRecipe, folder: Path) -> None:
    """A finished decoder must not be taken for one of another recipe."""
    now, then = (decoder_identity(one, "").facts | {"model": one.model, "data": one.data} for one in (recipe, there))
    if found := Identity(now).changes(then):
        raise LedgerConflict(
            f"holds a finished decoder of another recipe: {'; '.join(found)}",
            where=str(folder),
            remedy="Choose another output folder, or go back to those values",
        )


def open_vae(model: str, allow_pickle: bool = False) -> Any:
    """The frozen AutoencoderKL of a pipeline, or of a folder that holds nothing else; float32. Raises StageError."""
    place = resolve(model)
    bare = (Path(place) / "config.json").exists() and not (Path(place) / "model_index.json").exists()
    try:
        found: Any = AutoencoderKL.from_pretrained(
            place, subfolder=None if bare else "vae", dtype=torch.float32, **weights_of(allow_pickle)
        )
    except (OSError, ValueError) as error:
        raise StageError(
            f"the VAE of {model} cannot be opened: {first_line(error)}",
            remedy="Give a diffusers pipeline folder or a folder of an AutoencoderKL",
        ) from error
    return found.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def multiply_accumulates(vae: nn.Module, channels: int, latent_px: int) -> int:
    """Multiply-accumulates of decoding one latent: convolutions, linear layers and both products of attention."""
    latent = torch.zeros(1, channels, latent_px, latent_px, device=next(vae.parameters()).device)
    # The counter knows attention as two products of matrices; the fused kernels of CPUs escape it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.decode(latent)  # pyright: ignore[reportCallIssue]
    return counter.get_total_flops() // 2


def new_decoder(vae: Any, recipe: DecoderRecipe, size_px: int) -> tuple[Any, dict[str, Any]]:
    """An untrained AutoencoderTiny for the VAE's latents, and what both decoders cost. Raises RecipeError if it may not cost so much."""
    stages, channels = len(vae.config.block_out_channels), int(vae.config.latent_channels)
    if len(recipe.blocks) != stages:
        raise RecipeError(
            f"blocks has {len(recipe.blocks)} stages and the VAE {stages}",
            remedy="Give one number a stage, innermost first",
        )
    latent_px = size_px // 2 ** (stages - 1)
    original = multiply_accumulates(vae, channels, latent_px)

    def build(width: int) -> Any:
        return AutoencoderTiny(
            latent_channels=channels,
            decoder_block_out_channels=(width,) * stages,  # diffusers' stages do not change width
            num_decoder_blocks=tuple(recipe.blocks),
            encoder_block_out_channels=(4,) * stages,
            num_encoder_blocks=(0,) * stages,
            scaling_factor=1.0,
            shift_factor=0.0,
        )

    widths = [recipe.width] if recipe.width else range(PUBLISHED_WIDTH, 3, -4)
    for width in widths:
        tiny = build(width)
        own = multiply_accumulates(tiny, channels, latent_px)
        if own <= recipe.max_cost * original:
            parameters = sum(p.numel() for p in tiny.decoder.parameters())
            return tiny, {"width": width, "parameters": parameters, "macs": own, "original_macs": original}
    raise RecipeError(
        f"a decoder of width {widths[-1]} costs more than max_cost ({recipe.max_cost:g}) of the original's {original:,} "
        "multiply-accumulates",
        remedy="Lower width or blocks, or raise max_cost",
    )


def psnr_db(pictures: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """B numbers: peak signal to noise of B 3 H W pictures in [-1, 1], dB, after clamping; equal pictures give 100 or more."""
    error = (pictures.clamp(-1, 1) - wanted.clamp(-1, 1)).div(2).pow(2).mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def _loss(recipe: DecoderRecipe, vae: Any, files: LatentFiles) -> Callable[..., torch.Tensor]:
    order = EndlessOrder(len(files.taught), recipe.seed)

    def loss_at(decoder: nn.Module, _average: object, draw: int, share: slice) -> torch.Tensor:
        rows = [files.taught[i] for i in order.batch(draw, recipe.fit.batch_images)[share]]
        device = next(decoder.parameters()).device
        latents, pictures = files.read(rows)
        latents = latents.to(device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = decode_scaled(vae, latents).clamp(-1, 1) if pictures is None else pictures.to(device)
        made = decoder(latents).float()
        return F.mse_loss(made, wanted) + L1_WEIGHT * F.l1_loss(made, wanted)

    return loss_at


def _mark_encoder(tiny: Any) -> None:
    """Nobody trained the encoder that the class insists on: what it says must not look like latents."""
    with torch.no_grad():
        tiny.encoder.layers[-1].bias.fill_(float("nan"))


@torch.no_grad()
def _judge(recipe: DecoderRecipe, vae: Any, tiny: Any, files: LatentFiles, folder: Path) -> dict[str, Any]:
    """PSNR on held-out samples against the original decoder's own pictures; draws some of both."""
    found: list[float] = []
    look: list[np.ndarray] = []
    device = next(tiny.parameters()).device
    for start in range(0, min(len(files.held_out), _JUDGED), recipe.fit.batch_images):
        rows = files.held_out[start : start + recipe.fit.batch_images]
        latents = files.read(rows)[0].to(device)
        wanted, made = decode_scaled(vae, latents), decode_scaled(tiny, latents)
        found += psnr_db(made, wanted).tolist()
        if not look:
            look = [_strip(wanted[:8]), _strip(made[:8])]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(look)).save(folder / "look.png")
    interval = mean_interval(np.array(found))
    return {
        "psnr_db": round(interval.value, 3),
        "psnr_db_interval": [round(interval.low, 3), round(interval.high, 3)],
        "psnr_db_lowest": round(min(found), 3),
        "judged_pictures": len(found),
        "steps": recipe.fit.steps,
        "recipe": recipe.model_dump(mode="json"),
    }


def _strip(pictures: torch.Tensor) -> np.ndarray:
    rows = pictures.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.concatenate(list(rows), axis=1)
