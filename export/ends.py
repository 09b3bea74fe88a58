"""Builds that take guidance, proven at either end of their range too: pictures beside PyTorch's, by the gates of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from export import parity
from export.guidance import ENDS
from export.recipe import GateRecipe
from export.runtime import Build

_PICTURES = 8
"""Prompts whose pictures judge an end, at most."""

Pictures = Mapping[str, Sequence[np.ndarray]]


def draw_ends(build: Build, tokens: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """End of the range to the pictures of the first prompts (picture i: seed i); empty where guidance is fixed."""
    known, some = build.scheduler.get("guidance"), tokens[:_PICTURES]
    return {end: build.at(known[end]).pictures(some, range(len(some))) for end in ENDS} if known else {}


def prove_ends(
    build: Build,
    tokens: Sequence[np.ndarray],
    wanted: Pictures,
    precisions: dict[str, str],
    gates: GateRecipe,
    decoder_tiled: bool,
) -> tuple[dict[str, Any], list[str]]:
    """`ends` for a build's parity (nothing where guidance is fixed), and in words which gates it misses there."""
    proof: dict[str, Any] = {}
    missed: list[str] = []
    for end, pictures in draw_ends(build, tokens).items():
        scale = build.scheduler["guidance"][end]
        proof[end] = {"scale": scale, **parity.picture_parity(wanted[end], pictures)}
        found = parity.failures(precisions, {"graph_snr_db": {}, **proof[end]}, pictures, gates, decoder_tiled)
        missed += [f"at guidance {scale:g}: {what}" for what in found]
    return ({"ends": proof} if proof else {}), missed
