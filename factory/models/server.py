"""Language models behind OpenAI's protocol: on a server that somebody runs, or on vLLM that is started for the one who asks."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock
from typing import Any

from cluster.environment import find_environment
from cluster.errors import StageError
from cluster.machine import cache_folder
from cluster.served import Served, ServerRecipe, Service
from cluster.usage import Meter, Prices
from factory.models import resolve

_TRIES = 5
_LONGEST_WAIT_S = 60.0
_MAX_ANSWER_BYTES = 16 << 20
_MAX_REASON_BYTES, _SHOWN_LETTERS = 4096, 300
_NO_KEY = "none"
_NAME = "own"
"""What a model is called on a server of ours."""


class Endpoint:
    """Somebody's server, and the name of a model there. The key comes from OPENAI_API_KEY."""

    def __init__(self, base_url: str, model: str, prices: Prices | None = None) -> None:
        self._base_url, self.model, self.meter = base_url.rstrip("/"), model, Meter(prices)

    @property
    def url(self) -> str:
        return self._base_url

    @property
    def key(self) -> str:
        return os.environ.get("OPENAI_API_KEY", _NO_KEY)

    @property
    def life(self) -> int:
        """How often it was started again."""
        return 0

    def mend(self) -> None:
        """What can be done after a failure: nothing, but to ask again later."""

    def close(self) -> None:
        """Somebody else's server is left alone."""


class _Own(Endpoint):
    """A server that this process started."""

    def __init__(self, served: Served) -> None:
        super().__init__("", _NAME)
        self._served, self._one_at_a_time = served, Lock()

    @property
    def url(self) -> str:
        return f"{self._served.url}/v1"

    @property
    def key(self) -> str:
        return self._served.key

    @property
    def life(self) -> int:
        return self._served.deaths

    def mend(self) -> None:
        """Start it again if it died, or wait while another thread does. Raises StageError once it died too often."""
        with self._one_at_a_time:
            self._served.revive()

    def close(self) -> None:
        self._served.stop()


def serve_vllm(
    model: str, environment: str, server: ServerRecipe, name: str, log: Path | None = None, revision: str | None = None
) -> Endpoint:
    """Start vLLM in its environment and wait until it answers. Raises TargetUnavailable without one, StageError if it will not start."""
    place, found = resolve(model), find_environment(environment)
    words = [
        str(found.python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        place,
        "--served-model-name",
        _NAME,
        *(["--revision", revision] if revision else []),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if Path(place).exists() else {}
    service = Service(
        name=name,
        command=lambda port: [*words, "--host", "127.0.0.1", "--port", str(port), *server.arguments],
        variables=found.variables_for({"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **offline, **server.variables}),
        key_variable="VLLM_API_KEY",
        ready="/v1/models",
        log=log or cache_folder() / "logs" / f"vllm-{os.getpid()}-{uuid.uuid4().hex[:8]}.log",
        recipe=server,
        remedy=f"Mend the cause (the model, memory, `server.arguments`) or the environment {found.folder}, then run the same command again",
    )
    return _Own(Served(service))


def ask(endpoint: Endpoint, body: Mapping[str, Any], wait_s: float = 1.0) -> str:
    """The text of an OpenAI-compatible server's answer to a body with `messages`, or with `prompt` for a plain completion.

    Every answer is noted by the endpoint's meter. Tried again, ever more slowly, when the server is busy or away, and not before it says
    (Retry-After, at most a minute); a server of our own that died is started again as often as its recipe
    says. Raises StageError when it stays away or answers what is no answer.
    """
    what = "chat/completions" if "messages" in body else "completions"
    failure: Exception | None = None
    attempt = 0
    while attempt < _TRIES:
        life, asked_wait_s = endpoint.life, 0.0
        try:
            answer = _post(f"{endpoint.url}/{what}", {"model": endpoint.model, **body}, endpoint.key)
            endpoint.meter.add(answer)
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "messages" in body else choice["text"]
            return (text or "").strip()  # null is how some servers say that the model refused
        except urllib.error.HTTPError as error:
            if error.code == 400 and "response_format" in body:
                body = {name: value for name, value in body.items() if name != "response_format"}
                continue  # a server that does not know it; the template asks for JSON too
            failure = ValueError(f"{error}{_said(error, endpoint.key)}")
            if error.code not in (408, 429) and error.code < 500:
                break  # our own fault: asking again changes nothing
            asked_wait_s = _retry_after(error)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            failure = error
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            failure = ValueError(f"its answer is no {what.replace('/', ' ').removesuffix('s')} ({error})")
        endpoint.mend()
        if endpoint.life == life:
            attempt += 1
            if attempt < _TRIES:
                time.sleep(max(wait_s * 2 ** (attempt - 1), asked_wait_s))
    raise StageError(
        f"the model server did not answer: {failure}",
        where=endpoint.url,
        remedy="Start it, check the model's name, what the recipe asks of it and OPENAI_API_KEY, then run again",
    ) from failure


def _said(error: urllib.error.HTTPError, key: str) -> str:
    """What the server gives as its reason, on one line; some repeat the key that they were shown."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        words = " ".join(error.read(_MAX_REASON_BYTES).decode(errors="replace").split())
        words = words if key == _NO_KEY else words.replace(key, "***")
        return f" ({words[:_SHOWN_LETTERS]})" if words else ""
    return ""


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that a busy server asks to be left alone, by a number or a date (RFC 9110, 10.2.3); 0 if it says nothing that can be understood."""
    told = error.headers.get("Retry-After", "") if error.headers else ""
    try:
        asked_s = float(told)
    except ValueError:
        try:
            asked_s = (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # TypeError: a date without a zone
            return 0.0
    return min(max(asked_s, 0.0), _LONGEST_WAIT_S) if math.isfinite(asked_s) else 0.0


def _post(url: str, body: Mapping[str, Any], key: str) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    with _opener(url).open(request, timeout=120) as answer:
        data = answer.read(_MAX_ANSWER_BYTES + 1)
    if len(data) > _MAX_ANSWER_BYTES:
        raise ValueError(f"it is over {_MAX_ANSWER_BYTES >> 20} MiB long")
    return json.loads(data)


def _opener(url: str) -> urllib.request.OpenerDirector:
    """What listens on this machine's loopback is not asked by way of a proxy, which would see the key."""
    local = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
