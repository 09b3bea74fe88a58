"""Language models that write prompts: transformers, vLLM, or any server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from cluster.errors import StageError, TargetUnavailable
from factory.models import quiet, resolve
from factory.recipe import OpenAiWriter, TransformersWriter, VllmWriter

Record = Mapping[str, str]


class PromptWriter(Protocol):
    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        """One prompt a record, first line only; the same seed gives the same prompts on the same machine."""
        ...


def open_writer(recipe: TransformersWriter) -> PromptWriter:
    if isinstance(recipe, OpenAiWriter):
        return _OpenAi(recipe)
    return _Vllm(recipe) if isinstance(recipe, VllmWriter) else _Transformers(recipe)


def spell(record: Record) -> str:
    """`subject: fox; style: flat`, in the record's order."""
    return "; ".join(f"{key}: {value}" for key, value in record.items())


def first_line(text: str) -> str:
    """The first line that says something, without quotes around it."""
    return next((line.strip() for line in text.strip().splitlines() if line.strip()), "").strip('"')


class _Transformers:
    def __init__(self, recipe: TransformersWriter) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet()
        self.recipe, place = recipe, resolve(recipe.model)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place, padding_side="left")
            self.model: Any = AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval()
        except (OSError, ValueError) as error:
            raise StageError(
                f"the prompt writer {recipe.model} cannot be opened: {str(error).splitlines()[0]}",
                remedy="Check factory.plan.writer.model; hub names need a network or a filled cache",
            ) from error
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        import torch

        found: list[str] = []
        for start in range(0, len(records), self.recipe.batch_prompts):
            part = [
                self.recipe.template.format(attributes=spell(r))
                for r in records[start : start + self.recipe.batch_prompts]
            ]
            torch.manual_seed(seed + start)
            tokens = self.tokenizer(part, return_tensors="pt", padding=True, return_token_type_ids=False)
            out = self.model.generate(
                **tokens,
                do_sample=self.recipe.temperature > 0,
                temperature=self.recipe.temperature or None,
                max_new_tokens=self.recipe.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = out[:, tokens["input_ids"].shape[1] :]
            found += [first_line(text) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return found


class _Vllm:
    def __init__(self, recipe: TransformersWriter) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise TargetUnavailable(
                "vLLM is not installed",
                remedy="pip install vllm in an environment of its own (it pins torch), or kind: openai",
            ) from error
        self.recipe, self.vllm = recipe, vllm
        self.engine = vllm.LLM(model=resolve(recipe.model), max_model_len=2048)

    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        options = self.vllm.SamplingParams(
            temperature=self.recipe.temperature, max_tokens=self.recipe.max_new_tokens, seed=seed, stop=["\n"]
        )
        asked = [self.recipe.template.format(attributes=spell(r)) for r in records]
        return [first_line(answer.outputs[0].text) for answer in self.engine.generate(asked, options)]


class _OpenAi:
    def __init__(self, recipe: OpenAiWriter) -> None:
        self.recipe = recipe

    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda pair: self._ask(pair[1], seed + pair[0]), enumerate(records)))

    def _ask(self, record: Record, seed: int) -> str:
        return ask_server(
            self.recipe.base_url,
            {
                "model": self.recipe.model,
                "messages": [{"role": "user", "content": self.recipe.template.format(attributes=spell(record))}],
                "temperature": self.recipe.temperature,
                "max_tokens": self.recipe.max_new_tokens,
                "seed": seed,
            },
        )


_TRIES = 5


def ask_server(base_url: str, body: Mapping[str, Any], wait_s: float = 1.0) -> str:
    """First line of the answer of an OpenAI-compatible server; tried again, ever more slowly, when it is busy or away.

    Raises StageError when it stays away or answers what is no answer.
    """
    request = urllib.request.Request(
        f"{base_url.rstrip('/')}/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
        },
    )
    failure: Exception | None = None
    for attempt in range(_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return first_line(json.load(answer)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            failure = error
            if error.code not in (408, 429) and error.code < 500:
                break  # our own fault: asking again changes nothing
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            failure = error
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            failure = ValueError(f"its answer is no chat completion ({error})")
        if attempt + 1 < _TRIES:
            time.sleep(wait_s * 2**attempt)
    raise StageError(
        f"the model server did not answer: {failure}",
        where=base_url,
        remedy="Start it, check the model's name and OPENAI_API_KEY, then run again",
    ) from failure
