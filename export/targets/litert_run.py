"""Runs a W8A16 TFLite file by LiteRT's kernels on this machine's CPU, float inputs to float outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import TargetUnavailable
from export.targets.ops import FULL
from export.targets.tflite import INSTALL


class LiteRtModel:
    """One opened file. Raises TargetUnavailable without ai-edge-litert."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise TargetUnavailable("ai-edge-litert is not installed", remedy=INSTALL) from None
        self._runner: Any = Interpreter(str(path), num_threads=threads)
        self._runner.allocate_tensors()
        self._inputs = self._runner.get_input_details()
        self._first = self._runner.get_output_details()[0]  # the network's own: the writer puts it first

    @property
    def names(self) -> list[str]:
        """Of the inputs, in the file's order."""
        return [detail["name"] for detail in self._inputs]

    @property
    def widths(self) -> list[int]:
        """Of the inputs' last axes."""
        return [int(detail["shape"][-1]) for detail in self._inputs]

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """The first output for inputs in the file's order; values beyond a scale saturate."""
        for detail, value in zip(self._inputs, inputs, strict=True):
            codes = np.clip(np.round(value / detail["quantization"][0]), -FULL, FULL)
            self._runner.set_tensor(detail["index"], codes.astype(np.int16))
        self._runner.invoke()
        return self._runner.get_tensor(self._first["index"]) * np.float32(self._first["quantization"][0])
