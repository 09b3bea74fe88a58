"""Arm Ethos-U85: attention blocks as W8A16 TFLite, judged by Vela, Arm's offline compiler. Its numbers are estimates.

What is lowered is written in `attention`, in terms of `Ops`; here it is put into files and judged.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EdgeFusionError, TargetUnavailable
from export.blocks import Block
from export.profile import Profile
from export.targets.attention import Reach, Softmax, Weights, attend_heads, random_weights
from export.targets.tflite import INSTALL, Writer

__all__ = ["Reach", "Softmax", "Weights", "estimate", "lower", "random_weights"]


@dataclass(frozen=True)
class Estimate:
    """What the compiler says of one file; `cpu_operators` are those that it would not put on the NPU.

    `npu_cycles` count the NPU's own work, without what it waits for memory; `latency_s` has both.
    """

    dram_bytes: int
    latency_s: float
    npu_cycles: int
    cpu_operators: int
    npu_operators: int
    sram_bytes: int


def together(parts: Sequence[Estimate]) -> Estimate:
    """Of files that run one after another: everything summed, but for the memory on chip, which is the largest."""
    sums = {name: sum(getattr(part, name) for part in parts) for name in Estimate.__annotations__}
    return Estimate(**{**sums, "sram_bytes": max(part.sram_bytes for part in parts)})


def lower(
    block: Block,
    head_group: int,
    query_tiles: int,
    path: Path,
    weights: Weights,
    reach: Reach,
    softmax: Softmax = "parts",
) -> None:
    """Write a block as TFLite: inputs hidden 1 T C (and context 1 S C_key) to 1 T C, `head_group` heads at once.

    The first output is the block's. The head groups' own results are outputs too, and only for the compiler's sake: an output lives
    in DRAM, whereas results that wait for the last head in SRAM leave the tiles no room there. Raises TargetUnavailable without
    ai-edge-litert.
    """
    writer = Writer()
    hidden = writer.input([1, block.queries, block.width], reach.hidden)
    context = writer.input([1, block.keys, block.key_width], reach.context) if block.crossed else hidden
    out, groups = attend_heads(writer, hidden, context, weights, block.heads, head_group, query_tiles, reach, softmax)
    writer.save([out, *(groups if len(groups) > 1 else [])], path)


def estimate(path: Path, profile: Profile, compiled: Path | None = None) -> Estimate:
    """What Vela says of a TFLite file on the profile's chip, with the profile's SRAM dedicated to the NPU.

    `compiled`: where to put the file that it makes for the NPU.

    Raises TargetUnavailable without Vela, EdgeFusionError for a profile of another vendor or a file that it does not compile.
    """
    if profile.vela is None:
        raise EdgeFusionError(
            f"{profile.name} is not an Arm NPU", remedy="Choose an ethos-u85 profile for Vela's estimate"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [
            _vela(),
            str(path),
            *("--accelerator-config", profile.vela.accelerator, "--config", "Arm/vela.ini"),
            *("--system-config", profile.vela.system, "--memory-mode", "Dedicated_Sram"),
            *("--arena-cache-size", str(int(profile.sram_bytes.value)), "--output-dir", folder),
            "--verbose-performance",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        summaries = sorted(Path(folder).glob("*summary*.csv"))
        if done.returncode or not summaries:
            # Vela dies of a signal (SIGFPE) on graphs that are too large for its own arithmetic.
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise EdgeFusionError(
                f"Vela does not compile it: {reason[0]}",
                where=str(path),
                remedy="Choose another profile (`edgefusion export profiles`) or smaller pictures, or leave the target ethos out",
            )
        with summaries[0].open(newline="") as file:
            row = next(csv.DictReader(file))
        if compiled is not None:
            shutil.copyfile(next(Path(folder).glob("*_vela.tflite")), compiled)
    counts = {kind: re.search(rf"{kind} operators = (\d+)", done.stdout) for kind in ("CPU", "NPU")}
    if None in counts.values():
        raise EdgeFusionError("Vela's report does not count operators", where=str(path), remedy=INSTALL)
    on_cpu, on_npu = (int(found[1]) for found in counts.values() if found)
    return Estimate(
        round(float(row["dram_total_bytes"])),
        float(row["inference_time"]),
        int(float(row["cycles_npu"])),
        on_cpu,
        on_npu,
        round(float(row["sram_memory_used"]) * 1024),
    )


def _vela() -> str:
    """The compiler's command: beside this Python, or on the path. Raises TargetUnavailable."""
    beside = Path(sys.executable).with_name("vela")
    found = str(beside) if beside.exists() else shutil.which("vela")
    if found is None:
        raise TargetUnavailable("Vela, the compiler of Arm's Ethos-U, is not installed", remedy=INSTALL)
    return found
