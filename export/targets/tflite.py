"""Writes W8A16 TFLite files operator by operator: int8 weights per channel, int16 activations, no converter in between.

A converter joins tiles again and turns products of activations into fully connected layers that NPUs refuse; what is written
here stays as it is written. Knows the format (the schema that ai-edge-litert ships) and quantisation, no attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import TargetUnavailable
from export.targets.ops import FULL, UNIT, Calibration, Ops, Reach, Tensor, int8_scale
from export.targets.tflite_parts import cut_model, write_model

INSTALL = 'pip install "edgefusion[npu]"'

_MARGIN = 2.0
"""How far beyond what a calibration saw the codes of a named tensor reach. Other prompts go further, and saturation does more harm
than the bit that this costs of sixteen."""


def schema() -> Any:
    """The flatbuffer classes of TFLite. Raises TargetUnavailable."""
    try:
        from ai_edge_litert import schema_py_generated  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TargetUnavailable("ai-edge-litert is not installed", remedy=INSTALL) from None
    return schema_py_generated


class Writer(Ops):
    """One graph being written. `found`: what a calibration found for names that stand for a reach."""

    def __init__(self, found: Calibration | None = None) -> None:
        self._s, self._found = schema(), found or Calibration()
        self._model = self._s.ModelT()
        self._model.version, self._model.description = 3, b"edgefusion"
        self._model.buffers, self._model.operatorCodes = [self._s.BufferT()], []
        self._graph = self._s.SubGraphT()
        self._graph.tensors, self._graph.operators, self._graph.inputs = [], [], []
        self._model.subgraphs = [self._graph]
        self._codes: dict[tuple[str, int], int] = {}
        self._starts: list[int] = []

    def part(self) -> None:
        self._starts.append(len(self._graph.operators))

    def input(self, shape: Sequence[int], reach: Reach, name: str = "") -> Tensor:
        tensor = self._tensor(shape, reach, name=name)
        self._graph.inputs.append(tensor.index)
        return tensor

    def constant(self, value: float, like: Tensor) -> Tensor:
        code = np.array([round(value / like.reach * FULL)], np.int16)
        return self._tensor([1] * len(like.shape), like.reach, code)

    def vector(self, values: np.ndarray) -> Tensor:
        reach = max(float(np.abs(values).max()), 1e-9)
        codes = np.round(values / reach * FULL).astype(np.int16)
        return self._tensor([1, 1, 1, len(values)], reach, codes)

    def dense(self, x: Tensor, weight: np.ndarray, reach: Reach, bias: np.ndarray | None = None) -> Tensor:
        options = self._s.FullyConnectedOptionsT()
        options.keepNumDims = True
        inputs = [x.index, *self._weights(x, weight, bias)]
        return self._add("FULLY_CONNECTED", 7, inputs, [*x.shape[:-1], len(weight)], reach, options)

    def conv(self, x: Tensor, weight: np.ndarray, reach: Reach, bias: np.ndarray | None, stride: int = 1) -> Tensor:
        options = self._s.Conv2DOptionsT()
        options.strideH = options.strideW = stride
        options.dilationHFactor = options.dilationWFactor = 1
        options.padding = self._s.Padding.SAME
        shape = [1, x.shape[1] // stride, x.shape[2] // stride, len(weight)]
        if stride == 2 and weight.shape[-1] == 3:
            # SAME would pad the far side; PyTorch's padding of 1 shows on the near side only, where the size is even.
            x, options.padding = self._pad_near(x), self._s.Padding.VALID
        inputs = [x.index, *self._weights(x, weight.transpose(0, 2, 3, 1), bias)]
        return self._add("CONV_2D", 5, inputs, shape, reach, options)

    def matmul(self, a: Tensor, b: Tensor, reach: Reach, transpose_b: bool = False) -> Tensor:
        options = self._s.BatchMatMulOptionsT()
        options.adjX, options.adjY, options.asymmetricQuantizeInputs = False, transpose_b, False
        columns = b.shape[-2] if transpose_b else b.shape[-1]
        return self._add("BATCH_MATMUL", 4, [a.index, b.index], [*a.shape[:-1], columns], reach, options)

    def softmax(self, x: Tensor) -> Tensor:
        options = self._s.SoftmaxOptionsT()
        options.beta = 1.0
        return self._add("SOFTMAX", 3, [x.index], x.shape, UNIT, options)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        options = self._s.ConcatenationOptionsT()
        options.axis = axis
        return self._add("CONCATENATION", 3, [p.index for p in parts], shape, parts[0].reach, options)

    def requantise(self, x: Tensor, reach: float) -> Tensor:
        if x.reach == reach:
            return x
        return self._add("QUANTIZE", 3, [x.index], x.shape, reach, self._s.QuantizeOptionsT())

    def cut(self, x: Tensor, axis: int, start: int, size: int) -> Tensor:
        if size == x.shape[axis]:
            return x
        begin, sizes = [0] * len(x.shape), list(x.shape)
        begin[axis], sizes[axis] = start, size
        inputs = [x.index, self._ints(begin), self._ints(sizes)]
        return self._add("SLICE", 4, inputs, sizes, x.reach, self._s.SliceOptionsT())

    def split(self, x: Tensor, axis: int, count: int) -> list[Tensor]:
        shape = list(x.shape)
        shape[axis] //= count
        options = self._s.SplitOptionsT()
        options.numSplits = count
        first = self._add("SPLIT", 4, [self._ints(axis), x.index], shape, x.reach, options)
        rest = [self._tensor(shape, x.reach) for _ in range(count - 1)]
        self._graph.operators[-1].outputs = [first.index, *(t.index for t in rest)]
        return [first, *rest]

    def reduce(self, kind: str, x: Tensor, reach: Reach) -> Tensor:
        return self._reduced(kind, 3 if kind == "REDUCE_MAX" else 2, x, [len(x.shape) - 1], reach)

    def pool(self, x: Tensor, reach: Reach) -> Tensor:
        return self._reduced("MEAN", 3, x, [1, 2], reach)

    def double(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        options = self._s.ResizeNearestNeighborOptionsT()
        inputs = [x.index, self._ints([2 * height, 2 * width])]
        return self._add("RESIZE_NEAREST_NEIGHBOR", 4, inputs, [1, 2 * height, 2 * width, channels], x.reach, options)

    def binary(self, kind: str, a: Tensor, b: Tensor, reach: Reach) -> Tensor:
        names = {"ADD": "AddOptionsT", "SUB": "SubOptionsT", "MUL": "MulOptionsT", "MAXIMUM": "MaximumMinimumOptionsT"}
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self._add(kind, 3, [a.index, b.index], shape, reach, getattr(self._s, names[kind])())

    def table(self, kind: str, x: Tensor, reach: Reach) -> Tensor:
        return self._add(kind, 2, [x.index], x.shape, reach, self._s.ExpOptionsT() if kind == "EXP" else None)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        if tuple(shape) == x.shape:
            return x
        options = self._s.ReshapeOptionsT()
        options.newShape = list(shape)
        return self._add("RESHAPE", 1, [x.index, self._ints(list(shape))], shape, x.reach, options)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        shape = [x.shape[axis] for axis in order]
        return self._add("TRANSPOSE", 4, [x.index, self._ints(list(order))], shape, x.reach, None)

    def peaks(self, name: str, x: Tensor, count: int) -> np.ndarray:
        return self._found.peaks[name]

    def save(self, outputs: Sequence[Tensor], path: Path) -> None:
        """Write the file whole."""
        self._graph.outputs = [output.index for output in outputs]
        write_model(self._model, path)

    def save_parts(self, outputs: Sequence[Tensor], path: Path) -> list[Path]:
        """Write NAME.00.tflite, NAME.01.tflite, ..., cut where `part` was called, to be run in this order."""
        self._graph.outputs = [output.index for output in outputs]
        parts = cut_model(self._model, self._starts)
        paths = [path.with_suffix(f".{n:02}{path.suffix}") for n in range(len(parts))]
        for part, place in zip(parts, paths, strict=True):
            write_model(part, place)
        return paths

    def _add(
        self, kind: str, version: int, inputs: Sequence[int], shape: Sequence[int], reach: Reach, options: Any
    ) -> Tensor:
        if (kind, version) not in self._codes:
            code = self._s.OperatorCodeT()
            code.builtinCode = getattr(self._s.BuiltinOperator, kind)
            code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
            self._codes[kind, version] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(code)
        output, node = self._tensor(shape, reach), self._s.OperatorT()
        node.opcodeIndex, node.inputs, node.outputs = self._codes[kind, version], list(inputs), [output.index]
        if options is not None:
            node.builtinOptions = options
            node.builtinOptionsType = getattr(self._s.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self._graph.operators.append(node)
        return output

    def _weights(self, x: Tensor, weight: np.ndarray, bias: np.ndarray | None) -> list[int]:
        """int8 codes with a scale for each of the first axis, and the int64 bias in the scale of the sums."""
        scale = int8_scale(weight)
        codes = np.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        found = [self._raw(codes.shape, self._s.TensorType.INT8, codes, scale)]
        if bias is not None:
            scales = scale * x.reach / FULL
            sums = np.round(bias / scales).astype(np.int64)
            found.append(self._raw(sums.shape, self._s.TensorType.INT64, sums, scales))
        return found

    def _pad_near(self, x: Tensor) -> Tensor:
        """A row above and a column to the left of zeros."""
        _, height, width, channels = x.shape
        inputs = [x.index, self._ints([[0, 0], [1, 0], [1, 0], [0, 0]])]
        return self._add("PAD", 2, inputs, [1, height + 1, width + 1, channels], x.reach, self._s.PadOptionsT())

    def _reduced(self, kind: str, version: int, x: Tensor, axes: list[int], reach: Reach) -> Tensor:
        options = self._s.ReducerOptionsT()
        options.keepDims = True
        shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        return self._add(kind, version, [x.index, self._ints(axes)], shape, reach, options)

    def _tensor(self, shape: Sequence[int], reach: Reach, data: np.ndarray | None = None, name: str = "") -> Tensor:
        if isinstance(reach, str):
            name, reach = name or reach, max(self._found.reaches[reach] * _MARGIN, 1e-6)
        index = self._raw(shape, self._s.TensorType.INT16, data, np.array([reach / FULL]), name)
        return Tensor(index, shape, reach)

    def _ints(self, values: Any) -> int:
        array = np.array(values, np.int32)
        return self._raw(array.shape, self._s.TensorType.INT32, array, None)

    def _raw(
        self, shape: Sequence[int], kind: int, data: np.ndarray | None, scale: np.ndarray | None, name: str = ""
    ) -> int:
        tensor = self._s.TensorT()
        tensor.shape, tensor.type = [int(size) for size in shape], kind
        tensor.name = (name or f"t{len(self._graph.tensors)}").encode()
        if scale is not None:
            tensor.quantization = self._s.QuantizationParametersT()
            tensor.quantization.scale = scale.astype(np.float32)
            tensor.quantization.zeroPoint = np.zeros(len(scale), np.int64)
        if data is not None:
            buffer = self._s.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self._model.buffers.append(buffer)
            tensor.buffer = len(self._model.buffers) - 1
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1
