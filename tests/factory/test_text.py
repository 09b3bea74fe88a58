"""The prompt writer that speaks OpenAI's protocol, against a real HTTP server in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.errors import StageError, TargetUnavailable
from factory.models.text import open_writer, spell
from factory.recipe import OpenAiWriter, TransformersWriter, VllmWriter

RECORDS = [{"subject": "fox", "style": "flat"}, {"subject": "owl", "style": "3d"}]


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was asked and its seed, as a chat completion."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f'\n"{asked["messages"][0]["content"]} #{asked["seed"]}"\nsecond line'
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()


def test_every_record_gets_the_first_line_of_its_own_answer(server: str) -> None:
    writer = open_writer(OpenAiWriter(model="any", base_url=server, template="draw {attributes}"))
    assert writer.write(RECORDS, seed=5) == ["draw subject: fox; style: flat #5", "draw subject: owl; style: 3d #6"]


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.models.server.time.sleep", lambda seconds: None)
    writer = open_writer(OpenAiWriter(model="any", base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(StageError, match=r"127\.0\.0\.1:9.*did not answer"):
        writer.write(RECORDS, seed=5)


def test_vllm_is_asked_for_in_words_where_it_is_missing(tiny_models) -> None:
    with pytest.raises(TargetUnavailable, match="pip install vllm"):
        open_writer(VllmWriter(model=str(tiny_models / "writer")))


def test_transformers_writes_the_same_for_the_same_seed(tiny_models) -> None:
    writer = open_writer(TransformersWriter(model=str(tiny_models / "writer"), max_new_tokens=12, batch_prompts=1))
    assert writer.write(RECORDS, seed=5) == writer.write(RECORDS, seed=5) != writer.write(RECORDS, seed=6)


def test_a_record_is_spelt_in_its_own_order() -> None:
    assert spell({"b": "1", "a": "2"}) == "b: 1; a: 2"
