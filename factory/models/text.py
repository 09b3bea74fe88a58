"""Language models that write prompts: transformers, vLLM, or any server that speaks OpenAI's protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import StageError, TargetUnavailable
from factory.models import first_line, pick_device, quiet, resolve, weights_of
from factory.models.answers import read_answer
from factory.models.server import Endpoint, Refusal, ask_or_refusal, serve_vllm
from factory.recipe import OpenAiWriter, TransformersWriter, VllmWriter, WriterKeys

_KEY = "factory.plan.writer"

Record = Mapping[str, str]


class PromptWriter(Protocol):
    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        """One prompt a record, in their order; the same seed gives the same prompts on the same machine. NoAnswer where there is none."""
        ...

    def note_usage(self, journal: Path) -> None:
        """Note there what a server is asked from now on (cluster/usage.py); nothing is where the model runs here."""
        ...

    def close(self) -> None: ...


def open_writer(recipe: WriterKeys, log: Path | None = None) -> PromptWriter:
    """`log` is where a server that the writer starts for itself says what it does; close the writer to stop it."""
    if isinstance(recipe, OpenAiWriter):
        server = Endpoint(recipe.base_url, recipe.model, recipe.prices(), recipe, _KEY)
        return _Asked(recipe, recipe.api, server, recipe.concurrent)
    if isinstance(recipe, VllmWriter):
        if recipe.environment is None:
            return _Vllm(recipe)
        name = "the prompt writer's vLLM"
        served = serve_vllm(recipe.model, recipe.environment, recipe.server, name, log, recipe.revision)
        return _Asked(recipe, recipe.api, served, recipe.concurrent)
    assert isinstance(recipe, TransformersWriter)
    return _Transformers(recipe)


@contextmanager
def opened_late(
    recipe: WriterKeys, log: Path, took: Callable[[float], None] = lambda seconds: None
) -> Generator[Callable[[], PromptWriter]]:
    """A function that gives the writer, opened at the first call and closed with the block. `took` is told the seconds of either."""
    opened: list[PromptWriter] = []

    def get() -> PromptWriter:
        if not opened:
            began = time.perf_counter()
            opened.append(open_writer(recipe, log))
            took(time.perf_counter() - began)
        return opened[0]

    try:
        yield get
    finally:
        began = time.perf_counter()
        for writer in opened:
            writer.close()
        took(time.perf_counter() - began)


def spell(record: Record) -> str:
    """`subject: fox; style: flat`, in the record's order."""
    return "; ".join(f"{key}: {value}" for key, value in record.items())


def filled(template: str, record: Record) -> str:
    """The template with the record in place of `{attributes}`. Other braces stay: who wants JSON shows some."""
    return template.replace("{attributes}", spell(record))


class _Here:
    """A model in this process: nobody counts its tokens, and nothing is held beyond the process."""

    def note_usage(self, journal: Path) -> None:
        """Nothing is asked."""

    def close(self) -> None:
        """Nothing is held."""


class _Transformers(_Here):
    def __init__(self, recipe: TransformersWriter) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet()
        self.recipe, place, commit = recipe, resolve(recipe.model), recipe.revision
        self.device = pick_device(recipe.device, f"{_KEY}.device")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place, revision=commit, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(
                place, revision=commit, dtype=recipe.dtype, **weights_of(recipe.allow_pickle)
            )
        except (OSError, ValueError) as error:
            raise StageError(
                f"the prompt writer {recipe.model} cannot be opened: {first_line(error, 'factory.plan.writer.allow_pickle')}",
                remedy="Check factory.plan.writer.model; hub names need a network or a filled cache",
            ) from error
        self.model: Any = model.eval().to(self.device)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        import torch

        found: list[str] = []
        for start in range(0, len(records), self.recipe.batch_prompts):
            part = [filled(self.recipe.template, r) for r in records[start : start + self.recipe.batch_prompts]]
            torch.manual_seed(seed + start)
            tokens = self.tokenizer(part, return_tensors="pt", padding=True, return_token_type_ids=False)
            tokens = tokens.to(self.device)
            out = self.model.generate(
                **tokens,
                do_sample=self.recipe.temperature > 0,
                temperature=self.recipe.temperature or None,
                max_new_tokens=self.recipe.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = out[:, tokens["input_ids"].shape[1] :]
            said = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            found += [read_answer(text, self.recipe.answer) for text in said]
        return found


class _Vllm(_Here):
    def __init__(self, recipe: VllmWriter) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise TargetUnavailable(
                "vLLM is not installed",
                remedy="Give it an environment of its own, since it pins torch: `edgefusion cluster environment make vllm`, then "
                "--set factory.plan.writer.environment=vllm; or pip install vllm here; or kind: openai",
            ) from error
        self.recipe, self.vllm = recipe, vllm
        self.engine = vllm.LLM(model=resolve(recipe.model), revision=recipe.revision, max_model_len=2048)

    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        options = self.vllm.SamplingParams(
            temperature=self.recipe.temperature,
            max_tokens=self.recipe.max_new_tokens,
            seed=seed,
            stop=["\n"] if self.recipe.answer == "text" else None,
        )
        asked = [filled(self.recipe.template, r) for r in records]
        if self.recipe.api == "chat":
            answers = self.engine.chat([[{"role": "user", "content": text}] for text in asked], options)
        else:
            answers = self.engine.generate(asked, options)
        return [read_answer(answer.outputs[0].text, self.recipe.answer) for answer in answers]


class _Asked:
    """A server that speaks OpenAI's protocol: somebody's, or one that was started for this writer."""

    def __init__(self, recipe: WriterKeys, api: str, endpoint: Endpoint, concurrent: int) -> None:
        self.recipe, self.api, self.endpoint, self.concurrent = recipe, api, endpoint, concurrent

    def write(self, records: Sequence[Record], seed: int) -> list[str]:
        def one(number: int) -> str:
            asked, harmless = (self._question(record, seed + number) for record in (records[number], {}))
            said = ask_or_refusal(self.endpoint, asked, harmless)
            return said if isinstance(said, Refusal) else read_answer(said, self.recipe.answer)

        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(one, range(len(records))))

    def _question(self, record: Record, seed: int) -> dict[str, Any]:
        text = filled(self.recipe.template, record)
        body: dict[str, Any] = {
            "temperature": self.recipe.temperature,
            "max_tokens": self.recipe.max_new_tokens,
            "seed": seed,
        }
        if self.recipe.answer == "json":
            body["response_format"] = {"type": "json_object"}
        if self.api == "completions":
            body["prompt"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        return body

    def note_usage(self, journal: Path) -> None:
        self.endpoint.meter.note_in(journal)

    def close(self) -> None:
        self.endpoint.close()
