"""The curation page's server: what the page asks of catalogue, pictures and overlay. HTTP itself is factory/page_server.py's."""

from __future__ import annotations

import re
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.recipe import Settings
from factory.curate.catalogue import Catalogue, Filter
from factory.curate.pictures import Pictures, media_type
from factory.decisions import Changed, Decision, Overlay
from factory.page_server import MAX_BODY_BYTES, PageServer, Refused
from factory.select import DEAD

__all__ = ["MAX_BODY_BYTES", "MAX_PAGE_ROWS", "Refused", "Server"]

MAX_PAGE_ROWS = 400
_PAGE = {
    name: Path(__file__).parent / (name or "page.html")
    for name in ("", "page.css", "page.js", "filters.js", "marks.js")
}
_ID = re.compile(r"[0-9a-f]{64}")


class _Mark(Settings):
    """Body of a decision."""

    id: str = Field(pattern=_ID.pattern + "$", max_length=64)
    changes: dict[str, Any]
    who: str = Field(default="", max_length=64)
    expect: int | None = Field(default=None, description="number of the decision that the page last saw; for undo")


class Server(PageServer):
    """Serves one data set folder until closed. Use as a context manager."""

    pictures_at = ("thumb", "picture")

    def __init__(self, folder: Path, port: int = 0, who: str = "", view: str = "") -> None:
        """`view`: whose verdicts are shown; what people decide is of the pictures, so of all selections. Raises EdgeFusionError if the
        folder holds nothing to show or the port is taken."""
        self.folder, self.who, self.view = folder, who, view
        self.catalogue, self.pictures, self.overlay = Catalogue(folder, view), Pictures(folder), Overlay(folder)
        self._noted, self._lock = 0, threading.Lock()
        self._choices = self.catalogue.choices()  # Fixed from here on, and nobody should wait for it at the page.
        self.catch_up()
        super().__init__(_PAGE, port)

    def catch_up(self) -> int:
        """Take in what other processes decided; returns the number of the last decision."""
        with self._lock:
            number = self.overlay.catch_up()
            if number < self._noted:
                self._noted = 0  # the file was replaced
            if number > self._noted:
                self.catalogue.note([decision for _, decision in self.overlay.since(self._noted)])
                self._noted = number
            return number

    def get(self, what: str, query: dict[str, str]) -> dict[str, Any]:
        """Answer a question of the page. Raises Refused."""
        if what == "about":
            number = self.catch_up()
            return {
                "name": "/".join([*self.folder.resolve().parts[-2:], *([self.view] if self.view else [])]),
                "who": self.who,
                "total": self.catalogue.alive,
                "number": number,
                "progress": self.overlay.counts(),
                **self._choices,
            }
        if what == "rows":
            view = self.catalogue.kept_view(query.get("view", ""))
            if view is None:
                raise Refused(HTTPStatus.GONE, "the view is gone: ask for it again")
            start, count = _number(query, "start", 1 << 40), _number(query, "count", MAX_PAGE_ROWS)
            return {"rows": [self._with_decision(row) for row in self.catalogue.page(view, start, count)]}
        if what == "more":
            key = query.get("id", "")
            found = self.catalogue.more(key) if _ID.fullmatch(key) else None
            if found is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such picture")
            return found
        if what == "since":
            after, number = _number(query, "number", 1 << 40), self.catch_up()
            found = self.overlay.since(after if after <= number else 0)
            return {
                "number": number,
                "progress": self.overlay.counts(),
                "decisions": [_as_json(d, n) for n, d in found[-1000:]],
            }
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def post(self, what: str, body: Any) -> dict[str, Any]:
        """Do what the page asks. Raises Refused, ValueError for a malformed body, EdgeFusionError if nothing can be saved."""
        if what == "view":
            self.catch_up()
            view = self.catalogue.view(Filter.model_validate(body))
            return {"view": view.key, "total": len(view.places)}
        if what == "decide":
            mark = _Mark.model_validate(body)
            row = self.catalogue.row(mark.id)
            if row is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such picture")
            if row["outcome"] == DEAD:
                raise Refused(HTTPStatus.BAD_REQUEST, "a dead row has no picture to decide about")
            changes = dict(mark.changes)
            if isinstance(changes.get("caption"), str) and " ".join(changes["caption"].split()) == row["prompt"]:
                changes["caption"] = None
            try:
                saved = self.overlay.decide(mark.id, changes, mark.who or self.who, mark.expect)
            except Changed as error:
                now, number = self.overlay.of(mark.id)
                raise Refused(
                    HTTPStatus.CONFLICT, f"{now.who if now else 'someone'} {error}", decision=_as_json(now, number)
                ) from None
            self.catch_up()
            return {
                "decision": _as_json(saved.decision, saved.number),
                "before": _as_json(saved.before, saved.before_number),
                "progress": self.overlay.counts(),
            }
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def picture(self, what: str, key: str) -> tuple[bytes, str]:
        """(file, media type) of a `thumb` or whole `picture`. Raises Refused."""
        unit = self.catalogue.unit(key) if _ID.fullmatch(key) else None
        try:
            find = self.pictures.thumbnail if what == "thumb" else self.pictures.picture
            data = find(unit, key) if unit else None
        except ValueError as error:
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, str(error)) from None
        kind = media_type(data) if data else None
        if data is None or kind is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such picture")
        return data, kind

    def _with_decision(self, row: dict[str, Any]) -> dict[str, Any]:
        decision, number = self.overlay.of(row["id"])
        return {**row, "decision": _as_json(decision, number)}


def _as_json(decision: Decision | None, number: int) -> dict[str, Any] | None:
    if decision is None:
        return None
    return {
        **{k: getattr(decision, k) for k in ("id", "verdict", "reason", "caption", "who", "when")},
        "number": number,
    }


def _number(query: dict[str, str], name: str, most: int) -> int:
    text = query.get(name, "")
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) > most:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is a number from 0 to {most}")
    return int(text)
