"""Normalisations and activations of a UNet from operators that an NPU runs in int16.

Means are pools or products with rows of equal weights (exact in int8), squares are d * d, roots a table. A group's variance is scaled
to its calibrated peak before the table, and back by the next weights: a table of 513 entries serves one decade well, not six.
"""

from __future__ import annotations

import numpy as np

from export.targets.ops import UNIT, Ops, Tensor

_CUBE, _LINE = 0.07056, 1.5976
"""normal cdf(x) = logistic(_CUBE x^3 + _LINE x) to 1.4e-4. Source: Page, Applied Statistics 26 (1977), refitted since."""

_SATURATED = 12.0
"""Where the logistic function is within a code of 0 or 1."""

_FAR_APART = 100.0
"""Ratio of two groups' variances from which the smaller would keep too few codes when squared."""


def group_norm(
    ops: Ops, name: str, x: Tensor, groups: int, eps: float, gain: np.ndarray, offset: np.ndarray | None
) -> Tensor:
    """Of 1 H W C; without `offset` whoever reads the result adds it."""
    width = x.shape[-1]
    member = np.kron(np.eye(groups, dtype=np.float32), np.ones((1, width // groups), np.float32))  # G C
    average = member * (groups / width)
    mean = ops.dense(ops.pool(x, f"{name}.mean"), average, f"{name}.group_mean")
    centred = ops.binary("SUB", x, ops.dense(mean, member.T, f"{name}.group_mean_wide"), f"{name}.centred")
    peaks, least = np.maximum(ops.peaks(name, centred, groups), 1e-8), np.full(groups, eps)
    if peaks.max() > _FAR_APART * peaks.min():
        # Groups that live on few codes get more of them before they are squared; what the constants lose, the root gives back.
        level = ops.vector(member.T @ (1 / np.sqrt(peaks)))
        centred, least, peaks = ops.binary("MUL", centred, level, f"{name}.level"), eps / peaks, np.ones_like(peaks)
    power = ops.pool(ops.binary("MUL", centred, centred, f"{name}.square"), f"{name}.power")
    scaled = ops.dense(power, average / peaks[:, None], 2.0, least / peaks)
    root = ops.table("RSQRT", scaled, f"{name}.root")
    spread = member.T * gain[:, None] / np.sqrt(peaks)
    normal = ops.binary("MUL", centred, ops.dense(root, spread, f"{name}.gain"), f"{name}.normal")
    return normal if offset is None else ops.binary("ADD", normal, ops.vector(offset), f"{name}.out")


def layer_norm(ops: Ops, name: str, x: Tensor, eps: float) -> Tensor:
    """Of each token of 1 T C, without gain and offset: the product that reads it has them in its weights."""
    average = np.full((1, x.shape[-1]), 1 / x.shape[-1], np.float32)
    centred = ops.binary("SUB", x, ops.dense(x, average, f"{name}.mean"), f"{name}.centred")
    square = ops.binary("MUL", centred, centred, f"{name}.square")
    power = ops.dense(square, average, f"{name}.power", np.array([eps], np.float32))
    return ops.binary("MUL", centred, ops.table("RSQRT", power, f"{name}.root"), f"{name}.out")


def silu(ops: Ops, name: str, x: Tensor) -> Tensor:
    """x logistic(x)."""
    return ops.binary("MUL", x, ops.table("LOGISTIC", x, UNIT), f"{name}.silu")


def geglu(ops: Ops, name: str, x: Tensor, weight: np.ndarray, bias: np.ndarray) -> Tensor:
    """hidden * gelu(gate) of 1 T C, both halves of x W^T + b (2F C): 1 T F.

    The gate is computed as c x with c^3 = _CUBE, so that the cubic is c x (c^2 x^2 + _LINE / c); 1 / c goes into the other half.
    """
    hidden_w, gate_w = np.split(weight, 2)
    hidden_b, gate_b = np.split(bias, 2)
    scale = _CUBE ** (1 / 3)
    hidden = ops.dense(x, hidden_w / scale, f"{name}.hidden", hidden_b / scale)
    gate = ops.dense(x, gate_w * scale, f"{name}.gate", gate_b * scale)
    square = ops.binary("MUL", gate, gate, (6 * scale) ** 2)
    sum_ = ops.binary("ADD", square, ops.vector(np.array([_LINE / scale])), (6 * scale) ** 2 + _LINE / scale)
    share = ops.table("LOGISTIC", ops.binary("MUL", gate, sum_, _SATURATED), UNIT)
    return ops.binary("MUL", ops.binary("MUL", gate, share, f"{name}.gelu"), hidden, f"{name}.product")
