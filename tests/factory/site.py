"""A site of pictures on loopback that answers as sites do: well, late, wrongly, for ever, or not at all."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from factory.download import download_all
from factory.ingest import downloaded_rows
from factory.recipe import DownloadRecipe, PicturePlan


def drawing(seed: int) -> bytes:
    sink = io.BytesIO()
    cells = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((80, 64), Image.Resampling.NEAREST).save(sink, format="PNG")
    return sink.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.here = self.most = 0
        self.down = False
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.meet = threading.Barrier(4)
        self.root = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        site, path = self.server, self.path.lstrip("/")
        with site.lock:
            site.asked[path] += 1
            site.here += 1
            site.most = max(site.most, site.here)
            self.here = True
        try:
            self.reply(path, site.asked[path])
        except OSError:
            pass  # the client broke off
        finally:
            self.leave()

    def leave(self) -> None:
        """Once and before the answer goes out: whoever has it may ask again before this thread is heard of."""
        with self.server.lock:
            self.server.here -= self.here
            self.here = False

    def reply(self, path: str, count: int) -> None:
        site = self.server
        if path.startswith("to/"):
            left = int(path.removeprefix("to/"))
            self.send(b"", 302, Location=f"/to/{left - 1}" if left else "/1.png")
        elif path == "inward":
            self.send(b"", 302, Location="file:///etc/passwd")
        elif path == "slow":
            site.stop.wait(20)
        elif path.startswith("together/"):
            # All of them at once or none: whoever asks for a few and waits for these gets no answer.
            site.meet.wait(20)
            self.send(drawing(int(path.removeprefix("together/"))))
        elif path.startswith("after/"):
            first = path.removeprefix("after/")
            self.send(drawing(3), 200 if site.asked[first] else 503)
        elif path == "cut":
            self.send(drawing(1)[:100], length=5000)
        elif path == "html":
            self.send(b"<html>not here</html>", kind="image/png")
        elif path == "bomb":
            self.send(bomb())
        elif path == "large":
            self.send(b"x" * 200_000)
        elif path == "endless":
            self.send_response(200)
            self.end_headers()
            while not site.stop.is_set():
                self.wfile.write(b"x" * 65536)
        elif path.startswith("down/"):
            if site.down:
                self.send(b"", 503)
            else:
                self.send(drawing(int(path.removeprefix("down/").removesuffix(".png"))))
        elif path == "520":
            self.send(drawing(4), 200 if count > 1 else 520)
        elif path == "busy":
            self.send(drawing(2), 200 if count > 2 else 503)
        elif path.endswith(".png"):
            site.stop.wait(0.02)
            self.send(drawing(int(path.removesuffix(".png"))), kind="text/plain")
        else:
            self.send(b"gone", 404)

    def send(
        self, body: bytes, status: int = 200, kind: str = "image/png", length: int | None = None, **more: str
    ) -> None:
        self.leave()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def plan_of(path: Path, **keys: object) -> PicturePlan:
    given = {"timeout_s": 1.0, "back_off_s": 0.01, "max_bytes": 100_000, "redirects": 2, "allow_private": True, **keys}
    return PicturePlan(paths=[str(path)], download=DownloadRecipe.model_validate(given))


def rows_of(plan: PicturePlan, out: Path) -> list[dict]:
    return list(downloaded_rows(download_all(plan, [Path(p) for p in plan.paths], out)))


def write_list(path: Path, site: Site, *names: str) -> Path:
    path.write_text("".join(f"{site.root}/{name}\ta text of {name}\n" for name in names))
    return path
