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
from factory.models.answers import NoAnswer
from factory.recipe.plan import ServerAccess

_LONGEST_WAIT_S = 60.0
_MAX_ANSWER_BYTES = 16 << 20
_MAX_REASON_BYTES, _SHOWN_LETTERS = 4096, 300
_REFUSED = (400, 413, 422)
"""What servers answer to one question that they will not take: moderated, too long, too large. They answer the same to a wrong parameter."""
_OWN_TIMEOUT_S = 600.0
_NAME = "own"
"""What a model is called on a server of ours."""


class Refusal(NoAnswer):
    """In place of an answer: the server would not take this one question, and why in its own words."""


class _Refused(Exception):
    """Its text is the server's words."""


class Endpoint:
    """Somebody's server, and the name of a model there. A key is sent only where `access` names the variable that holds it."""

    def __init__(
        self,
        base_url: str,
        model: str,
        prices: Prices | None = None,
        access: ServerAccess | None = None,
        where: str = "the recipe",
    ) -> None:
        """`where` is the recipe's key that says all this: errors name it. Raises StageError if a key is named that is not there."""
        self._base_url, self.model, self.meter = base_url.rstrip("/"), model, Meter(prices)
        self.access, self.where = access or ServerAccess(), where
        self._answered, self._asking = False, Lock()
        if self.access.key_variable is not None and not os.environ.get(self.access.key_variable):
            raise StageError(
                f"the environment has no variable {self.access.key_variable}, which is to hold the server's key",
                where=f"{where}.key_variable",
                remedy=f"export {self.access.key_variable}=... where the run starts, on a cluster on every node; or name another variable",
            )

    @property
    def url(self) -> str:
        return self._base_url

    @property
    def key(self) -> str | None:
        """None where the recipe names no variable: keys of other servers must not come here."""
        name = self.access.key_variable
        return os.environ.get(name) if name else None

    def has_answered(self) -> None:
        """From now on what is refused is refused for its own sake."""
        self._answered = True

    def see_that_it_answers(self, harmless: Mapping[str, Any]) -> None:
        """After a first refusal: raises StageError if the server refuses a harmless question with the same parameters too."""
        with self._asking:
            if self._answered:
                return
            try:
                ask(self, harmless)
            except _Refused as again:
                raise StageError(
                    f"the model server refuses every question, a harmless one too: {again}",
                    where=self.url,
                    remedy=f"Mend what {self.where} asks of it: the model's name, max_new_tokens, temperature, template, api; then run again",
                ) from None

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
        # Questions wait in its queue, many at once, and nobody pays for the time.
        access = ServerAccess(timeout_s=_OWN_TIMEOUT_S)
        super().__init__("", _NAME, access=access, where="`server.arguments`, or what the recipe")
        self._served, self._one_at_a_time = served, Lock()

    @property
    def url(self) -> str:
        return f"{self._served.url}/v1"

    @property
    def key(self) -> str | None:
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
    says. Raises StageError when it stays away or answers what is no answer, and _Refused (see `ask_or_refusal`).
    """
    what = "chat/completions" if "messages" in body else "completions"
    failure: Exception | None = None
    attempt = 0
    while attempt < endpoint.access.tries:
        life, asked_wait_s = endpoint.life, 0.0
        try:
            answer = _post(endpoint, what, {"model": endpoint.model, **body})
            endpoint.meter.add(answer)
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "messages" in body else choice["text"]
            endpoint.has_answered()
            return (text or "").strip()  # null is how some servers say that the model refused
        except urllib.error.HTTPError as error:
            if error.code == 400 and "response_format" in body:
                body = {name: value for name, value in body.items() if name != "response_format"}
                continue  # a server that does not know it; the template asks for JSON too
            words = f"{error}{_said(error, endpoint.key)}"
            if error.code in _REFUSED:
                raise _Refused(words) from None
            failure = ValueError(words)
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
            if attempt < endpoint.access.tries:
                time.sleep(max(wait_s * 2 ** (attempt - 1), asked_wait_s))
    raise StageError(
        f"the model server did not answer: {failure}",
        where=endpoint.url,
        remedy=f"Start it, check the model's name, what {endpoint.where} asks of it and "
        f"{endpoint.access.key_variable or 'whether it wants a key (key_variable names none)'}, then run again",
    ) from failure


def ask_or_refusal(endpoint: Endpoint, body: Mapping[str, Any], harmless: Mapping[str, Any]) -> str:
    """As `ask`, but a Refusal where the server takes other questions and not this one. Raises StageError if it takes none: before any
    answer came, `harmless`, the same question about nothing, is asked to tell the two apart."""
    try:
        return ask(endpoint, body)
    except _Refused as refused:
        words = str(refused)
    endpoint.see_that_it_answers(harmless)
    return Refusal(f"the model server refused it: {words}")


def _said(error: urllib.error.HTTPError, key: str | None) -> str:
    """What the server gives as its reason, on one line; some repeat the key that they were shown."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        words = " ".join(error.read(_MAX_REASON_BYTES).decode(errors="replace").split())
        words = words.replace(key, "***") if key else words
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


def _post(endpoint: Endpoint, what: str, body: Mapping[str, Any]) -> Any:
    url, key = f"{endpoint.url}/{what}", endpoint.key
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # who is redirected to was not named
    with _opener(url).open(request, timeout=endpoint.access.timeout_s) as answer:
        data = answer.read(_MAX_ANSWER_BYTES + 1)
    if len(data) > _MAX_ANSWER_BYTES:
        raise ValueError(f"it is over {_MAX_ANSWER_BYTES >> 20} MiB long")
    return json.loads(data)


def _opener(url: str) -> urllib.request.OpenerDirector:
    """What listens on this machine's loopback is not asked by way of a proxy, which would see the key."""
    local = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
