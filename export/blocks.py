"""The attention blocks of any diffusers UNet and their shapes, found by running it without memory for its weights.

Knows no chips and no tiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from cluster.errors import RecipeError
from trainer.surgery import student_config

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2}
"""Stable Diffusion 1.5's UNet where it differs from diffusers' defaults. Source: its published unet/config.json."""

ARCHITECTURES = ("sd15", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
"""Published architectures that need no weights to be planned for."""

_CLIP_TOKENS = 77


@dataclass(frozen=True)
class Block:
    """One attention block: `queries` tokens of `width` channels look at `keys` tokens of `key_width` channels."""

    name: str
    queries: int
    keys: int
    width: int
    key_width: int
    heads: int
    crossed: bool

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def attention_blocks(config: Mapping[str, Any], side: int, tokens: int = _CLIP_TOKENS) -> list[Block]:
    """The blocks of a UNet with this diffusers config, on a latent of `side` x `side` and `tokens` text tokens, in the order
    they run. Raises RecipeError for a config that is no UNet2DConditionModel's or a side it cannot take.
    """
    try:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(dict(config))
    except (TypeError, ValueError, KeyError) as error:
        raise RecipeError(
            f"the config makes no UNet2DConditionModel: {error}", remedy="Give a diffusers UNet's config.json"
        ) from error
    halvings = len(unet.config.block_out_channels) - 1
    if side < 1 or side % 2**halvings:
        raise RecipeError(
            f"a latent of {side} x {side} cannot be halved {halvings} times",
            remedy=f"Choose a picture size whose latent side is a multiple of {2**halvings}",
        )
    found: list[Block] = []

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            seen = hidden if context is None else context
            found.append(
                Block(
                    name,
                    hidden.shape[1],
                    seen.shape[1],
                    module.to_q.out_features,
                    seen.shape[2],
                    module.heads,
                    context is not None,
                )
            )

        return hook

    for name, module in unet.named_modules():
        # The time embedding of some UNets pools text by an attention of another class; only transformer blocks are tiled.
        if isinstance(module, Attention):
            module.register_forward_pre_hook(note(name), with_kwargs=True)
    with torch.no_grad():
        unet(**_inputs(unet.config, side, tokens), return_dict=False)
    return found


def read_architecture(model: str, size_px: int | None = None) -> tuple[dict[str, Any], int, int]:
    """The UNet config, latent side and text tokens of `zoo:NAME`, a model folder, a config.json or a name of ARCHITECTURES.

    `size_px` is the picture's side; without it the config's own size counts. Raises RecipeError.
    """
    if model in ARCHITECTURES:
        config, factor, tokens = _published(model), 8, _CLIP_TOKENS
    else:
        config, factor, tokens = _from_files(model)
    if size_px is None:
        return config, int(config["sample_size"]), tokens
    if size_px < 1 or size_px % factor:
        raise RecipeError(
            f"a picture of {size_px} px has no whole latent", remedy=f"Choose a multiple of {factor} for --size-px"
        )
    return config, size_px // factor, tokens


def _published(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        teacher: Any = UNet2DConditionModel.from_config(SD15)
    config = dict(teacher.config)
    return config if name == "sd15" else student_config(config, name.removeprefix("bk-sdm-"))  # pyright: ignore[reportArgumentType]


def _from_files(model: str) -> tuple[dict[str, Any], int, int]:
    from factory.models import resolve

    try:
        place = Path(resolve(model))
    except RecipeError as error:
        raise RecipeError(error.what, remedy=f"Give a folder, zoo:NAME or one of {', '.join(ARCHITECTURES)}") from None
    candidates = (place, place / "unet" / "config.json", place / "config.json")
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise RecipeError("holds no UNet config", where=str(place), remedy="Give a folder with unet/config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise RecipeError("is no JSON", where=str(file), remedy="Give a diffusers UNet's config.json") from error
    if not isinstance(config, dict) or "down_block_types" not in config or not config.get("sample_size"):
        raise RecipeError("is no UNet's config", where=str(file), remedy="It needs down_block_types and sample_size")
    vae, tokenizer = place / "vae" / "config.json", place / "tokenizer" / "tokenizer_config.json"
    factor = 2 ** (len(json.loads(vae.read_text())["block_out_channels"]) - 1) if vae.is_file() else 8
    tokens = json.loads(tokenizer.read_text()).get("model_max_length", _CLIP_TOKENS) if tokenizer.is_file() else None
    return config, factor, int(tokens or _CLIP_TOKENS)


def _inputs(config: Any, side: int, tokens: int) -> dict[str, Any]:
    meta = torch.device("meta")
    inputs: dict[str, Any] = {
        "sample": torch.empty(1, config.in_channels, side, side, device=meta),
        "timestep": torch.empty(1, device=meta),
        "encoder_hidden_states": torch.empty(1, tokens, config.cross_attention_dim, device=meta),
    }
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = torch.empty(1, config.time_cond_proj_dim, device=meta)
    if config.addition_embed_type == "text_time":  # SDXL: pooled text and six sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, device=meta),
            "time_ids": torch.empty(1, 6, device=meta),
        }
    return inputs
