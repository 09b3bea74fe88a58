"""Tiled attention on Arm's Ethos-U85 by Vela's own estimate, and the solver's choice beside every other: needs the `npu` extra.

`PYTHONPATH=. python tests/bench/tiling.py [PROFILE [SIZE_PX]]` (about a minute). Estimates of an offline compiler, never measured on a device.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.errors import EdgeFusionError
from export.blocks import Block, attention_blocks, read_architecture
from export.profile import Profile, load_profile
from export.solve import solve
from export.targets import ethos
from export.targets.attention import mix
from export.targets.judge import USUAL_REACH
from export.targets.tflite import Writer

Judge = Callable[[Callable[[], None]], "ethos.Estimate | str"]


def main(name: str = "ethos-u85-1024", size_px: int = 512) -> None:
    profile = load_profile(name)
    blocks = attention_blocks(*read_architecture("bk-sdm-tiny", size_px))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = Table(
        "what",
        "softmax",
        "heads x tiles",
        "DRAM MB",
        "latency ms",
        "against untiled",
        title=f"compiler-estimated (Vela {metadata.version('ethos-u-vela')}, {profile.name}, {profile.sram_bytes.value / 2**20:g} MiB) · commit {commit}",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.tflite"

        def judge(write: Callable[[], None]) -> ethos.Estimate | str:
            write()
            try:
                return ethos.estimate(path, profile)
            except EdgeFusionError as error:
                return error.what

        for block in (replace(blocks[0], name="one head"), blocks[0], blocks[2]):
            alone = block.name.startswith("one head")
            if alone:
                block = replace(block, heads=1, width=block.head_width, key_width=block.head_width)
            _judge_block(block, alone, table, path, judge, profile)
    Console(width=110).print(table)


def lower_head(
    queries: int, keys: int, head_width: int, query_tiles: int, path: Path, softmax: ethos.Softmax = "parts"
) -> None:
    """Write the core of one head, softmax(Q K^T) V, inputs Q 1 T D, K 1 S D, V 1 S D: what the tiles are about, alone."""
    writer = Writer()
    query = writer.input([1, queries, head_width], 4.0)
    key, value = (writer.input([1, keys, head_width], 4.0) for _ in range(2))
    writer.save([mix(writer, query, key, value, query_tiles, 8.0, 4.0, softmax)], path)


def _judge_block(block: Block, alone: bool, table: Table, path: Path, judge: Judge, profile: Profile) -> None:
    weights = ethos.random_weights(block)
    chosen = solve([block], profile).blocks[0].chosen
    name = f"one head {block.queries}" if alone else f"block {block.queries} x {block.width}"
    baseline: ethos.Estimate | None = None
    for softmax in ("operator", "parts"):
        found: dict[int, ethos.Estimate] = {}
        cuts = [(block.heads, 1), *((1, 2**power) for power in range(9) if (1, 2**power) != (block.heads, 1))]
        for group, tiles in cuts:
            if tiles > 1 and block.queries // tiles < profile.row_multiple:
                continue
            if alone:
                size = (block.queries, block.keys, block.head_width)
                said = judge(lambda size=size, t=tiles, s=softmax: lower_head(*size, t, path, s))
            else:
                said = judge(
                    lambda g=group, t=tiles, s=softmax: ethos.lower(block, g, t, path, weights, USUAL_REACH, s)
                )
            cut = "untiled" if (group, tiles) == (block.heads, 1) else f"{group} x {tiles}"
            if isinstance(said, str):
                table.add_row(name, softmax, cut, "not compiled", "", said[:48])
                continue
            baseline = baseline or said
            if group == 1:
                found[tiles] = said
            mark = (
                " ← solver" if softmax == "parts" and (group, tiles) == (chosen.head_group, chosen.query_tiles) else ""
            )
            gain = f"{baseline.dram_bytes / said.dram_bytes:.1f}x less, {said.latency_s / baseline.latency_s - 1:+.0%}"
            table.add_row(
                name, softmax, cut, f"{said.dram_bytes / 1e6:.1f}", f"{said.latency_s * 1e3:.2f}", gain + mark
            )
        if softmax == "parts" and chosen.query_tiles in found:
            best = min(found.values(), key=lambda e: e.latency_s)
            behind = found[chosen.query_tiles].latency_s / best.latency_s - 1
            table.add_row(name, "", "", "", "", f"solver is {behind:.1%} behind the best tried")
    table.add_section()


if __name__ == "__main__":
    main(*sys.argv[1:2], *(int(size) for size in sys.argv[2:3]))
