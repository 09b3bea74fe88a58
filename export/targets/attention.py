"""Attention for NPUs in terms of `Ops`: heads split, queries in tiles, softmax by the operator or written out in parts.

The compiler's int16 softmax spends five sixths of its time on the row maximum. `softmax="parts"` writes softmax out instead,
with the maximum as a tree of element-wise maxima; the answer is the same to the rounding of int16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.blocks import Block
from export.targets.ops import UNIT, Ops, Tensor
from export.targets.ops import Reach as Named

Softmax = Literal["operator", "parts"]

_LEAST_EXPONENT = 11.0
"""exp(-11) is half a code of an int16 in [0, 1]."""


@dataclass(frozen=True)
class Weights:
    """One attention block in float32: projections C x C (keys and values C x C_key), biases C of the output and of the queries."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray
    bias: np.ndarray
    query_bias: np.ndarray | None = None


@dataclass(frozen=True)
class Reach:
    """The largest absolute value of each activation that a calibration saw, or the name under which it knows them."""

    hidden: Named
    context: Named
    query: Named
    key: Named
    value: Named
    scores: Named
    mixed: Named
    out: Named


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


def attend_heads(
    ops: Ops,
    hidden: Tensor,
    context: Tensor,
    weights: Weights,
    heads: int,
    head_group: int,
    query_tiles: int,
    reach: Reach,
    softmax: Softmax,
) -> tuple[Tensor, list[Tensor]]:
    """The block, hidden 1 T C and context 1 S C_key to 1 T C, `head_group` heads at once; with each head group's own result."""
    head_width = len(weights.query) // heads
    width, groups = head_group * head_width, []

    def split(x: Tensor) -> Tensor:
        """1 T (G D) to G T D."""
        tokens = x.shape[1]
        between = [tokens, head_group, head_width]
        return x if head_group == 1 else ops.arrange(x, between, [1, 0, 2], [head_group, tokens, head_width])

    for start in range(0, len(weights.query), width):
        part = slice(start, start + width)
        # The scale of the scores is folded into the query's weights: one operator less over every score.
        scale = 1 / math.sqrt(head_width)
        bias = None if weights.query_bias is None else weights.query_bias[part] * scale
        query = split(ops.dense(hidden, weights.query[part] * scale, reach.query, bias))
        key = split(ops.dense(context, weights.key[part], reach.key))
        value = split(ops.dense(context, weights.value[part], reach.value))
        mixed = mix(ops, query, key, value, query_tiles, reach.scores, reach.mixed, softmax)
        if head_group > 1:
            mixed = ops.arrange(mixed, mixed.shape, [1, 0, 2], [1, hidden.shape[1], width])
        groups.append(mixed)
    return ops.dense(ops.concat(groups, axis=2), weights.out, reach.out, weights.bias), groups


def mix(
    ops: Ops,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tiles: int,
    scores_reach: Named,
    mixed_reach: Named,
    softmax: Softmax,
) -> Tensor:
    """G T D, tile by tile; a tile ends with the product, so that nothing larger than its scores ever exists."""
    rows, parts = query.shape[1] // query_tiles, []
    for tile in range(query_tiles):
        scores = ops.matmul(ops.cut(query, 1, tile * rows, rows), key, scores_reach, transpose_b=True)
        shares = ops.softmax(scores) if softmax == "operator" else _softmax_in_parts(ops, scores)
        parts.append(ops.matmul(shares, value, mixed_reach))
    return ops.concat(parts, axis=1)


def _softmax_in_parts(ops: Ops, scores: Tensor) -> Tensor:
    """softmax(s) = exp(d - log sum exp(d)) with d = s - m, m the row maximum; every step int16.

    d saturates at -11, where exp is below one code of the result: the NPU's table has 513 entries for its whole range, so a wide
    range would ruin it. The sum lies between 1 and the number of keys, too wide for one int16 scale: one sum saturates at 8, one
    is coarse, and log(low) + log(max(coarse, 8)) - log 8 is exact to either one's rounding.
    """
    count = max(9.0, scores.shape[-1])
    below = ops.binary("SUB", scores, _row_maximum(ops, scores), _LEAST_EXPONENT)
    shares = ops.table("EXP", below, 1.0)
    low, coarse = ops.reduce("SUM", shares, 8.0), ops.reduce("SUM", shares, count)
    least = ops.binary("MAXIMUM", coarse, ops.constant(8.0, coarse), coarse.reach)
    most = math.log(count) + 0.1
    high = ops.table("LOG", least, most)
    high = ops.binary("SUB", high, ops.constant(math.log(8), high), most)
    logarithm = ops.binary("ADD", ops.table("LOG", low, most), high, most)
    return ops.table("EXP", ops.binary("SUB", below, logarithm, _LEAST_EXPONENT), UNIT)


def _row_maximum(ops: Ops, scores: Tensor) -> Tensor:
    """Halves against halves while that divides, then one reduction: Vela reduces a row at four cycles an element."""
    while scores.shape[-1] > 64 and scores.shape[-1] % 8 == 0:
        parts = ops.split(scores, len(scores.shape) - 1, 8)
        while len(parts) > 1:
            parts = [ops.binary("MAXIMUM", a, b, scores.reach) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        scores = parts[0]
    return ops.reduce("REDUCE_MAX", scores, scores.reach)
