"""The page's server: the next pair of a rater, pictures under names that tell nothing, votes saved at once.

Nothing that the page gets says which model drew what: keys of pictures are random, and both files are named and served alike.
"""

from __future__ import annotations

import datetime
import secrets
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter

from cluster.recipe import Settings
from factory.page_server import PageServer, Refused
from trainer.prefer.study import Study
from trainer.prefer.votes import Vote, Winner

_PAGE = {name: Path(__file__).parent / (name or "page.html") for name in ("", "page.css", "page.js")}


class _Rater(Settings):
    rater: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*$")


class _Choice(_Rater):
    """Body of a vote."""

    pair: int = Field(ge=0)
    choice: Literal["left", "right", "tie"]


class PreferServer(PageServer):
    """Serves one study until closed. Use as a context manager."""

    pictures_at = ("picture",)

    def __init__(self, study: Study, port: int = 0) -> None:
        """Raises EdgeFusionError if the port is taken."""
        self.study = study
        self._keys: dict[str, Path] = {}
        self._key_of: dict[tuple[str, int, str], str] = {}
        self._lock = threading.Lock()
        super().__init__(_PAGE, port)

    def get(self, what: str, query: dict[str, str]) -> dict[str, Any]:
        if what == "next":
            return self._next(_Rater.model_validate(query).rater)
        return super().get(what, query)

    def post(self, what: str, body: Any) -> dict[str, Any]:
        if what == "vote":
            return self._vote(TypeAdapter(_Choice).validate_python(body))
        if what == "back":
            rater = _Rater.model_validate(body).rater
            voted = list(self.study.votes.of(rater))
            return self._shown(rater, voted[-1] if voted else None)
        return super().post(what, body)

    def picture(self, what: str, key: str) -> tuple[bytes, str]:
        path = self._keys.get(key)
        if path is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such picture")
        return path.read_bytes(), "image/png"

    def _next(self, rater: str) -> dict[str, Any]:
        voted = self.study.votes.of(rater)
        return self._shown(rater, next((pair for pair in self.study.order(rater) if pair not in voted), None))

    def _shown(self, rater: str, pair: int | None) -> dict[str, Any]:
        progress = {"done": len(self.study.votes.of(rater)), "total": len(self.study.prompts)}
        if pair is None:
            return {**progress, "pair": None}
        sides = ("a", "b") if self.study.left(rater, pair) == "a" else ("b", "a")
        left, right = (self._key(rater, pair, side) for side in sides)
        return {**progress, "pair": pair, "prompt": self.study.prompts[pair], "left": left, "right": right}

    def _vote(self, choice: _Choice) -> dict[str, Any]:
        if choice.pair >= len(self.study.prompts):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such pair")
        left = self.study.left(choice.rater, choice.pair)
        right: Literal["a", "b"] = "b" if left == "a" else "a"
        winners: dict[str, Winner] = {"left": left, "right": right, "tie": "tie"}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.study.votes.add(Vote(choice.pair, choice.rater, left, winners[choice.choice], now))
        return self._next(choice.rater)

    def _key(self, rater: str, pair: int, side: Any) -> str:
        with self._lock:
            if (rater, pair, side) not in self._key_of:
                key = secrets.token_urlsafe(16)
                self._key_of[rater, pair, side] = key
                self._keys[key] = self.study.pictures[side][pair]
            return self._key_of[rater, pair, side]
