"""Prompts and captions from an OpenAI-compatible server: one runs on loopback and misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.environment import PythonEnvironment
from cluster.errors import StageError
from cluster.stage import Unit, apply
from cluster.usage import JOURNAL, Usage, read_usage
from factory import stages
from factory.ledger import commit_unit
from factory.models import caption, text
from factory.models import server as model_server
from factory.models.answers import NoAnswer
from factory.models.caption import open_captioner
from factory.models.text import open_writer
from factory.provenance import mark_of
from factory.recipe import MakeRecipe, OpenAiCaptioner, OpenAiWriter, VllmCaptioner, VllmWriter
from factory.stages import encode_picture, make_stages


class Server:
    """Answers from `script`, (status, body) each, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.script: list[tuple[int, bytes]] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.seen: list[str | None] = []
        """Keys of those who were sent here."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.keys.append(self.headers["Authorization"])
                status, body = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", body.decode())
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                outer.seen.append(self.headers["Authorization"])
                self.send_error(404)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def answer(words: str) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": words}}]}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(model_server.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key")
    running = Server()
    yield running
    running.http.shutdown()


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.script = [(503, b""), (429, b"slow down"), answer('\n"a red fox"\nand more')]
    keys = {"template": "write: {attributes}", "key_variable": "OPENAI_API_KEY"}
    writer = open_writer(OpenAiWriter(model="m", base_url=server.url, **keys))
    assert writer.write([{"subject": "fox"}], seed=1) == ["a red fox"]
    assert [a["messages"][0]["content"] for a in server.asked] == ["write: subject: fox"] * 3
    assert set(server.keys) == {"Bearer planted-key"}


def test_our_own_fault_is_not_repeated(server: Server) -> None:
    server.script = [(404, b"no such\nmodel for planted-key")]
    with pytest.raises(StageError, match=r"did not answer: HTTP Error 404: .*\(no such model for \*\*\*\)"):
        open_writer(OpenAiWriter(model="m", base_url=server.url, key_variable="OPENAI_API_KEY")).write([{}], seed=1)
    assert len(server.asked) == 1


def test_no_server_gets_a_key_that_was_not_named_for_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment holds OPENAI_API_KEY throughout; the writer and the captioner each send their own or none."""
    monkeypatch.setenv("CAPTIONS_KEY", "other-key")
    server.script = [answer("a fox")]
    open_writer(OpenAiWriter(model="m", base_url=server.url)).write([{}], seed=1)
    captioner = OpenAiCaptioner(model="m", base_url=server.url, key_variable="CAPTIONS_KEY")
    open_captioner(captioner).describe([np.zeros((8, 8, 3), np.uint8)])
    assert server.keys == [None, "Bearer other-key"]
    monkeypatch.delenv("CAPTIONS_KEY")
    with pytest.raises(StageError, match=r"factory\.make\.captioner\.key_variable: .*no variable CAPTIONS_KEY.*export"):
        open_captioner(captioner)
    with pytest.raises(ValueError, match="NAME of an environment variable") as caught:
        OpenAiWriter(model="m", base_url=server.url, key_variable="gsk_planted")
    assert "gsk_planted" not in caught.value.errors()[0]["msg"]


def test_a_key_does_not_follow_a_redirect(server: Server) -> None:
    other = Server()
    other.script = [answer("a fox")]
    server.script = [(302, other.url.encode())]
    writer = open_writer(OpenAiWriter(model="m", base_url=server.url, key_variable="OPENAI_API_KEY", tries=1))
    with pytest.raises(StageError):
        writer.write([{}], seed=1)
    assert server.keys == ["Bearer planted-key"] and other.seen == [None]
    other.http.shutdown()


def test_tries_and_time_are_the_recipes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [(503, b"")]
    with pytest.raises(StageError, match="did not answer"):
        open_writer(OpenAiWriter(model="m", base_url=server.url, tries=3)).write([{}], seed=1)
    assert len(server.asked) == 3
    waits: list[float] = []
    opener = model_server._opener

    def listening(url: str) -> Any:
        made = opener(url)
        inner = made.open
        made.open = lambda request, timeout: (waits.append(timeout), inner(request, timeout=timeout))[1]
        return made

    monkeypatch.setattr(model_server, "_opener", listening)
    server.script = [answer("a fox")]
    open_writer(OpenAiWriter(model="m", base_url=server.url, timeout_s=7)).write([{}], seed=1)
    assert waits == [7]


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_picture_that_a_server_refuses_dies_alone(
    server: Server, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one at that: whether the server takes anything is asked with a grey picture."""
    monkeypatch.setattr(stages, "set_threads", lambda threads: None)
    server.script = [(code, b"violates our policy"), answer("grey"), answer("a black square")]
    make = MakeRecipe.model_validate(
        {
            "captioner": {"kind": "openai", "model": "m", "base_url": server.url, "concurrent": 1},
            "scorer": {"model": "zoo:clip"},
        }
    )
    stage = next(s for s in make_stages(make, tmp_path) if s.name == "caption")
    picture = encode_picture(np.zeros((8, 8, 3), np.uint8), "png")
    facts = {"unit": "unit-00000", "prompt": "raw", "outcome": "pending", "reason": "", "picture": picture}
    done = apply(stage, stage.open(), Unit("unit-00000", [{**facts, "id": str(i)} for i in range(3)]))
    assert [row["outcome"] for row in done.rows] == ["dead", "pending", "pending"]
    assert f"HTTP Error {code}" in done.rows[0]["reason"] and "violates our policy" in done.rows[0]["reason"]
    assert [row["prompt"] for row in done.rows] == ["raw", "a black square", "a black square"]
    assert len(server.asked) == 4


def test_half_a_surrogate_pair_in_a_caption_stops_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON may spell one, and no file takes it: the row goes on to the next worker and into the ledger."""
    monkeypatch.setattr(stages, "set_threads", lambda threads: None)
    server.script = [answer("a black square \ud83d")]
    captioner = {"kind": "openai", "model": "m", "base_url": server.url}
    make = MakeRecipe.model_validate({"captioner": captioner, "scorer": {"model": "zoo:clip"}})
    stage = next(s for s in make_stages(make, tmp_path) if s.name == "caption")
    facts = {"id": "0" * 64, "unit": "unit-00000", "prompt": "raw", "outcome": "pending", "reason": ""}
    picture = encode_picture(np.zeros((8, 8, 3), np.uint8), "png")
    done = apply(stage, stage.open(), Unit("unit-00000", [{**facts, "picture": picture}]))
    passed_on = Unit.from_bytes(done.id, done.to_bytes())
    assert [row["prompt"] for row in passed_on.rows] == ["a black square ?"]
    commit_unit(tmp_path, passed_on.rows)


def test_a_prompt_that_a_server_refuses_says_why(server: Server) -> None:
    server.script = [answer("a fox"), (400, b"content_filter"), answer("an owl")]
    writer = open_writer(OpenAiWriter(model="m", base_url=server.url, concurrent=1))
    found = writer.write([{"subject": name} for name in ("fox", "knife", "owl")], seed=1)
    assert found == ["a fox", "", "an owl"] and isinstance(found[1], NoAnswer) and "content_filter" in found[1].why
    assert len(server.asked) == 3, "after an answer nothing has to be proven"


def test_a_server_that_refuses_everything_stops_the_run(server: Server) -> None:
    server.script = [(400, b"max_tokens is too large")]
    writer = open_writer(OpenAiWriter(model="m", base_url=server.url, concurrent=4))
    with pytest.raises(
        StageError, match=r"refuses every question.*max_tokens is too large.*factory\.plan\.writer asks"
    ):
        writer.write([{"subject": "fox"}] * 8, seed=1)
    assert server.asked[-1]["messages"][0]["content"] == " =>", "the harmless question is the template about nothing"


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}'])
def test_an_answer_that_is_none_is_a_plain_error(server: Server, body: bytes) -> None:
    server.script = [(200, body)]
    with pytest.raises(StageError, match="no chat completion") as caught:
        open_writer(OpenAiWriter(model="m", base_url=server.url)).write([{"subject": "fox"}], seed=1)
    assert "planted-key" not in str(caught.value)


def test_an_endless_answer_is_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_server, "_MAX_ANSWER_BYTES", 1000)
    server.script = [answer("fox " * 1000)]
    with pytest.raises(StageError, match="MiB long"):
        open_writer(OpenAiWriter(model="m", base_url=server.url)).write([{"subject": "fox"}], seed=1)


def test_pictures_are_shown_to_the_captioner_and_what_it_takes_is_noted(server: Server, tmp_path: Path) -> None:
    status, body = answer("a black square")
    server.script = [
        (status, json.dumps(json.loads(body) | {"usage": {"prompt_tokens": 90, "completion_tokens": 5}}).encode())
    ]
    keys = {"price_input": 1.0, "price_output": 2.0}
    captioner = open_captioner(OpenAiCaptioner(model="m", base_url=server.url, **keys))
    captioner.note_usage(journal := tmp_path / f"unit-00000{JOURNAL}")
    assert captioner.describe([np.zeros((8, 8, 3), np.uint8)]) == ["a black square"]
    question, picture = server.asked[0]["messages"][0]["content"]
    assert question["text"] == "Describe the picture in one sentence."
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert read_usage([journal]) == Usage(1, 90, 5, 0, 100e-6)


def test_a_server_of_our_own_is_asked_as_many_at_once_as_the_recipe_says(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All are on their way before the first is answered, or the barrier breaks: 24 as by default, three where the recipe says three."""
    keys = {"model": "m", "environment": "vllm"}
    for more, most in (({}, 24), ({"concurrent": 3}, 3)):
        here = Barrier(most)
        monkeypatch.setattr(text, "serve_vllm", lambda *rest, **how: model_server.Endpoint(server.url, "own"))
        monkeypatch.setattr(caption, "serve_vllm", lambda *rest, **how: model_server.Endpoint(server.url, "own"))

        def ask(endpoint: Any, body: Any, harmless: Any, here: Barrier = here) -> str:
            here.wait(10)
            return "a fox"

        monkeypatch.setattr(text, "ask_or_refusal", ask)
        monkeypatch.setattr(caption, "ask_or_refusal", ask)
        writer = open_writer(VllmWriter.model_validate({**keys, **more}))
        assert writer.write([{}] * 24, seed=1) == ["a fox"] * 24
        describer = open_captioner(VllmCaptioner.model_validate({**keys, **more}))
        assert describer.describe([np.zeros((8, 8, 3), np.uint8)] * 24) == ["a fox"] * 24


def test_a_pinned_revision_goes_to_the_captioners_vllm_and_into_the_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(model_server, "find_environment", lambda name: PythonEnvironment(tmp_path, {}))
    monkeypatch.setattr(model_server, "Served", started.append)
    recipe = VllmCaptioner(model="owner/llava", revision="0123abc", environment="vllm")
    open_captioner(recipe)
    words = " ".join(started[0].command(8000))
    assert "--model owner/llava" in words and "--revision 0123abc" in words
    assert mark_of(recipe) == "owner/llava@0123abc"


@pytest.mark.parametrize("kind", [VllmWriter, VllmCaptioner])
@pytest.mark.parametrize("word", ["--trust-remote-code", "--trust_remote_code", "--trust-remote-code=true", "--trust"])
def test_code_of_a_model_is_not_run_unless_its_commit_is_named(
    kind: type[VllmWriter | VllmCaptioner], word: str
) -> None:
    keys = {"environment": "vllm", "server": {"arguments": ["--max-model-len", "4096", word]}}
    with pytest.raises(ValidationError, match="code that comes with someone/model"):
        kind.model_validate({"model": "someone/model", **keys})
    kind.model_validate({"model": "someone/model", "revision": "0123abc", **keys})
    kind.model_validate({"model": "/models/mine", **keys})
    keys["server"]["arguments"] += ["--revision", "0123abc"]
    kind.model_validate({"model": "someone/model", **keys})
