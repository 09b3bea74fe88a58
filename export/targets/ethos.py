"""Arm Ethos-U85: attention blocks as W8A16 TFLite, judged by Vela, Arm's offline compiler. Its numbers are estimates.

The compiler's int16 softmax spends five sixths of its time on the row maximum. `softmax="parts"` writes softmax out instead,
with the maximum as a tree of element-wise maxima; the answer is the same to the rounding of int16.
"""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.errors import EdgeFusionError, TargetUnavailable
from export.blocks import Block
from export.profile import Profile
from export.targets.tflite import INSTALL, Tensor, Writer

Softmax = Literal["operator", "parts"]

_LEAST_EXPONENT = 11.0
"""exp(-11) is half a code of an int16 in [0, 1]."""


@dataclass(frozen=True)
class Estimate:
    """What the compiler says of one file; `cpu_operators` are those that it would not put on the NPU."""

    dram_bytes: int
    latency_s: float
    npu_cycles: int
    cpu_operators: int


@dataclass(frozen=True)
class Weights:
    """One attention block in float32: projections C x C (keys and values C x C_key), the output's bias C."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Reach:
    """The largest absolute value of each activation that a calibration saw."""

    hidden: float
    context: float
    query: float
    key: float
    value: float
    scores: float
    mixed: float
    out: float


def weights_of(attention: Any) -> Weights:
    """Of a diffusers Attention."""
    out = attention.to_out[0]
    query, key, value, joined = (
        layer.weight.detach().float().numpy() for layer in (attention.to_q, attention.to_k, attention.to_v, out)
    )
    bias = np.zeros(len(joined), np.float32) if out.bias is None else out.bias.detach().float().numpy()
    return Weights(query, key, value, joined, bias)


def random_weights(block: Block, seed: int = 0) -> Weights:
    """Weights of a usual size for shapes whose real ones are not at hand: costs do not depend on them."""
    rng = np.random.default_rng(seed)

    def draw(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)

    width = block.width
    return Weights(
        draw(width, width),
        draw(width, block.key_width),
        draw(width, block.key_width),
        draw(width, width),
        np.zeros(width, np.float32),
    )


def attend(
    block: Block, weights: Weights, hidden: np.ndarray, context: np.ndarray | None = None
) -> tuple[np.ndarray, Reach]:
    """The block in float32, hidden 1 T C and context 1 S C_key to 1 T C, and the reach of every activation on the way."""
    seen = hidden if context is None else context
    query, key, value = hidden @ weights.query.T, seen @ weights.key.T, seen @ weights.value.T
    mixed, largest = np.empty_like(query), 0.0
    for head in range(block.heads):
        part = slice(head * block.head_width, (head + 1) * block.head_width)
        scores = query[..., part] @ key[..., part].transpose(0, 2, 1) / math.sqrt(block.head_width)
        largest = max(largest, float(np.abs(scores).max()))
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[..., part] = shares / shares.sum(axis=-1, keepdims=True) @ value[..., part]
    out = mixed @ weights.out.T + weights.bias
    reach = Reach(
        hidden=_largest(hidden),
        context=_largest(seen),
        query=_largest(query) / math.sqrt(block.head_width),
        key=_largest(key),
        value=_largest(value),
        scores=largest,
        mixed=_largest(mixed),
        out=_largest(out),
    )
    return out, reach


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
    width, groups = head_group * block.head_width, []

    def heads(x: Tensor) -> Tensor:
        """1 T (G D) to G T D."""
        tokens = x.shape[1]
        between = [tokens, head_group, block.head_width]
        return x if head_group == 1 else writer.arrange(x, between, [1, 0, 2], [head_group, tokens, block.head_width])

    for start in range(0, block.width, width):
        part = slice(start, start + width)
        # The scale of the scores is folded into the query's weights: one operator less over every score.
        query = heads(writer.dense(hidden, weights.query[part] / math.sqrt(block.head_width), reach.query))
        key = heads(writer.dense(context, weights.key[part], reach.key))
        value = heads(writer.dense(context, weights.value[part], reach.value))
        mixed = _mix(writer, query, key, value, query_tiles, reach.scores, reach.mixed, softmax)
        if head_group > 1:
            mixed = writer.arrange(mixed, mixed.shape, [1, 0, 2], [1, block.queries, width])
        groups.append(mixed)
    out = writer.dense(writer.concat(groups, axis=2), weights.out, reach.out, weights.bias)
    writer.save([out, *(groups if len(groups) > 1 else [])], path)


def lower_head(
    queries: int, keys: int, head_width: int, query_tiles: int, path: Path, softmax: Softmax = "parts"
) -> None:
    """Write the core of one head, softmax(Q K^T) V, inputs Q 1 T D, K 1 S D, V 1 S D: what the tiles are about, alone."""
    writer = Writer()
    query = writer.input([1, queries, head_width], 4.0)
    key, value = (writer.input([1, keys, head_width], 4.0) for _ in range(2))
    writer.save([_mix(writer, query, key, value, query_tiles, 8.0, 4.0, softmax)], path)


def estimate(path: Path, profile: Profile) -> Estimate:
    """What Vela says of a TFLite file on the profile's chip, with the profile's SRAM dedicated to the NPU.

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
            raise EdgeFusionError(f"Vela does not compile it: {reason[0]}", where=str(path))
        with summaries[0].open(newline="") as file:
            row = next(csv.DictReader(file))
    on_cpu = sum(" CPU " in line for line in done.stdout.splitlines())
    return Estimate(
        round(float(row["dram_total_bytes"])), float(row["inference_time"]), int(float(row["cycles_npu"])), on_cpu
    )


def emulate(path: Path, *inputs: np.ndarray) -> np.ndarray:
    """Run a written file with LiteRT's kernels on the CPU, float inputs to float output. Proves the arithmetic, not the speed."""
    try:
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TargetUnavailable("ai-edge-litert is not installed", remedy=INSTALL) from None
    runner = Interpreter(str(path), num_threads=1)
    runner.allocate_tensors()
    for detail, value in zip(runner.get_input_details(), inputs, strict=True):
        codes = np.clip(np.round(value / detail["quantization"][0]), -32767, 32767)
        runner.set_tensor(detail["index"], codes.astype(np.int16))
    runner.invoke()
    detail = runner.get_output_details()[0]  # the block's own: `lower` puts it first
    return runner.get_tensor(detail["index"]) * np.float32(detail["quantization"][0])


def _mix(
    writer: Writer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tiles: int,
    scores_reach: float,
    mixed_reach: float,
    softmax: Softmax,
) -> Tensor:
    """G T D, tile by tile; a tile ends with the product, so that nothing larger than its scores ever exists."""
    rows, parts = query.shape[1] // query_tiles, []
    for tile in range(query_tiles):
        scores = writer.matmul(writer.cut(query, 1, tile * rows, rows), key, scores_reach, transpose_b=True)
        shares = writer.softmax(scores) if softmax == "operator" else _softmax_in_parts(writer, scores)
        parts.append(writer.matmul(shares, value, mixed_reach))
    return writer.concat(parts, axis=1)


def _softmax_in_parts(writer: Writer, scores: Tensor) -> Tensor:
    """softmax(s) = exp(d - log sum exp(d)) with d = s - m, m the row maximum; every step int16.

    d saturates at -11, where exp is below one code of the result: the NPU's table has 513 entries for its whole range, so a wide
    range would ruin it. The sum lies between 1 and the number of keys, too wide for one int16 scale: one sum saturates at 8, one
    is coarse, and log(low) + log(max(coarse, 8)) - log 8 is exact to either one's rounding.
    """
    count = max(9.0, scores.shape[-1])
    below = writer.binary("SUB", scores, _row_maximum(writer, scores), _LEAST_EXPONENT)
    shares = writer.table("EXP", below, 1.0)
    low, coarse = writer.reduce("SUM", shares, 8.0), writer.reduce("SUM", shares, count)
    least = writer.binary("MAXIMUM", coarse, writer.constant(8.0, coarse), coarse.reach)
    most = math.log(count) + 0.1
    high = writer.table("LOG", least, most)
    high = writer.binary("SUB", high, writer.constant(math.log(8), high), most)
    logarithm = writer.binary("ADD", writer.table("LOG", low, most), high, most)
    return writer.table("EXP", writer.binary("SUB", below, logarithm, _LEAST_EXPONENT), 32767 / 32768)


def _row_maximum(writer: Writer, scores: Tensor) -> Tensor:
    """Halves against halves while that divides, then one reduction: Vela reduces a row at four cycles an element."""
    while scores.shape[-1] > 64 and scores.shape[-1] % 8 == 0:
        parts = writer.split(scores, len(scores.shape) - 1, 8)
        while len(parts) > 1:
            parts = [writer.binary("MAXIMUM", a, b, scores.reach) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        scores = parts[0]
    return writer.reduce("REDUCE_MAX", scores, scores.reach)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _vela() -> str:
    """The compiler's command: beside this Python, or on the path. Raises TargetUnavailable."""
    beside = Path(sys.executable).with_name("vela")
    found = str(beside) if beside.exists() else shutil.which("vela")
    if found is None:
        raise TargetUnavailable("Vela, the compiler of Arm's Ethos-U, is not installed", remedy=INSTALL)
    return found
