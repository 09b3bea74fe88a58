"""CLIP through open_clip: how near a picture is to a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.errors import StageError
from factory.models import pick_device, quiet, resolve
from factory.models.memory import BatchSize
from factory.recipe import OpenClipScorer


def _folder(recipe: OpenClipScorer) -> str:
    """Where its files lie, fetched if it is a hub's. Raises OSError or ValueError if they cannot be."""
    place = resolve(recipe.model)
    if Path(place).exists():
        return place
    from huggingface_hub import snapshot_download

    return snapshot_download(place, revision=recipe.revision, allow_patterns=["open_clip_*", "*.json", "*.txt"])


class Clip:
    """An opened open_clip model with its tokenizer and preprocessing."""

    def __init__(self, recipe: OpenClipScorer) -> None:
        import open_clip

        quiet()
        try:
            folder = _folder(recipe) if recipe.pretrained is None else None
            name = f"local-dir:{folder}" if folder else recipe.model
            if not recipe.allow_pickle:
                _refuse_pickle(recipe, folder)
            opened: Any = open_clip.create_model_from_pretrained(name, pretrained=recipe.pretrained)
            model, self.preprocess = opened
            self.tokenizer: Any = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise StageError(
                f"the scorer {recipe.model} cannot be opened: {str(error).splitlines()[0]}",
                remedy="Check factory.make.scorer: a folder with open_clip_config.json, or a model name with `pretrained`",
            ) from error
        self.device = pick_device()
        self.model: Any = model.float().eval().to(self.device)
        self.batch = recipe.batch_images
        self._size = BatchSize(recipe.batch_images, "factory.make.scorer.batch_images")

    def pictures(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Unit embeddings N x D float32 of H x W x 3 uint8 pictures."""
        import torch

        tensors = [self.preprocess(Image.fromarray(p)) for p in pictures]
        return self._embed(
            tensors, lambda part: self.model.encode_image(torch.stack(part).to(self.device), normalize=True)
        )

    def texts(self, texts: list[str]) -> np.ndarray:
        """Unit embeddings N x D float32 of prompts."""
        return self._embed(
            texts, lambda part: self.model.encode_text(self.tokenizer(part).to(self.device), normalize=True)
        )

    def _embed(self, things: list[Any], encode: Any) -> np.ndarray:
        import torch

        def run(part: list[Any]) -> list[np.ndarray]:
            with torch.inference_mode():
                return list(encode(part).cpu().numpy())

        return np.stack(self._size.map(things, run)).astype(np.float32)


def _refuse_pickle(recipe: OpenClipScorer, folder: str | None) -> None:
    """open_clip takes pickled weights where it finds no others. Raises StageError for those, before they are opened."""
    if folder is not None:
        found = {path.name for path in Path(folder).glob("*") if path.suffix in (".bin", ".pt", ".pth")}
        named = {f"open_clip{middle}_model.safetensors" for middle in ("", "_pytorch")}
        safe = [path for path in Path(folder).glob("*.safetensors") if not found or path.name in named]
        name = "" if safe else ", ".join(sorted(found))
    else:
        import open_clip

        tag = recipe.pretrained or ""
        path = Path(tag)
        if not path.exists():
            path = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(recipe.model, tag)) or "")
        name = path.name if path.suffix in (".bin", ".pt", ".pth") else ""
    if name:
        raise StageError(
            f"the scorer {recipe.model} has pickled weights ({name}), which may run code of their maker",
            remedy="Give weights in safetensors, or say allow_pickle: true beside the scorer's model",
        )
