"""The operators that a network for an NPU may be made of, as one interface with two players.

`tflite.Writer` writes each operator into a file; `meter.Meter` computes it in float32 and notes how large its results grow. A network
is described once, in terms of `Ops`: metered for its scales and its truth, then written. Activations are B T C or 1 H W C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Reach = float | str
"""The largest absolute value that codes of a tensor stand for, beyond which it saturates; or the name under which a calibration
knows it."""

FULL = 32767
"""Largest int16 that is used on both sides of zero."""

UNIT = FULL / 32768
"""Reach of what runs from 0 to 1: kernels insist on the scale 1 / 32768."""


class Tensor:
    """A tensor of a network: its place in the file, its shape and its reach; `value` where a Meter computed it."""

    def __init__(self, index: int, shape: Sequence[int], reach: float, value: Any = None) -> None:
        self.index, self.shape, self.reach, self.value = index, tuple(shape), reach, value


@dataclass
class Calibration:
    """What runs of a Meter found: name to largest absolute value, and name to the peaks of a norm's groups."""

    reaches: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, np.ndarray] = field(default_factory=dict)


class Ops(ABC):
    """One graph; operators run in the order in which they are added."""

    @abstractmethod
    def part(self) -> None:
        """From here on operators belong to another file, where a network is written in parts; nothing else hangs on it."""

    @abstractmethod
    def input(self, shape: Sequence[int], reach: Reach, name: str = "") -> Tensor:
        """An int16 input with values in [-reach, reach]."""

    @abstractmethod
    def constant(self, value: float, like: Tensor) -> Tensor:
        """A scalar with the scale of `like`, to be broadcast."""

    @abstractmethod
    def vector(self, values: np.ndarray) -> Tensor:
        """A constant of C channels, 1 1 1 C, to be broadcast."""

    @abstractmethod
    def dense(self, x: Tensor, weight: np.ndarray, reach: Reach, bias: np.ndarray | None = None) -> Tensor:
        """x B T D times float weight E D, plus bias E: B T E. Also 1 H W D."""

    @abstractmethod
    def conv(self, x: Tensor, weight: np.ndarray, reach: Reach, bias: np.ndarray | None, stride: int = 1) -> Tensor:
        """x 1 H W D with float weight E D K K, as PyTorch convolves with padding K // 2: 1 H/stride W/stride E."""

    @abstractmethod
    def matmul(self, a: Tensor, b: Tensor, reach: Reach, transpose_b: bool = False) -> Tensor:
        """Batched product of activations: B T D by B D S, or by B S D if `transpose_b`."""

    @abstractmethod
    def softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""

    @abstractmethod
    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Joined along `axis`; parts must share one scale."""

    @abstractmethod
    def requantise(self, x: Tensor, reach: float) -> Tensor:
        """x with another scale."""

    @abstractmethod
    def cut(self, x: Tensor, axis: int, start: int, size: int) -> Tensor:
        """The slice [start, start + size) of `axis`."""

    @abstractmethod
    def split(self, x: Tensor, axis: int, count: int) -> list[Tensor]:
        """`count` equal parts along `axis`."""

    @abstractmethod
    def reduce(self, kind: str, x: Tensor, reach: Reach) -> Tensor:
        """SUM or REDUCE_MAX over the last axis, which stays with size 1; values beyond `reach` saturate."""

    @abstractmethod
    def pool(self, x: Tensor, reach: Reach) -> Tensor:
        """The mean of each channel: 1 H W C to 1 1 1 C."""

    @abstractmethod
    def double(self, x: Tensor) -> Tensor:
        """Nearest upsampling: 1 H W C to 1 2H 2W C."""

    @abstractmethod
    def binary(self, kind: str, a: Tensor, b: Tensor, reach: Reach) -> Tensor:
        """ADD, SUB, MUL or MAXIMUM, broadcast to the larger shape."""

    @abstractmethod
    def table(self, kind: str, x: Tensor, reach: Reach) -> Tensor:
        """EXP, LOG, RSQRT or LOGISTIC, which NPUs do by a look-up table. LOGISTIC's reach is always UNIT."""

    @abstractmethod
    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same values in another shape."""

    @abstractmethod
    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Axes of x in another order."""

    @abstractmethod
    def peaks(self, name: str, x: Tensor, count: int) -> np.ndarray:
        """The largest mean square that a calibration saw of each of `count` equal parts of the last axis of x, which is not changed."""

    def arrange(self, x: Tensor, between: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Tensor:
        """x reshaped to `between`, its axes put in `order`, reshaped to `shape`."""
        return self.reshape(self.transpose(self.reshape(x, between), order), shape)


def int8_scale(weight: np.ndarray) -> np.ndarray:
    """The scale of each of the first axis of float weights as int8."""
    return np.maximum(np.abs(weight).reshape(len(weight), -1).max(axis=1), 1e-9) / 127


def as_int8(weight: np.ndarray) -> np.ndarray:
    """What float weights become in int8, in float again."""
    scale = int8_scale(weight).reshape(-1, *[1] * (weight.ndim - 1))
    return (np.round(weight / scale) * scale).astype(np.float32)
