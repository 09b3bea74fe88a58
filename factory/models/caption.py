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
from factory.models import first_line, pick_device, quiet, resolve, weights_of
from factory.models.answers import read_answer
from factory.models.memory import BatchSize
from factory.models.server import Endpoint, Refusal, ask_or_refusal, serve_vllm
from factory.recipe import CaptionerKeys, OpenAiCaptioner, TransformersCaptioner, VllmCaptioner

_KEY = "factory.make.captioner"


class Describer(Protocol):
    def describe(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """One line a picture (H x W x 3 uint8), chosen greedily: the same picture gives the same caption. A Refusal where a server took
        others and not this one."""
        ...

    def note_usage(self, journal: Path) -> None:
        """Note there what a server is asked from now on (cluster/usage.py); nothing is where the model runs here."""
        ...


def open_captioner(recipe: CaptionerKeys) -> Describer:
    """One that starts a server for itself stops it when it is dropped, or with its process."""
    if isinstance(recipe, OpenAiCaptioner):
        server = Endpoint(recipe.base_url, recipe.model, recipe.prices(), recipe, _KEY)
        return _Asked(recipe, server, recipe.concurrent)
    if isinstance(recipe, VllmCaptioner):
        name = "the captioner's vLLM"
        served = serve_vllm(recipe.model, recipe.environment, recipe.server, name, revision=recipe.revision)
        return _Asked(recipe, served, recipe.concurrent)
    assert isinstance(recipe, TransformersCaptioner)
    return _Transformers(recipe)


class _Transformers:
    def __init__(self, recipe: TransformersCaptioner) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        quiet()
        self.recipe, place = recipe, resolve(recipe.model)
        self.device = pick_device(recipe.device, f"{_KEY}.device")
        self._size = BatchSize(recipe.batch_pictures, f"{_KEY}.batch_pictures")
        try:
            self.processor: Any = AutoProcessor.from_pretrained(place, revision=recipe.revision)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                place, revision=recipe.revision, dtype=recipe.dtype, **weights_of(recipe.allow_pickle)
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

        def run(some: list[np.ndarray]) -> list[str]:
            images = [Image.fromarray(p) for p in some]
            words = [self.recipe.template] * len(some)
            inputs = self.processor(images=images, text=words, return_tensors="pt", padding=True)
            inputs = inputs.to(self.device, self.model.dtype)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                out = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.recipe.max_new_tokens)
            return self.processor.tokenizer.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )

        # Every batch is filled up, so that neighbours and retries change no caption.
        return [str(read_answer(text)) for text in self._size.map(pictures, run)]

    def note_usage(self, journal: Path) -> None:
        """Nothing is asked."""


class _Asked:
    def __init__(self, recipe: CaptionerKeys, endpoint: Endpoint, concurrent: int) -> None:
        self.recipe, self.endpoint, self.concurrent = recipe, endpoint, concurrent

    def describe(self, pictures: Sequence[np.ndarray]) -> list[str]:
        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(self._ask, pictures))

    def note_usage(self, journal: Path) -> None:
        self.endpoint.meter.note_in(journal)

    def _ask(self, picture: np.ndarray) -> str:
        said = ask_or_refusal(self.endpoint, self._question(picture), self._question(_GREY))
        return said if isinstance(said, Refusal) else str(read_answer(said))

    def _question(self, picture: np.ndarray) -> dict[str, Any]:
        sink = io.BytesIO()
        Image.fromarray(picture).save(sink, format="PNG")
        shown = f"data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}"
        content = [
            {"type": "text", "text": self.recipe.template},
            {"type": "image_url", "image_url": {"url": shown}},
        ]
        messages = [{"role": "user", "content": content}]
        return {"messages": messages, "temperature": 0, "max_tokens": self.recipe.max_new_tokens}


_GREY = np.full((64, 64, 3), 127, np.uint8)
"""A picture that nobody minds."""
