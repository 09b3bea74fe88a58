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
from cluster.storage import publish_bytes

INSTALL = 'pip install "edgefusion[npu]"'

_FULL = 32767
"""Largest int16 that is used on both sides of zero."""


def schema() -> Any:
    """The flatbuffer classes of TFLite. Raises TargetUnavailable."""
    try:
        from ai_edge_litert import schema_py_generated  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TargetUnavailable("ai-edge-litert is not installed", remedy=INSTALL) from None
    return schema_py_generated


class Tensor:
    """A tensor of the file being written: its place, its shape and the largest value that its int16 codes reach."""

    def __init__(self, index: int, shape: Sequence[int], reach: float) -> None:
        self.index, self.shape, self.reach = index, tuple(shape), reach


class Writer:
    """One graph; operators run in the order in which they are added."""

    def __init__(self) -> None:
        self._s = schema()
        self._model = self._s.ModelT()
        self._model.version, self._model.description = 3, b"edgefusion"
        self._model.buffers, self._model.operatorCodes = [self._s.BufferT()], []
        self._graph = self._s.SubGraphT()
        self._graph.tensors, self._graph.operators, self._graph.inputs = [], [], []
        self._model.subgraphs = [self._graph]
        self._codes: dict[tuple[str, int], int] = {}

    def input(self, shape: Sequence[int], reach: float) -> Tensor:
        """An int16 input with values in [-reach, reach]."""
        tensor = self._tensor(shape, reach)
        self._graph.inputs.append(tensor.index)
        return tensor

    def constant(self, value: float, like: Tensor) -> Tensor:
        """A scalar with the scale of `like`, to be broadcast."""
        code = np.array([round(value / like.reach * _FULL)], np.int16)
        return self._tensor([1] * len(like.shape), like.reach, code)

    def dense(self, x: Tensor, weight: np.ndarray, reach: float, bias: np.ndarray | None = None) -> Tensor:
        """x 1 T D times float weight E D, plus bias E: 1 T E."""
        largest = np.maximum(np.abs(weight).max(axis=1), 1e-9)
        scale = largest / 127
        codes = np.round(weight / scale[:, None]).astype(np.int8)
        w = self._raw(codes.shape, self._s.TensorType.INT8, codes, scale)
        inputs = [x.index, w]
        if bias is not None:
            scales = scale * x.reach / _FULL
            sums = np.round(bias / scales).astype(np.int64)
            inputs.append(self._raw(sums.shape, self._s.TensorType.INT64, sums, scales))
        options = self._s.FullyConnectedOptionsT()
        options.keepNumDims = True
        return self._add("FULLY_CONNECTED", 7, inputs, [*x.shape[:-1], len(weight)], reach, options)

    def matmul(self, a: Tensor, b: Tensor, reach: float, transpose_b: bool = False) -> Tensor:
        """Batched product of activations: B T D by B D S, or by B S D if `transpose_b`."""
        options = self._s.BatchMatMulOptionsT()
        options.adjX, options.adjY, options.asymmetricQuantizeInputs = False, transpose_b, False
        columns = b.shape[-2] if transpose_b else b.shape[-1]
        return self._add("BATCH_MATMUL", 4, [a.index, b.index], [*a.shape[:-1], columns], reach, options)

    def softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        options = self._s.SoftmaxOptionsT()
        options.beta = 1.0
        return self._add("SOFTMAX", 3, [x.index], x.shape, _FULL / 32768, options)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Joined along `axis`; parts must share one scale."""
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        options = self._s.ConcatenationOptionsT()
        options.axis = axis
        return self._add("CONCATENATION", 3, [p.index for p in parts], shape, parts[0].reach, options)

    def cut(self, x: Tensor, axis: int, start: int, size: int) -> Tensor:
        """The slice [start, start + size) of `axis`."""
        if size == x.shape[axis]:
            return x
        begin, sizes = [0] * len(x.shape), list(x.shape)
        begin[axis], sizes[axis] = start, size
        inputs = [x.index, self._ints(begin), self._ints(sizes)]
        return self._add("SLICE", 4, inputs, sizes, x.reach, self._s.SliceOptionsT())

    def split(self, x: Tensor, axis: int, count: int) -> list[Tensor]:
        """`count` equal parts along `axis`."""
        shape = list(x.shape)
        shape[axis] //= count
        options = self._s.SplitOptionsT()
        options.numSplits = count
        first = self._add("SPLIT", 4, [self._ints(axis), x.index], shape, x.reach, options)
        rest = [self._tensor(shape, x.reach) for _ in range(count - 1)]
        self._graph.operators[-1].outputs = [first.index, *(t.index for t in rest)]
        return [first, *rest]

    def reduce(self, kind: str, x: Tensor, reach: float) -> Tensor:
        """SUM or REDUCE_MAX over the last axis, which stays with size 1; values beyond `reach` saturate."""
        options = self._s.ReducerOptionsT()
        options.keepDims = True
        inputs = [x.index, self._ints([len(x.shape) - 1])]
        return self._add(kind, 3 if kind == "REDUCE_MAX" else 2, inputs, [*x.shape[:-1], 1], reach, options)

    def binary(self, kind: str, a: Tensor, b: Tensor, reach: float) -> Tensor:
        """ADD, SUB or MAXIMUM, broadcast to the larger shape."""
        names = {"ADD": "AddOptionsT", "SUB": "SubOptionsT", "MAXIMUM": "MaximumMinimumOptionsT"}
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self._add(kind, 3, [a.index, b.index], shape, reach, getattr(self._s, names[kind])())

    def table(self, kind: str, x: Tensor, reach: float) -> Tensor:
        """EXP or LOG, which NPUs do by a look-up table."""
        return self._add(kind, 2, [x.index], x.shape, reach, self._s.ExpOptionsT() if kind == "EXP" else None)

    def arrange(self, x: Tensor, between: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Tensor:
        """x reshaped to `between`, its axes put in `order`, reshaped to `shape`."""
        for kind, target in (("RESHAPE", between), ("TRANSPOSE", order), ("RESHAPE", shape)):
            turned = [x.shape[axis] for axis in target] if kind == "TRANSPOSE" else list(target)
            if kind == "RESHAPE" and turned == list(x.shape):
                continue
            options = None
            if kind == "RESHAPE":
                options = self._s.ReshapeOptionsT()
                options.newShape = turned
            x = self._add(
                kind, 1 if kind == "RESHAPE" else 4, [x.index, self._ints(list(target))], turned, x.reach, options
            )
        return x

    def save(self, outputs: Sequence[Tensor], path: Path) -> None:
        """Write the file whole."""
        import flatbuffers

        self._graph.outputs = [output.index for output in outputs]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        publish_bytes(path, bytes(builder.Output()))

    def _add(
        self, kind: str, version: int, inputs: Sequence[int], shape: Sequence[int], reach: float, options: Any
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

    def _tensor(self, shape: Sequence[int], reach: float, data: np.ndarray | None = None) -> Tensor:
        index = self._raw(shape, self._s.TensorType.INT16, data, np.array([reach / _FULL]))
        return Tensor(index, shape, reach)

    def _ints(self, values: Any) -> int:
        array = np.array(values, np.int32)
        return self._raw(array.shape, self._s.TensorType.INT32, array, None)

    def _raw(self, shape: Sequence[int], kind: int, data: np.ndarray | None, scale: np.ndarray | None) -> int:
        tensor = self._s.TensorT()
        tensor.shape, tensor.type = [int(size) for size in shape], kind
        tensor.name = f"t{len(self._graph.tensors)}".encode()
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
