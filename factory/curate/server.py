"""The page's server: this machine only, one secret in the address, small JSON in and out. Knows HTTP; the rest is asked of
catalogue, pictures and overlay.

Every request must name this host and port (against DNS rebinding) and carry the token as the first part of its path; a write must
come as JSON from the page itself. Only the page's own three files and pictures of the ledger are ever served: no path of a request
reaches the disk.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import secrets
import sys
import threading
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, ValidationError

from cluster.errors import EdgeFusionError
from cluster.recipe import Settings
from factory.curate.catalogue import Catalogue, Filter
from factory.curate.pictures import Pictures, media_type
from factory.decisions import Changed, Decision, Overlay
from factory.select import DEAD

LOOPBACK = "127.0.0.1"
MAX_BODY_BYTES = 64 << 10
MAX_PAGE_ROWS = 400
_PAGE = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "filters.js": ("filters.js", "text/javascript; charset=utf-8"),
    "marks.js": ("marks.js", "text/javascript; charset=utf-8"),
}
_ID = re.compile(r"[0-9a-f]{64}")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # The address holds the token.
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class _Mark(Settings):
    """Body of a decision."""

    id: str = Field(pattern=_ID.pattern + "$", max_length=64)
    changes: dict[str, Any]
    who: str = Field(default="", max_length=64)
    expect: int | None = Field(default=None, description="number of the decision that the page last saw; for undo")


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a closed tab is no news
            super().handle_error(request, client_address)


class Refused(Exception):
    """An answer other than 200, with a message for the page."""

    def __init__(self, status: HTTPStatus, what: str, **more: Any) -> None:
        super().__init__(what)
        self.status, self.body = status, {"error": what, **more}


class Server:
    """Serves one data set folder until closed. Use as a context manager."""

    def __init__(self, folder: Path, port: int = 0, who: str = "") -> None:
        """Raises EdgeFusionError if the folder holds nothing to show or the port is taken."""
        self.folder, self.who, self.token = folder, who, secrets.token_urlsafe(24)
        self.catalogue, self.pictures, self.overlay = Catalogue(folder), Pictures(folder), Overlay(folder)
        self._noted, self._lock = 0, threading.Lock()
        self._choices = self.catalogue.choices()  # Fixed from here on, and nobody should wait for it at the page.
        self.catch_up()
        try:
            self._http = _Http((LOOPBACK, port), _handler(self))
        except OSError as error:
            raise EdgeFusionError(
                f"port {port} cannot be used ({error.strerror})", where=LOOPBACK, remedy="Choose another --port"
            ) from error
        self.port = int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/{self.token}/"

    def serve(self) -> None:
        """Answer until `close` or Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            self._http.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.server_close()

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
                "name": f"{self.folder.resolve().parent.name}/{self.folder.resolve().name}",
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


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "edgefusion", ""
        timeout = 60
        disable_nagle_algorithm = True
        wbufsize = -1  # Head and body in one packet.

        def do_GET(self) -> None:
            self._answer(self._get)

        def do_POST(self) -> None:
            self._answer(self._post)

        def log_message(self, format: str, *args: Any) -> None:
            """The terminal belongs to the person; and a log of addresses would hold the token."""

        def _answer(self, respond: Any) -> None:
            try:
                respond(*self._allowed_path())
            except Refused as error:
                self._json(error.status, error.body)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                self._json(HTTPStatus.BAD_REQUEST, {"error": f"{place or 'the body'}: {first['msg']}"})
            except (ValueError, OverflowError, RecursionError) as error:
                self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)[:300]})
            except EdgeFusionError as error:
                self._json(HTTPStatus.INSUFFICIENT_STORAGE, {"error": str(error)})
            except ConnectionError:
                self.close_connection = True
            except Exception as error:  # a bug of ours: the page must not wait for an answer that never comes
                traceback.print_exc()
                self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"the server failed ({type(error).__name__})"})

        def _allowed_path(self) -> tuple[list[str], dict[str, str]]:
            """The path below the token, split. Whoever lacks token or host name learns nothing but that."""
            if self.headers.get("Host", "") not in (f"{LOOPBACK}:{server.port}", f"localhost:{server.port}"):
                raise self._closing(HTTPStatus.FORBIDDEN, "wrong host")
            url = urlsplit(self.path)
            first, *rest = url.path.lstrip("/").split("/")
            if not hmac.compare_digest(first.encode(), server.token.encode()) or not rest:
                raise self._closing(HTTPStatus.FORBIDDEN, "wrong address: use the one that was printed")
            return rest, dict(parse_qsl(url.query, max_num_fields=20))

        def _get(self, path: list[str], query: dict[str, str]) -> None:
            match path:
                case [name] if name in _PAGE:
                    file, kind = _PAGE[name]
                    self._send(HTTPStatus.OK, (Path(__file__).parent / file).read_bytes(), kind)
                case ["api", what]:
                    self._json(HTTPStatus.OK, server.get(what, query))
                case ["thumb" | "picture" as what, key]:
                    data, kind = server.picture(what, key)
                    # A picture never changes under its id.
                    self._send(HTTPStatus.OK, data, kind, "private, max-age=31536000, immutable")
                case _:
                    raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

        def _post(self, path: list[str], query: dict[str, str]) -> None:
            origin = self.headers.get("Origin")
            if origin is not None and origin != f"http://{self.headers['Host']}":
                raise self._closing(HTTPStatus.FORBIDDEN, "wrong origin")
            if self.headers.get_content_type() != "application/json":
                raise self._closing(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a body is application/json")
            length = self.headers.get("Content-Length", "")
            if not re.fullmatch(r"[0-9]{1,9}", length):
                raise self._closing(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
            if int(length) > MAX_BODY_BYTES:
                raise self._closing(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY_BYTES} bytes")
            body = json.loads(self.rfile.read(int(length)))
            match path:
                case ["api", what]:
                    self._json(HTTPStatus.OK, server.post(what, body))
                case _:
                    raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

        def _closing(self, status: HTTPStatus, what: str) -> Refused:
            """Refuse without having read the body: the connection cannot be used again."""
            self.close_connection = True
            return Refused(status, what)

        def _json(self, status: HTTPStatus, body: dict[str, Any]) -> None:
            self._send(status, json.dumps(body, allow_nan=False).encode(), "application/json")

        def _send(self, status: HTTPStatus, data: bytes, kind: str, cache: str = "no-store") -> None:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": cache, **_HEADERS}
            for name, value in headers.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

    return Handler
