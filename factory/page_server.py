"""A local page's server: this machine only, one secret in the address, small JSON in and out. Knows HTTP; what is asked is a subclass's.

Every request must name this host and port (against DNS rebinding) and carry the token as the first part of its path; a write must
come as JSON from the page itself. Only the page's own files and pictures that the subclass looks up are ever served: no path of a
request reaches the disk.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import secrets
import sys
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import ValidationError

from cluster.errors import EdgeFusionError

LOOPBACK = "127.0.0.1"
MAX_BODY_BYTES = 64 << 10
_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # The address holds the token.
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


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


class PageServer:
    """Serves one page until closed. Use as a context manager. Subclasses answer `get`, `post` and `picture`."""

    pictures_at: tuple[str, ...] = ()
    """First parts of paths under which `picture` is asked: PART/KEY."""

    def __init__(self, files: Mapping[str, Path], port: int = 0) -> None:
        """`files` by the name they are asked for; the empty name is the page. Raises EdgeFusionError if the port is taken."""
        self.files, self.token = files, secrets.token_urlsafe(24)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.server_close()

    def get(self, what: str, query: dict[str, str]) -> dict[str, Any]:
        """Answer a question of the page. Raises Refused."""
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def post(self, what: str, body: Any) -> dict[str, Any]:
        """Do what the page asks. Raises Refused, ValueError for a malformed body, EdgeFusionError if nothing can be saved."""
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def picture(self, what: str, key: str) -> tuple[bytes, str]:
        """(file, media type). Raises Refused."""
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such picture")


def _handler(server: PageServer) -> type[BaseHTTPRequestHandler]:
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
                case [name] if name in server.files:
                    file = server.files[name]
                    self._send(HTTPStatus.OK, file.read_bytes(), _MEDIA[file.suffix])
                case ["api", what]:
                    self._json(HTTPStatus.OK, server.get(what, query))
                case [what, key] if what in server.pictures_at:
                    data, kind = server.picture(what, key)
                    # A picture never changes under its key.
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
