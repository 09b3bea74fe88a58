"""Runs a W8A16 TFLite file by LiteRT's kernels on this machine's CPU, float inputs to float outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import TargetUnavailable
from export.targets.ops import FULL
from export.targets.tflite import INSTALL


class LiteRtModel:
    """One opened file. Raises TargetUnavailable without ai-edge-litert."""

    def __init__(self, path: Path, threads: int = 1, keep: bool = False) -> None:
        """`keep`: also keep what lies between inputs and outputs, for `values`."""
        try:
            from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise TargetUnavailable("ai-edge-litert is not installed", remedy=INSTALL) from None
        self._runner: Any = Interpreter(str(path), num_threads=threads, experimental_preserve_all_tensors=keep)
        self._runner.allocate_tensors()
        self._inputs = self._runner.get_input_details()
        self._outputs = self._runner.get_output_details()
        self._first = self._outputs[0]  # the network's own: the writer puts it first

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
        return self._value(self._first)

    def outputs(self) -> dict[str, np.ndarray]:
        """All outputs of the last run by the tensors' names, which those of a signature may not be."""
        return {detail["name"]: self._value(detail) for detail in self._outputs}

    def values(self) -> dict[str, np.ndarray]:
        """Every named tensor of the last run, of a model opened with `keep`."""
        found: dict[str, np.ndarray] = {}
        for detail in self._runner.get_tensor_details():
            if detail["dtype"] == np.int16 and detail["name"]:
                found[detail["name"]] = self._value(detail)
        return found

    def _value(self, detail: Any) -> np.ndarray:
        return self._runner.get_tensor(detail["index"]) * np.float32(detail["quantization"][0])


def run_parts(paths: Sequence[Path], given: Mapping[str, np.ndarray]) -> np.ndarray:
    """The last part's first output by LiteRT's kernels, for inputs by name; what lies between parts is handed on by name."""
    known = dict(given)
    for path in paths:
        model = LiteRtModel(path)
        first = model(*(known[name] for name in model.names))
        known |= model.outputs()
    return first
