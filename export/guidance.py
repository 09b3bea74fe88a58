"""Guidance as an input of a build: what the host computes of a scale, and which scales a build takes. Numpy alone, as on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import EdgeFusionError

ENDS = ("low", "high")
"""Of the range in `scheduler.guidance` of bundle.json, where `scale` stands for a picture of which nothing is said, and `width` for the input's."""


def embed_scale(scale: float, width: int) -> np.ndarray:
    """1 x width: sines, then cosines, of 1000 w, where w is the guidance scale minus 1. In double, for angles reach thousands of radians.

    Source: as `trainer.guidance.embed_guidance`.
    """
    angles = (scale - 1) * 1000 * 10000.0 ** -np.linspace(0, 1, width // 2)
    return np.concatenate([np.sin(angles), np.cos(angles)])[None].astype(np.float32)


def guidance_input(scheduler: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a UNet is given besides latent, timestep and text: `guidance`, or nothing where it is fixed."""
    known = scheduler.get("guidance")
    return {} if known is None else {"guidance": embed_scale(known["scale"], known["width"])}


def with_scale(scheduler: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The same constants for another guidance scale. Raises EdgeFusionError for one that the build does not take."""
    known = scheduler.get("guidance")
    if known is None:
        raise EdgeFusionError(
            "the guidance of this build is fixed",
            remedy="Leave the scale out; a student that takes guidance keeps it as an input with export.guidance_range",
        )
    if not known["low"] <= scale <= known["high"]:
        raise EdgeFusionError(
            f"a guidance scale of {scale:g} is none of this build's",
            remedy=f"Choose one from {known['low']:g} to {known['high']:g}",
        )
    return {**scheduler, "guidance": {**known, "scale": float(scale)}}


def spread_scales(scheduler: Mapping[str, Any], count: int) -> Sequence[float | None]:
    """A scale for each of `count` prompts, evenly from one end of the range to the other; None for each where guidance is fixed."""
    known = scheduler.get("guidance")
    if known is None:
        return [None] * count
    return [known["scale"]] if count == 1 else [float(s) for s in np.linspace(known["low"], known["high"], count)]


def guidance_words(scheduler: Mapping[str, Any]) -> str:
    """`3 to 7, 5 where none is said`; empty where guidance is fixed."""
    known = scheduler.get("guidance")
    return "" if known is None else f"{known['low']:g} to {known['high']:g}, {known['scale']:g} where none is said"
