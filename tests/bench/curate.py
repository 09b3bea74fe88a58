"""The curation page over a large ledger: `PYTHONPATH=. python tests/bench/curate.py [ROWS]` (a million by default).

Makes a ledger with its selection, a set of scores that came later and pictures (one small picture, shared), opens it and times what a person waits for: on the
server's side over HTTP with 60 thumbnails a grid, and in Chromium until every picture of the grid is decoded, if there is one.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from factory.added import PICTURES, SCORER, SCORES
from factory.curate.server import Server
from factory.ledger import _PICTURES, ENTRY
from factory.select import _SCHEMA, SELECTION
from factory.stages import encode_picture

ROWS, UNIT_IMAGES, GRID, RUNS = 1_000_000, 256, 60, 5
SUBJECTS = [f"subject {i}" for i in range(120)]
STYLES = ["flat", "3d", "photo"]
COLOURS = ["red", "blue", "green", "white", "black", "gray"]
ADDED = "sharpness"
DIGEST = "0" * 64
"""Of the pictures of every unit; the page shows them without asking for it."""
FILTERS: list[tuple[str, dict[str, Any]]] = [
    ("no filter, plan order (the first grid)", {}),
    ("sort by score, descending", {"sort": "clip_score", "descending": True}),
    ("score range", {"scores": {"clip_score": [0.4, 0.6]}}),
    ("range of an added score, sorted by it", {"scores": {ADDED: [0.4, 0.6]}, "sort": ADDED}),
    ("attribute", {"attributes": {"subject": ["subject 7"]}}),
    ("text of two words, sorted", {"text": "blue photo", "sort": "clip_score"}),
    ("what the rules said", {"outcome": "rejected"}),
    ("nothing decided yet", {"people": "open"}),
    ("all of these at once", {"text": "blue", "scores": {"clip_score": [0.2, 0.9]}, "attributes": {"style": ["3d"]}}),
]


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    table = Table("what", "median", "spread", "the list alone", title=f"{rows:,} rows · commit {commit} · {machine}")
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        write_ledger(Path(scratch), rows)
        Console().print(f"wrote the ledger in {time.perf_counter() - began:.0f} s")
        began = time.perf_counter()
        with Server(Path(scratch), who="bench") as server:
            table.add_row("open (once, when the command starts)", f"{time.perf_counter() - began:.2f} s", "one run")
            threading.Thread(target=server.serve, daemon=True).start()
            began = time.perf_counter()
            grid(server, {}, fresh=True)
            table.add_row("first grid, everything cold", f"{time.perf_counter() - began:.3f} s", "one run")
            for what, wanted in FILTERS:
                alone = measured(lambda wanted=wanted: grid(server, wanted, pictures=0))[0]
                table.add_row(what, *measured(lambda wanted=wanted: grid(server, wanted)), alone)
            table.add_row("a page in the middle of the list", *measured(lambda: grid(server, {}, start=rows // 2)))
            mark = {"id": hashlib.sha256(b"0").hexdigest(), "changes": {"verdict": "keep"}}
            table.add_row("one decision, synced to disk", *measured(lambda: post(server, "api/decide", mark)))
            for what, seconds in in_browser(server):
                table.add_row(f"in Chromium: {what}", f"{seconds:.3f} s", "one run")
            server.close()
        table.add_row(
            "peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", "with the writing"
        )
    Console().print(table)


def write_ledger(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    picture = encode_picture(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "png")
    added = folder / SCORES / ADDED
    for place in (folder / "ledger", folder / "pictures", added):
        place.mkdir(parents=True)
    told = {"scorer": {"kind": ADDED}, "mark": "", "columns": [ADDED]}
    (added / SCORER).write_text(json.dumps(told))
    selection: dict[str, list[str]] = {"id": [], "outcome": [], "reason": [], "cluster": []}
    for start in range(0, rows, UNIT_IMAGES):
        count, unit = min(UNIT_IMAGES, rows - start), f"unit-{start // UNIT_IMAGES:05d}"
        ids = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(start, start + count)]
        chosen = [
            {"subject": SUBJECTS[s], "style": STYLES[y], "background": COLOURS[c]}
            for s, y, c in zip(
                rng.integers(0, 120, count), rng.integers(0, 3, count), rng.integers(0, 6, count), strict=True
            )
        ]
        scores = rng.random(count).round(6)
        entry = {
            "id": ids,
            "unit": [unit] * count,
            "prompt": [
                f"a {c['style']} of {c['subject']} on a {c['background']} ground, no. {start + i}"
                for i, c in enumerate(chosen)
            ],
            "group": ["things"] * count,
            "attributes": [json.dumps(c) for c in chosen],
            "seed": list(range(start, start + count)),
            "outcome": ["made"] * count,
            "reason": [""] * count,
            "clip_score": scores,
            "embedding": [b"\0" * 128] * count,
            "phash": ["0" * 16] * count,
            "colours": [b"\0" * 12] * count,
            "pictures_sha256": [DIGEST] * count,
        }
        entry = {name: entry.get(name, [None] * count) for name in ENTRY.names}
        pq.write_table(pa.table(entry, schema=ENTRY), folder / "ledger" / f"{unit}.parquet", compression="zstd")
        later = pa.table({"id": ids, ADDED: rng.random(count)}, metadata={PICTURES: DIGEST.encode()})
        pq.write_table(later, added / f"{unit}.parquet", compression="zstd")
        pictures = pa.table({"id": ids, "picture": [picture] * count}, schema=_PICTURES)
        pq.write_table(pictures, folder / "pictures" / f"{unit}.parquet", compression="zstd")
        selection["id"] += ids
        selection["cluster"] += [""] * count
        selection["outcome"] += ["kept" if s >= 0.1 else "rejected" for s in scores]
        selection["reason"] += ["" if s >= 0.1 else "clip below threshold" for s in scores]
    pq.write_table(pa.table(selection, schema=_SCHEMA), folder / SELECTION, compression="zstd")


def grid(server: Server, wanted: dict[str, Any], start: int = 0, fresh: bool = False, pictures: int = GRID) -> None:
    """What the page asks for to show one grid: the view, its rows, a thumbnail each."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    if fresh:
        request(connection, server, "api/about")
    view = json.loads(request(connection, server, "api/view", wanted))
    assert view["total"], wanted
    rows = json.loads(request(connection, server, f"api/rows?view={view['view']}&start={start}&count={GRID}"))["rows"]
    for row in rows[:pictures]:
        assert request(connection, server, f"thumb/{row['id']}")
    connection.close()


def post(server: Server, path: str, body: Any) -> None:
    request(http.client.HTTPConnection("127.0.0.1", server.port), server, path, body)


def request(connection: http.client.HTTPConnection, server: Server, path: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body)
    connection.request(
        "GET" if data is None else "POST", f"/{server.token}/{path}", data, {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
    return content


def measured(do: Callable[[], object]) -> tuple[str, str]:
    """Median and spread; the first run counts, for a person has no warm-up."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return f"{statistics.median(times):.3f} s", f"{min(times):.3f} to {max(times):.3f} s"


def in_browser(server: Server) -> list[tuple[str, float]]:
    """Seconds until every picture of the grid is there; empty without Chromium, its driver and selenium."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return []
    if not program or not driver:
        return []
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1600,1000",
    ):
        options.add_argument(flag)
    shown = (
        "const found = [...document.querySelectorAll('.card img')];"
        "return found.length > 0 && found.every((one) => one.complete) && !document.body.classList.contains('busy')"
        " && document.getElementById('found').textContent !== arguments[0]"
    )
    count = "return document.getElementById('found')?.textContent || ''"
    choose = (
        "const one = document.querySelector(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    steps = [
        ("a filter by attribute", "select[data-attribute=subject]", "subject 7"),
        ("and by text (150 ms of it wait for the typist)", "#text", "blue"),
        ("and by score", "input[data-side=least]", "0.5"),
    ]
    found: list[tuple[str, float]] = []
    with webdriver.Chrome(options=options, service=Service(driver)) as chrome:
        began = time.perf_counter()
        chrome.get(server.url)
        while not chrome.execute_script(shown, ""):
            time.sleep(0.005)
        found.append(("first grid, page and all", time.perf_counter() - began))
        for what, selector, value in steps:
            before = chrome.execute_script(count)
            began = time.perf_counter()
            chrome.execute_script(choose, selector, value)
            while not chrome.execute_script(shown, before):
                time.sleep(0.005)
            found.append((what, time.perf_counter() - began))
    return found


if __name__ == "__main__":
    main()
