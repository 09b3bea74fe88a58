"""Select over a ledger of a million rows: `PYTHONPATH=. python tests/bench/selection.py [ROWS] [FOLDER]`.

Makes a plan and a ledger as `make` leaves them (units of 64 rows, embeddings of 512 dimensions, copies of each kind; no pictures, for none
is read), then starts a process of its own for each measurement and prints its seconds and peak memory. With a FOLDER the
ledger stays there for the next run. `--recall` measures instead what share of semantic duplicates the cells of 30,000 rows find.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from factory import dedup
from factory.dedup import Meanings, keep_first
from factory.index import INDEX, load_columns
from factory.ledger import ENTRY
from factory.plan import PLAN, PLAN_SCHEMA, table_bytes
from factory.recipe import SelectRecipe
from factory.select import select, summarise, write_selection

ROWS, UNIT_IMAGES, DIMENSIONS, THEMES = 1_000_000, 64, 512, 5_000
RULES = {
    "min_clip": 0.1,
    "max_hamming_bits": 2,
    "scores": {"raw_clip_score": {"best_share": 0.95, "within": ["group"]}},
    "caps": [{"attributes": ["subject", "tone"], "most": 2000}],
    "wanted": [{"attributes": ["tone", "style"], "least": 20000}],
}
CASES = {
    "the pocket recipe's keys, first time": (True, {"min_clip": 0.1, "max_hamming_bits": 2}),
    "the pocket recipe's keys, again": (False, {"min_clip": 0.1, "max_hamming_bits": 2}),
    "4 bits of the hash": (False, {"min_clip": 0.1, "max_hamming_bits": 4}),
    "best shares, caps, wanted": (False, RULES),
    "the same and semantic duplicates": (False, {**RULES, "same_meaning": 0.95}),
}


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if "--recall" in sys.argv:
        return recall()
    if "--measure" in sys.argv:
        return measure(Path(words[0]), words[1])
    rows = int(words[0]) if words else ROWS
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    load = os.getloadavg()[0]
    title = f"{rows:,} rows · commit {commit} · {platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before"
    table = Table(
        "rules",
        "index s",
        "select s",
        "summary s",
        "write s",
        "all s",
        "CPU s",
        "peak GB",
        "kept",
        title=title,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(words[1] if len(words) > 1 else scratch)
        if not (folder / PLAN).exists():
            began = time.perf_counter()
            write_ledger(folder, rows)
            Console().print(f"wrote the ledger in {time.perf_counter() - began:.0f} s")
        for name in CASES:
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(folder), name], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout)
            table.add_row(name, *(f"{s:.1f}" for s in found["seconds"]), f"{sum(found['seconds']):.1f}", f"{found['cpu_s']:.1f}",
                          f"{found['peak_bytes'] / 1e9:.2f}", f"{found['kept']:,}")  # fmt: skip
            Console().print(name, found)
    Console().print(table)


def measure(folder: Path, case: str) -> None:
    """One case in this process, printed as JSON."""
    fresh, rules = CASES[case]
    if fresh:
        for path in (folder / INDEX).glob("*"):
            path.unlink()
    recipe = SelectRecipe(**rules)
    marks, busy = [time.perf_counter()], time.process_time()

    def lap() -> None:
        marks.append(time.perf_counter())

    columns = load_columns(folder, UNIT_IMAGES)
    lap()
    selection = select(columns, recipe)
    lap()
    summary = summarise(columns, selection, recipe)
    lap()
    write_selection(folder / "views" / "bench", selection, summary)
    lap()
    seconds = [round(b - a, 2) for a, b in itertools.pairwise(marks)]
    peak, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, round(time.process_time() - busy, 2)
    funnel, varied = summary["funnel"], summary["diversity"]
    print(json.dumps({"seconds": seconds, "cpu_s": cpu, "peak_bytes": peak, **funnel, **varied}))


def write_ledger(folder: Path, rows: int) -> None:
    """`folder/plan.parquet` and `folder/ledger`: one row in ten is a copy of an earlier one in some way."""
    rng = np.random.default_rng(0)
    themes = rng.standard_normal((THEMES, DIMENSIONS)).astype(np.float32)
    (folder / "ledger").mkdir(parents=True)
    subjects, tones, styles = [f"subject {i}" for i in range(240)], ["light", "medium", "dark"], ["3d", "flat"]
    recent: list[dict[str, Any]] = []
    plans: list[pa.Table] = []
    for start in range(0, rows, UNIT_IMAGES):
        count, unit = min(UNIT_IMAGES, rows - start), f"unit-{start // UNIT_IMAGES:05d}"
        noise = rng.standard_normal((count, DIMENSIONS)).astype(np.float32)
        seen = (themes[rng.integers(0, THEMES, count)] + 0.9 * noise).astype(np.float16)
        hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
        colours = rng.integers(0, 256, (count, 12), dtype=np.uint8)
        kinds, scores = rng.random(count), rng.random((2, count)).round(6)
        picks = rng.integers(0, 240, count), rng.choice(3, count, p=[0.6, 0.3, 0.1]), rng.integers(0, 2, count)
        found = []
        for i in range(count):
            key = hashlib.sha256(b"%d" % (start + i)).hexdigest()
            row = {
                "id": key,
                "unit": unit,
                "prompt": f"a {styles[picks[2][i]]} picture of {subjects[picks[0][i]]}, no. {start + i}",
                "group": "people" if picks[0][i] < 80 else "things",
                "attributes": json.dumps(
                    {"subject": subjects[picks[0][i]], "tone": tones[picks[1][i]], "style": styles[picks[2][i]]}
                ),
                "seed": start + i,
                "outcome": "made",
                "reason": "",
                "clip_score": float(scores[0, i]),
                "raw_clip_score": float(scores[1, i]),
                "embedding": seen[i].tobytes(),
                "phash": f"{int(hashes[i]):016x}",
                "colours": colours[i].tobytes(),
                "made_sha256": hashlib.sha256(key.encode()).hexdigest(),
                "pictures_sha256": "0" * 64,
            }
            if kinds[i] < 0.1 and recent:
                other = recent[int(kinds[i] * 1e6) % len(recent)]
                if kinds[i] < 0.03:
                    row |= {name: other[name] for name in ("made_sha256", "phash", "colours", "embedding")}
                elif kinds[i] < 0.06:
                    flipped = int(other["phash"], 16) ^ (1 << (start + i) % 64)
                    row |= {"phash": f"{flipped:016x}", "colours": other["colours"]}
                else:
                    near = np.frombuffer(other["embedding"], np.float16) + 0.25 * noise[i]
                    row["embedding"] = near.astype(np.float16).tobytes()
            found.append(row)
        recent = [*recent, *found[:: max(1, start // UNIT_IMAGES // 200)]][-5000:]
        table = pa.Table.from_pylist(found, schema=ENTRY)
        pq.write_table(table, folder / "ledger" / f"{unit}.parquet", compression="zstd")
        plans.append(pa.Table.from_pylist(found, schema=PLAN_SCHEMA))
    (folder / PLAN).write_bytes(table_bytes(pa.concat_tables(plans)))


def recall() -> None:
    """Rows that fall to a semantic duplicate: by cells, of those that fall when each is compared with each."""
    count = 30_000
    with tempfile.TemporaryDirectory() as scratch:
        write_ledger(Path(scratch), count)
        embeddings = load_columns(Path(scratch), UNIT_IMAGES).embeddings()
        assert embeddings is not None
        seen = embeddings.read(np.arange(count))
    for least in (0.9, 0.95, 0.98):
        nobody = np.zeros(count, bool)
        cells = keep_first(Meanings(lambda rows: seen[rows], count, least), nobody) >= 0
        dedup._EXACT_ROWS, before = count, dedup._EXACT_ROWS
        exact = keep_first(Meanings(lambda rows: seen[rows], count, least), nobody) >= 0
        dedup._EXACT_ROWS = before
        print(
            f"cosine {least}: {int((cells & exact).sum()):,} of {int(exact.sum()):,} found, {(cells & ~exact).sum()} more"
        )


if __name__ == "__main__":
    main()
