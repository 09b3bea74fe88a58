"""Computes a network in float32 as `Ops` describe it and notes the largest value of every named result: calibration and truth in one.

Values saturate where a reach is a number, as codes would, so that tricks which lean on saturation can be seen to work in float.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from export.targets.ops import UNIT, Calibration, Ops, Reach, Tensor

_BINARY = {"ADD": torch.add, "SUB": torch.sub, "MUL": torch.mul, "MAXIMUM": torch.maximum}
_TABLE = {"EXP": torch.exp, "LOG": torch.log, "RSQRT": torch.rsqrt, "LOGISTIC": torch.sigmoid}


class Meter(Ops):
    """Plays a network on given inputs and adds what it saw to a calibration."""

    def __init__(self, inputs: dict[str, np.ndarray], found: Calibration, keep: bool = False) -> None:
        """With `keep`, `values` holds every named result; of results that share a name (tiles), the last."""
        self._inputs, self._found = inputs, found
        self.values: dict[str, np.ndarray] | None = {} if keep else None

    def part(self) -> None:
        pass

    def input(self, shape: Sequence[int], reach: Reach, name: str = "") -> Tensor:
        value = torch.from_numpy(np.ascontiguousarray(self._inputs[name], np.float32)).reshape(tuple(shape))
        return self._made(value, reach)

    def constant(self, value: float, like: Tensor) -> Tensor:
        return self._made(torch.full([1] * len(like.shape), float(value)), like.reach)

    def vector(self, values: np.ndarray) -> Tensor:
        return self._made(torch.from_numpy(values).float().reshape(1, 1, 1, -1), float(np.abs(values).max()))

    def dense(self, x: Tensor, weight: np.ndarray, reach: Reach, bias: np.ndarray | None = None) -> Tensor:
        return self._made(F.linear(x.value, _torch(weight), None if bias is None else _torch(bias)), reach)

    def conv(self, x: Tensor, weight: np.ndarray, reach: Reach, bias: np.ndarray | None, stride: int = 1) -> Tensor:
        found = F.conv2d(
            x.value.permute(0, 3, 1, 2),
            _torch(weight),
            None if bias is None else _torch(bias),
            stride=stride,
            padding=weight.shape[-1] // 2,
        )
        return self._made(found.permute(0, 2, 3, 1), reach)

    def matmul(self, a: Tensor, b: Tensor, reach: Reach, transpose_b: bool = False) -> Tensor:
        return self._made(a.value @ (b.value.transpose(1, 2) if transpose_b else b.value), reach)

    def softmax(self, x: Tensor) -> Tensor:
        return self._made(x.value.softmax(dim=-1), UNIT)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        return self._made(torch.cat([part.value for part in parts], dim=axis), max(part.reach for part in parts))

    def requantise(self, x: Tensor, reach: float) -> Tensor:
        return self._made(x.value, reach)

    def cut(self, x: Tensor, axis: int, start: int, size: int) -> Tensor:
        return self._made(x.value.narrow(axis, start, size), x.reach)

    def split(self, x: Tensor, axis: int, count: int) -> list[Tensor]:
        return [self._made(part, x.reach) for part in x.value.chunk(count, dim=axis)]

    def reduce(self, kind: str, x: Tensor, reach: Reach) -> Tensor:
        found = x.value.sum(dim=-1, keepdim=True) if kind == "SUM" else x.value.amax(dim=-1, keepdim=True)
        return self._made(found, reach)

    def pool(self, x: Tensor, reach: Reach) -> Tensor:
        return self._made(x.value.mean(dim=(1, 2), keepdim=True), reach)

    def double(self, x: Tensor) -> Tensor:
        return self._made(x.value.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2), x.reach)

    def binary(self, kind: str, a: Tensor, b: Tensor, reach: Reach) -> Tensor:
        return self._made(_BINARY[kind](a.value, b.value), reach)

    def table(self, kind: str, x: Tensor, reach: Reach) -> Tensor:
        return self._made(_TABLE[kind](x.value), reach)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return self._made(x.value.reshape(tuple(shape)), x.reach)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        return self._made(x.value.permute(*order), x.reach)

    def peaks(self, name: str, x: Tensor, count: int) -> np.ndarray:
        means = x.value.square().reshape(-1, count, x.shape[-1] // count).mean(dim=(0, 2)).numpy()
        before = self._found.peaks.get(name)
        self._found.peaks[name] = means if before is None else np.maximum(before, means)
        return self._found.peaks[name]

    def _made(self, value: torch.Tensor, reach: Reach) -> Tensor:
        if isinstance(reach, str):
            largest = float(value.abs().max())
            self._found.reaches[reach] = max(self._found.reaches.get(reach, 0.0), largest)
            if self.values is not None:
                self.values[reach] = value.numpy()
            return Tensor(-1, value.shape, largest, value)
        return Tensor(-1, value.shape, reach, value.clamp(-reach, reach))


def _torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
