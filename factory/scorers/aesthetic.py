"""How pleasing a picture is, by a small head on CLIP embeddings: LAION's linear one or its MLP (768-1024-128-64-16-1, no activations).

Such a head was fitted to the embeddings of ONE CLIP (LAION's: OpenAI's ViT-L/14). With another it means nothing; the width is checked,
the rest is up to the recipe: `clip` opens the head's own CLIP where `make.scorer` is another.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import StageError
from factory.models import resolve
from factory.recipe import OpenClipScorer
from factory.scorers import Batch, Score

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(weight|bias)|(?:(linear|head)\.)?(weight|bias)")


class Aesthetic:
    scores = (Score("aesthetic", None, None, "higher", "the head's rating; LAION's heads were fitted to 1 ... 10"),)

    def __init__(
        self,
        weights: str,
        file: str = "model.safetensors",
        activation: str = "none",
        clip: Any = None,
        revision: str | None = None,
    ) -> None:
        self.layers, self.activation = read_head(weights, file, revision), activation
        self.clip = None
        if clip is not None:
            from factory.models.clip import Clip

            self.clip = Clip(OpenClipScorer(**clip))

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        state = (self.clip.pictures(batch.pictures) if self.clip else batch.embeddings).astype(np.float64)
        width = self.layers[0][0].shape[1]
        if state.shape[1] != width:
            raise StageError(
                f"the aesthetic head reads embeddings of {width}, but CLIP gives {state.shape[1]}",
                where="factory.make.scores",
                remedy="Give it the CLIP that it was fitted to, by its key `clip`",
            )
        for number, (weight, bias) in enumerate(self.layers):
            if number and self.activation == "relu":
                state = np.maximum(state, 0)
            # A row at a time: how many neighbours a picture has must not change its sums.
            state = np.stack([weight @ row for row in state]) + bias
        return {"aesthetic": state[:, 0].tolist()}


def read_head(weights: str, file: str, revision: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weight O x I, bias O) float64 of each layer, from a safetensors file, a folder or a hub name. Raises StageError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = _place(weights, file, revision)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise StageError(
            f"no safetensors file ({error})", where=str(path), remedy="Convert a .pth head first"
        ) from None
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1] or 0), {})[match[2] or match[4]] = tensor.astype(np.float64)
    found = [(layers[i]["weight"], layers[i]["bias"]) for i in sorted(layers) if len(layers[i]) == 2]
    shapes = [weight.shape for weight, _ in found if weight.ndim == 2]
    joined = all(a[0] == b[1] for a, b in pairwise(shapes))
    if not found or len(shapes) != len(layers) or not joined or shapes[-1][0] != 1:
        raise StageError(
            f"holds no head with one output: {sorted(tensors)[:8]}",
            where=str(path),
            remedy="It must hold weight and bias, or layers.N.weight and layers.N.bias",
        )
    return found


def _place(weights: str, file: str, revision: str | None) -> Path:
    place = Path(resolve(weights))
    if place.is_dir():
        return place / file
    if place.exists():
        return place
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(weights, file, revision=revision))
    except Exception as error:  # the hub's errors are many
        raise StageError(
            f"{weights} cannot be fetched ({type(error).__name__})",
            where="factory.make.scores",
            remedy="Give a file or folder, or fill the hub's cache first",
        ) from error
