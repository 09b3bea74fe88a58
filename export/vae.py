"""Another VAE whose decoder draws in place of a student's own, such as the small one of `edgefusion trainer decoder`; refused where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from cluster.errors import RecipeError, StageError
from export import parity
from export.graph import decoder_graph
from export.runtime import Build
from factory.models import fingerprint, first_line, resolve, weights_of

_KINDS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_REMEDY = "Give OUT/model of `edgefusion trainer decoder --model STUDENT`, or leave export.vae out"


def check_decoder(vae: str) -> str:
    """diffusers' name of what lies there. Raises RecipeError for a folder that is not there, or holds nothing that could decode; opens no weights."""
    place = Path(resolve(vae))
    try:
        kind = json.loads((place / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"export.vae has no config.json that names a VAE: {first_line(error)}", where=str(place), remedy=_REMEDY
        ) from error
    if kind not in _KINDS:
        raise RecipeError(
            f"export.vae holds no {' and no '.join(_KINDS)}, but a {kind}", where=str(place), remedy=_REMEDY
        )
    return kind


def open_decoder(vae: str, pipeline: Any, allow_pickle: bool = False) -> Any:
    """The VAE in the folder `vae`, float32. Raises RecipeError for one that does not read the student's latents as its own does."""
    kind, place = check_decoder(vae), Path(resolve(vae))
    try:
        found = _KINDS[kind].from_pretrained(place, dtype=torch.float32, **weights_of(allow_pickle))
    except (OSError, ValueError, RuntimeError) as error:
        raise StageError(
            f"export.vae cannot be opened: {first_line(error, 'export.allow_pickle')}", where=str(place), remedy=_REMEDY
        ) from error
    if wrong := _misfits(found, pipeline.vae):
        raise RecipeError(f"export.vae does not fit the student: {wrong}", where=str(place), remedy=_REMEDY)
    return found.eval()


def pixels_a_latent(vae: Any) -> int:
    """Side of the square of pixels that one latent becomes."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_facts(
    vae: str, own: Any, drawn: Build, tokens: Sequence[np.ndarray], pictures: Sequence[np.ndarray]
) -> dict[str, Any]:
    """For bundle.json: which VAE draws, and how near its `pictures` come to those of the student's own decoder."""
    graph = decoder_graph(own, torch.zeros(drawn.shape))
    original = Build({**drawn.calls, **parity.torch_calls([graph])}, drawn.scheduler, drawn.shape)
    wanted = original.pictures(tokens, range(len(tokens)))
    return {
        "folder": Path(resolve(vae)).name,
        "sha256": fingerprint(vae),
        "against_own_decoder": parity.picture_parity(wanted, pictures),
    }


def _misfits(vae: Any, own: Any) -> str:
    """Why `vae` cannot stand in for `own`, in words; empty where it can."""
    channels, wanted = vae.config.latent_channels, own.config.latent_channels
    if channels != wanted:
        return f"it decodes latents of {channels} channels, and the student's have {wanted}"
    if pixels_a_latent(vae) != pixels_a_latent(own):
        return f"a latent becomes {pixels_a_latent(vae)} pixels a side, and by the student's own VAE {pixels_a_latent(own)}"
    scale, student = float(vae.config.scaling_factor), float(own.config.scaling_factor)
    # A small decoder is fed the UNet's own latents, and says so by a factor of 1.
    if scale != student and not (isinstance(vae, AutoencoderTiny) and scale == 1):
        return f"its scaling_factor is {scale:g}, and the student's {student:g}"
    if shift := getattr(vae.config, "shift_factor", None):
        return f"it shifts latents (shift_factor {shift:g}), which builds do not"
    return ""
