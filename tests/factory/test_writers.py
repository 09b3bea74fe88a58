"""One contract for every prompt writer; then what servers charge, and what models wrap their answers in."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StageError, TargetUnavailable
from cluster.usage import JOURNAL, Meter, Prices, Usage, files_of_usage, read_usage
from factory.models import server as model_server
from factory.models import text as writers
from factory.models.answers import NoAnswer, read_answer
from factory.models.server import Endpoint
from factory.models.text import PromptWriter, open_writer, spell
from factory.plan import make_plan
from factory.recipe import FactoryRecipe, OpenAiWriter, TransformersWriter, VllmWriter
from factory.units import read_table
from tests.answering import Answer, Answering

RECORDS = [{"subject": name, "style": "flat"} for name in ("fox", "owl", "key", "cup", "bus", "elk", "ant")]


class Echo(Answering):
    """A chat and completions server: says what it was asked and with which seed, out of order, and counts tokens by words."""

    def __init__(self) -> None:
        self.busy: list[dict[str, str]] = []
        self.asked: list[dict[str, Any]] = []
        self.counts = True
        self.refuses, self.knows_json = 0, True
        self.bad = 0
        """So many next answers are no JSON."""
        self.lives: int | None = None
        """So many answers more; what is asked after them is refused."""
        self.lock = threading.Lock()
        super().__init__()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        time.sleep(random.random() / 100)
        with self.lock:
            self.asked.append(body)
            if self.lives == 0:
                return 404, {}, {}
            self.lives = None if self.lives is None else self.lives - 1
            busy = self.busy.pop() if self.busy else None
            bad = self.bad > 0
            self.bad -= bad
            refused = self.refuses > 0
            self.refuses -= refused
        if busy is not None:
            return 429, {}, busy
        if "response_format" in body and not self.knows_json:
            return 400, {"error": "unknown field response_format"}, {}
        chat = path.endswith("/chat/completions")
        text = body["messages"][0]["content"] if chat else body["prompt"]
        said = f"{text} #{body['seed']}"
        if "response_format" in body:
            said = "I would rather not" if bad else f"```json\n{json.dumps({'prompt': said})}\n```"
        choice = {"message": {"content": None if refused else said}} if chat else {"text": f"\n{said}\nsecond line"}
        usage = {"usage": {"prompt_tokens": len(text.split()), "completion_tokens": 10}} if self.counts else {}
        return 200, {"choices": [choice], **usage}, {}


@pytest.fixture
def echo() -> Iterator[Echo]:
    running = Echo()
    yield running
    running.http.shutdown()


Make = Callable[[Echo, Path, pytest.MonkeyPatch], PromptWriter]


def openai(**keys: Any) -> Make:
    return lambda echo, models, patch: open_writer(OpenAiWriter(model="any", base_url=echo.url, **keys))


def here_json(echo: Echo, models: Path, patch: pytest.MonkeyPatch) -> PromptWriter:
    """An untrained model answers no JSON: every prompt knows that."""
    keys = {"max_new_tokens": 12, "answer": "json"}
    return open_writer(TransformersWriter(model=str(models / "writer"), **keys))


def served_vllm_json(echo: Echo, models: Path, patch: pytest.MonkeyPatch) -> PromptWriter:
    patch.setattr(writers, "serve_vllm", lambda *given: Endpoint(echo.url, "own"))
    return open_writer(VllmWriter(model=str(models / "writer"), environment="vllm", answer="json"))


def served_vllm(echo: Echo, models: Path, patch: pytest.MonkeyPatch) -> PromptWriter:
    """vLLM's writer with the server that it starts replaced by ours; the real one is tests/factory/test_vllm.py."""
    patch.setattr(writers, "serve_vllm", lambda *given: Endpoint(echo.url, "own"))
    return open_writer(VllmWriter(model=str(models / "writer"), environment="vllm"))


def here(echo: Echo, models: Path, patch: pytest.MonkeyPatch) -> PromptWriter:
    return open_writer(TransformersWriter(model=str(models / "writer"), max_new_tokens=12, batch_prompts=3))


WRITERS: dict[str, Make] = {
    "transformers": here,
    "openai, chat": openai(),
    "openai, completions, one at a time": openai(api="completions", concurrent=1),
    "openai, JSON": openai(answer="json"),
    "vllm, served": served_vllm,
    "vllm, served, JSON": served_vllm_json,
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_every_writer(
    name: str, echo: Echo, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = WRITERS[name](echo, tiny_models, monkeypatch)
    writer.note_usage(journal := tmp_path / f"part{JOURNAL}")
    first = writer.write(RECORDS, seed=5)
    assert len(first) == len(RECORDS) and all("\n" not in prompt and '"' not in prompt for prompt in first)
    assert writer.write(RECORDS, seed=5) == first != writer.write(RECORDS, seed=6)
    assert writer.write([], seed=5) == []
    if name != "transformers":
        assert all(
            f"{spell(r)} =>" in p and p.endswith(f"#{5 + i}")
            for i, (r, p) in enumerate(zip(RECORDS, first, strict=True))
        )
        usage = read_usage([journal])
        assert usage.answers == 3 * len(RECORDS) and usage.output_tokens == 30 * len(RECORDS) and not usage.uncounted
    assert journal.exists() == (name != "transformers")
    writer.close()


def test_a_model_here_may_answer_json_too(echo: Echo, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = here_json(echo, tiny_models, monkeypatch).write(RECORDS[:2], seed=5)
    assert all(isinstance(prompt, NoAnswer) and "no JSON object" in prompt.why for prompt in found)
    said = ['Sure: {"prompt": "a red fox"}']
    writer: Any = here_json(echo, tiny_models, monkeypatch)
    monkeypatch.setattr(writer.tokenizer, "batch_decode", lambda *given, **keys: said)
    assert writer.write(RECORDS[:1], seed=5) == ["a red fox"]


def test_a_record_is_spelt_in_its_own_order() -> None:
    assert spell({"b": "1", "a": "2"}) == "b: 1; a: 2"


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_server.time, "sleep", lambda seconds: None)
    writer = open_writer(OpenAiWriter(model="any", base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(StageError, match=r"127\.0\.0\.1:9.*did not answer"):
        writer.write(RECORDS, seed=5)


def test_vllm_is_asked_for_in_words_where_it_is_missing(tiny_models: Path) -> None:
    with pytest.raises(TargetUnavailable, match="pip install vllm"):
        open_writer(VllmWriter(model=str(tiny_models / "writer")))


def test_a_busy_server_is_left_alone_as_long_as_it_asks(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(model_server.time, "sleep", waits.append)
    for told in (
        ("9999", "Wed, 21 Oct", "7.5"),
        ("nan", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2099 07:28:00 GMT"),
    ):
        echo.busy = [{"Retry-After": wait} for wait in told]
        assert len(open_writer(OpenAiWriter(model="m", base_url=echo.url)).write(RECORDS[:1], seed=1)) == 1
    assert [wait for wait in waits if wait >= 1] == [7.5, 2.0, 60.0, 60.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("a red fox", "a red fox"),
        ('\n  "a red fox"\nand more', "a red fox"),
        ("\u201ca red fox\u201d", "a red fox"),
        ("```\na red fox\n```", "a red fox"),
        ("Sure! Here is your prompt:\n\na red fox", "a red fox"),
        ("Here's a vivid prompt:\n**Prompt:** a red fox", "a red fox"),
        ("Prompt: 'a red fox'", "a red fox"),
        ("1. prompt: a red fox", "a red fox"),
        ('a fox that says "hello"', 'a fox that says "hello'),
        ("Here be dragons, 3d render", "Here be dragons, 3d render"),
        ("a red fox \ud83d", "a red fox ?"),
    ],
)
def test_what_is_wrapped_around_a_text_is_taken_off(answer: str, prompt: str) -> None:
    assert read_answer(answer) == prompt


@pytest.mark.parametrize(
    "answer",
    [
        '{"prompt": "a red fox"}',
        '```json\n{"prompt": "a red fox"}\n```',
        'Here is the JSON: {"prompt": "a red\n fox", "style": "flat"} Enjoy!',
        '[{"prompt": " a red fox "}]',
        'The set {a, b} is not it: {"prompt": "a red fox"}',
    ],
)
def test_common_faults_of_json_are_mended(answer: str) -> None:
    assert read_answer(answer, "json") == "a red fox"


def test_half_a_surrogate_pair_in_json_becomes_a_question_mark() -> None:
    assert read_answer(r'{"prompt": "a red fox \ud83d"}', "json") == "a red fox ?"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("a red fox", "no JSON object"),
        ('{"prompt": "a red', "no JSON object"),
        ('{"text": "a red fox"}', "under `prompt`"),
        ('{"prompt": 3}', "under `prompt`"),
        ('{"prompt": "  "}', "is empty"),
        ('[{"prompt": "a"}, {"prompt": "b"}]', "no JSON object"),
        ("[" * 100_000, "no JSON object"),
    ],
)
def test_what_cannot_be_mended_is_refused_with_the_reason(answer: str, why: str) -> None:
    found = read_answer(answer, "json")
    assert found == "" and isinstance(found, NoAnswer) and why in found.why


def plan_recipe(tmp_path: Path, url: str, prompts: int, **writer: Any) -> FactoryRecipe:
    taxonomy = tmp_path / "t.yaml"
    taxonomy.write_text("groups: [{name: a, share: 1, attributes: {subject: [fox, owl, key]}}]")
    return FactoryRecipe.model_validate(
        {
            "plan": {
                "taxonomy": str(taxonomy),
                "prompts": prompts,
                "tries": 2,
                "images_per_prompt": 2,
                "writer": {"kind": "openai", "model": "m", "base_url": url, "max_new_tokens": 10, **writer},
            },
            "make": {
                "teacher": {"model": "zoo:teacher", "size_px": 64, "batch_images": 4},
                "scorer": {"model": "zoo:clip"},
            },
        }
    )


def test_a_refused_answer_is_written_anew_and_then_dead_with_its_reason(echo: Echo, tmp_path: Path) -> None:
    recipe = plan_recipe(tmp_path, echo.url, 6, answer="json", concurrent=1)
    echo.bad = 8  # six of the first try, and two of the second
    table = read_table(make_plan(recipe, 0, tmp_path / "data"))
    dead = table.filter([outcome == "dead" for outcome in table["outcome"].to_pylist()])
    assert (
        len(table) == 12
        and len(dead) == 4
        and set(dead["reason"].to_pylist()) == {"plan: the answer is no JSON object"}
    )


def test_what_was_spent_lies_with_the_prompts_and_is_counted_once(
    echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three parts; the third would overrun. A rerun asks nobody, a higher limit goes on, and the plan is that of an unlimited run."""
    monkeypatch.setattr("factory.plan.PART_PROMPTS", 8)
    keys = {"price_input": 1_000.0, "price_output": 500_000.0}  # a read token 0.001, a written one 0.5
    tight = plan_recipe(tmp_path, echo.url, 24, **keys, max_cost=100.0)
    data = tmp_path / "data"
    for _ in range(2):
        with pytest.raises(StageError, match=r"max_cost.*is spent, and the next 8 prompts"):
            make_plan(tight, 0, data)
        assert len(echo.asked) == 16
    make_plan(plan_recipe(tmp_path, echo.url, 24, **keys, max_cost=1000.0), 0, data)
    assert len(echo.asked) == 24
    spent = read_usage((data / "plan").glob("*.parquet"))
    words = sum(len(body["messages"][0]["content"].split()) for body in echo.asked)
    assert (spent.answers, spent.input_tokens, spent.output_tokens, spent.uncounted) == (24, words, 240, 0)
    assert spent.cost == pytest.approx(words * 0.001 + 240 * 0.5)
    make_plan(plan_recipe(tmp_path, echo.url, 24), 0, tmp_path / "other")
    assert (tmp_path / "other" / "plan.parquet").read_bytes() == (data / "plan.parquet").read_bytes()
    assert read_usage((tmp_path / "other" / "plan").glob("*.parquet")).cost is None


@pytest.mark.parametrize("how", ["the server counts nothing", "the first part had no prices"])
def test_what_nobody_counted_counts_as_the_longest(
    how: str, echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.plan.PART_PROMPTS", 8)
    data, keys = tmp_path / "data", {"price_input": 0.0, "price_output": 1e6}  # 80 for 8 prompts at the longest
    if how == "the server counts nothing":
        echo.counts = False
    else:
        make_plan(plan_recipe(tmp_path, echo.url, 8), 0, data)
        (data / "plan.parquet").unlink()
    with pytest.raises(StageError, match=r"80\.00 is spent"):
        make_plan(plan_recipe(tmp_path, echo.url, 24, **keys, max_cost=150.0), 0, data)
    assert len(echo.asked) == 8


def test_a_model_that_refuses_is_asked_anew(echo: Echo, tmp_path: Path) -> None:
    echo.refuses = 7
    rows = read_table(make_plan(plan_recipe(tmp_path, echo.url, 6, concurrent=1), 0, tmp_path / "data")).to_pylist()
    dead = [row["reason"] for row in rows if row["outcome"] == "dead"]
    assert len(rows) == 12 and dead == ["plan: the answer is empty"] * 2


def test_a_server_that_does_not_know_response_format_is_asked_without(echo: Echo) -> None:
    echo.knows_json = False
    writer = open_writer(
        OpenAiWriter(model="m", base_url=echo.url, answer="json", template='Like {"prompt": "a {attributes}"}, no {}')
    )
    assert writer.write([{"subject": "fox"}], seed=1) == ["a subject: fox"]


def test_the_first_prompts_are_reckoned_at_the_longest_answers(echo: Echo, tmp_path: Path) -> None:
    recipe = plan_recipe(tmp_path, echo.url, 6, price_input=0.0, price_output=1e6, max_cost=59.0)
    with pytest.raises(StageError, match=r"0\.00 is spent, and the next 6 prompts would cost about 60\.00"):
        make_plan(recipe, 0, tmp_path / "data")
    assert not echo.asked


def test_a_server_that_does_not_count_is_said_to(echo: Echo, tmp_path: Path) -> None:
    echo.counts = False
    writer = open_writer(OpenAiWriter(model="m", base_url=echo.url, price_input=1, price_output=1))
    writer.note_usage(journal := tmp_path / f"part{JOURNAL}")
    writer.write(RECORDS, seed=1)
    assert read_usage([journal]) == Usage(len(RECORDS), 0, 0, len(RECORDS), 0.0)


@pytest.mark.parametrize("told", [None, [], {"usage": 3}, {"usage": {"prompt_tokens": "7", "completion_tokens": -1}}])
def test_odd_counts_are_no_counts(told: Any, tmp_path: Path) -> None:
    meter = Meter(Prices(1, 1))
    meter.note_in(journal := tmp_path / f"part{JOURNAL}")
    meter.add(told)
    assert read_usage([journal]).uncounted == 1


def test_what_an_unfinished_file_of_prompts_cost_is_not_forgotten(echo: Echo, tmp_path: Path) -> None:
    """The server goes away after five answers: they count against max_cost at once, and in the file's sum once it is written."""
    keys = {"price_input": 0.0, "price_output": 1e6, "concurrent": 1}  # an answer of 10 tokens is 10
    echo.lives = 5
    with pytest.raises(StageError, match="did not answer"):
        make_plan(plan_recipe(tmp_path, echo.url, 8, **keys), 0, data := tmp_path / "data")
    assert read_usage(files_of_usage(data / "plan")).cost == 50
    echo.lives = None
    with pytest.raises(StageError, match=r"50\.00 is spent"):
        make_plan(plan_recipe(tmp_path, echo.url, 8, **keys, max_cost=100.0), 0, data)
    make_plan(plan_recipe(tmp_path, echo.url, 8, **keys, max_cost=200.0), 0, data)
    assert [path.suffix for path in files_of_usage(data / "plan")] == [".parquet"]
    assert read_usage(files_of_usage(data / "plan")).cost == 130


@pytest.mark.parametrize("keys", [{"price_input": 1.0}, {"max_cost": 3.0}])
def test_prices_belong_together(keys: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="price_input and price_output"):
        OpenAiWriter(model="m", base_url="http://x", **keys)
