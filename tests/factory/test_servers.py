"""Prompts and captions from an OpenAI-compatible server: one runs on loopback and misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.environment import PythonEnvironment
from cluster.errors import StageError
from cluster.usage import JOURNAL, Usage, read_usage
from factory.card import _mark
from factory.models import server as model_server
from factory.models.caption import open_captioner
from factory.models.text import open_writer
from factory.recipe import OpenAiCaptioner, OpenAiWriter, VllmCaptioner


class Server:
    """Answers from `script`, (status, body) each, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.script: list[tuple[int, bytes]] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.keys.append(self.headers["Authorization"])
                status, body = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

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
    writer = open_writer(OpenAiWriter(model="m", base_url=server.url, template="write: {attributes}"))
    assert writer.write([{"subject": "fox"}], seed=1) == ["a red fox"]
    assert [a["messages"][0]["content"] for a in server.asked] == ["write: subject: fox"] * 3
    assert set(server.keys) == {"Bearer planted-key"}


def test_our_own_fault_is_not_repeated(server: Server) -> None:
    server.script = [(404, b"no such\nmodel for planted-key")]
    with pytest.raises(StageError, match=r"did not answer: HTTP Error 404: .*\(no such model for \*\*\*\)"):
        open_writer(OpenAiWriter(model="m", base_url=server.url)).write([{"subject": "fox"}], seed=1)
    assert len(server.asked) == 1


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
    assert _mark(recipe) == "owner/llava@0123abc"
