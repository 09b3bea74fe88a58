"""Writing and reading shards, beside the webdataset package: `make bench`.

Ours sorts, digests, fsyncs and proves what it writes, and reads in any order; webdataset streams. Ratios come from one run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset
from rich.console import Console
from rich.table import Table

from factory.pack import Sample, pack
from factory.verify import verify
from trainer.stream import ShardStream

SAMPLES, PICTURE_BYTES, RUNS = 4000, 20_000, 5


def main() -> None:
    rng = random.Random(0)
    samples = [
        Sample(
            hashlib.sha256(i.to_bytes(4, "big")).hexdigest(),
            rng.randbytes(PICTURE_BYTES),
            "png",
            f"prompt {i}",
            {"seed": i},
        )
        for i in range(SAMPLES)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        theirs.mkdir()
        rows = [
            ("write: edgefusion pack", measure(lambda: pack(samples, ours))),
            ("write: webdataset.ShardWriter", measure(lambda: write_webdataset(samples, theirs))),
            ("prove: edgefusion verify", measure(lambda: verify(ours))),
            ("read, shuffled: edgefusion ShardStream", measure(lambda: read_ours(ours))),
            ("read, in order: webdataset.WebDataset", measure(lambda: read_webdataset(theirs))),
        ]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    table = Table(
        "what",
        "samples/s (median)",
        "spread",
        title=f"{SAMPLES} samples of {PICTURE_BYTES} bytes · commit {commit} · {machine}",
    )
    for what, times in rows:
        rates = [SAMPLES / t for t in times]
        table.add_row(what, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}")
    Console().print(table)
    medians = {what: statistics.median(times) for what, times in rows}
    Console().print(
        f"write: {medians[rows[1][0]] / medians[rows[0][0]]:.2f} x webdataset; read: {medians[rows[4][0]] / medians[rows[3][0]]:.2f} x webdataset"
    )


def measure(do: Callable[[], object]) -> list[float]:
    """Seconds of each run, after one warm-up."""
    do()
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return times


def write_webdataset(samples: list[Sample], folder: Path) -> None:
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=1000, verbose=0) as sink:
        for sample in samples:
            sink.write(
                {
                    "__key__": sample.id,
                    **{kind: data for kind, data in sample.members().items() if kind != "json"},
                    "json": dict(sample.facts),
                }
            )


def read_ours(folder: Path) -> None:
    stream = ShardStream(folder, seed=1, check=False)
    for row in map(stream.row_at, range(len(stream))):
        stream.read(row)
    stream.close()


def read_webdataset(folder: Path) -> None:
    count = len(list(folder.glob("*.tar")))
    for _ in webdataset.WebDataset(f"{folder}/shard-{{000000..{count - 1:06d}}}.tar", shardshuffle=False):
        pass


if __name__ == "__main__":
    main()
