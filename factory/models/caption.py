"""Vision-language models that say what a picture shows: transformers, or any server that speaks OpenAI's protocol."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cluster.errors import StageError
from factory.models import first_line, quiet, resolve, weights_of
from factory.models.answers import read_answer
from factory.models.server import Endpoint, ask, serve_vllm
from factory.recipe import OpenAiCaptioner, TransformersCaptioner, VllmCaptioner


class Describer(Protocol):
    def describe(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """One line a picture (H x W x 3 uint8), chosen greedily: the same picture gives the same caption."""
        ...

    def note_usage(self, journal: Path) -> None:
        """Note there what a server is asked from now on (cluster/usage.py); nothing is where the model runs here."""
        ...


def open_captioner(recipe: TransformersCaptioner) -> Describer:
    """One that starts a server for itself stops it when it is dropped, or with its process."""
    if isinstance(recipe, OpenAiCaptioner):
        return _Asked(recipe, Endpoint(recipe.base_url, recipe.model, recipe.prices()))
    if isinstance(recipe, VllmCaptioner):
        name = "the captioner's vLLM"
        return _Asked(
            recipe, serve_vllm(recipe.model, recipe.environment, recipe.server, name, revision=recipe.revision)
        )
    return _Transformers(recipe)


class _Transformers:
    def __init__(self, recipe: TransformersCaptioner) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        quiet()
        self.recipe, place = recipe, resolve(recipe.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.processor: Any = AutoProcessor.from_pretrained(place, revision=recipe.revision)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                place, revision=recipe.revision, dtype="float32", **weights_of(recipe.allow_pickle)
            )
        except (OSError, ValueError) as error:
            raise StageError(
                f"the captioner {recipe.model} cannot be opened: {first_line(error, 'factory.make.captioner.allow_pickle')}",
                remedy="Check factory.make.captioner.model; hub names need a network or a filled cache",
            ) from error
        self.model: Any = model.eval().to(self.device)
        self.processor.tokenizer.padding_side = "left"

    def describe(self, pictures: Sequence[np.ndarray]) -> list[str]:
        import torch

        found: list[str] = []
        fill = self.recipe.batch_pictures
        for start in range(0, len(pictures), fill):
            some = [Image.fromarray(p) for p in pictures[start : start + fill]]
            # Filled up to the full batch, so that neighbours and retries change no caption.
            full = some + [some[-1]] * (fill - len(some))
            inputs = self.processor(
                images=full, text=[self.recipe.template] * fill, return_tensors="pt", padding=True
            ).to(self.device)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                out = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.recipe.max_new_tokens)
            new = out[: len(some), inputs["input_ids"].shape[1] :]
            found += [str(read_answer(t)) for t in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return found

    def note_usage(self, journal: Path) -> None:
        """Nothing is asked."""


class _Asked:
    def __init__(self, recipe: TransformersCaptioner, endpoint: Endpoint) -> None:
        self.recipe, self.endpoint = recipe, endpoint

    def describe(self, pictures: Sequence[np.ndarray]) -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self._ask, pictures))

    def note_usage(self, journal: Path) -> None:
        self.endpoint.meter.note_in(journal)

    def _ask(self, picture: np.ndarray) -> str:
        sink = io.BytesIO()
        Image.fromarray(picture).save(sink, format="PNG")
        shown = f"data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}"
        content = [
            {"type": "text", "text": self.recipe.template},
            {"type": "image_url", "image_url": {"url": shown}},
        ]
        messages = [{"role": "user", "content": content}]
        said = ask(self.endpoint, {"messages": messages, "temperature": 0, "max_tokens": self.recipe.max_new_tokens})
        return str(read_answer(said))
