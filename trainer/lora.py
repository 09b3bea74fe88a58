"""Low-rank adapters in place of full weights: put in, written as a diffusers LoRA, folded into the weights. Needs peft (extra `lora`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from cluster.errors import TargetUnavailable
from trainer.options import LoraRecipe

ADAPTER = "student"
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
)
"""Ends of the names of the layers that get an adapter: those of the published LCM-LoRA (Luo et al., arXiv 2311.05556)."""


def require_peft() -> Any:
    """The package; raises TargetUnavailable."""
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TargetUnavailable(
            "peft is not installed, so trainer.distill.lora cannot be trained",
            remedy="pip install 'edgefusion[lora]', or leave trainer.distill.lora out",
        ) from error
    return peft


def add_lora(unet: UNet2DConditionModel, recipe: LoraRecipe, seed: int) -> UNet2DConditionModel:
    """Freeze `unet` and put adapters beside its layers, in place; they start as no change, the same ones for the same seed."""
    config = require_peft().LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha or recipe.rank,
        init_lora_weights="gaussian",
        target_modules=list(LAYERS),
    )
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=ADAPTER)
    return unet


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads, for the student that phase 2 began with."""
    peft = require_peft()
    layers = peft.get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    metadata = unet.peft_config[ADAPTER].to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=metadata)


def merge_lora(unet: Any) -> UNet2DConditionModel:
    """Fold the adapters into the weights, in place: a plain UNet again."""
    unet.fuse_lora()
    unet.unload_lora()
    return unet
