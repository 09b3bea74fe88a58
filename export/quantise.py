"""ONNX Runtime's precisions of one graph, each from the float32 ONNX file.

w8a16 and w8a8 are integer arithmetic: int8 weights a channel, 16- or 8-bit activations, calibrated on the student's own few-step
trajectories. w8 and w4 keep activations in float: a smaller file, no claim about integers. fp16 is half precision throughout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.layers import LAYERS, kept_layers, kept_nodes
from export.onnx_file import save_onnx, weights_beside

Inputs = dict[str, np.ndarray]

_BLOCK = 32
"""Weights that share a scale in w4."""


def quantise_onnx(
    source: Path, target: Path, precision: str, calibration: Sequence[Inputs], keep: Sequence[str]
) -> None:
    """Write `source` at `precision`; modules `keep` stay in float."""
    if precision == "fp16":
        return _half(source, target)
    kept = kept_layers(source, keep)
    if precision == "w8":
        return _weights8(source, target, kept)
    if precision == "w4":
        return _weights4(source, target, kept)
    return _integers(source, target, precision, calibration, kept)


def reader(calibration: Sequence[Inputs]) -> Any:
    """Rows of inputs as ONNX Runtime's quantiser reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[Inputs] = iter(calibration)

        def get_next(self) -> Inputs | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return next(self.rows, None)

    return Reader()


def _integers(
    source: Path,
    target: Path,
    precision: str,
    calibration: Sequence[Inputs],
    kept: list[str],
) -> None:
    """QDQ with unsigned activations of 16 or 8 bits and int8 weights per channel, for convolutions and matrix products."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    large = weights_beside(source).exists()
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            str(source),
            str(target),
            reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            activation_type={"w8a16": QuantType.QUInt16, "w8a8": QuantType.QUInt8}[precision],
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            use_external_data_format=large,
            extra_options={"WeightSymmetric": True},
        )
    finally:
        logging.disable(logging.NOTSET)
    if large:  # the integers may well go into one file
        save_onnx(onnx.load(str(target)), target)


def _half(source: Path, target: Path) -> None:
    """Weights and arithmetic in float16, inputs and output in float32. The timestep's angles, up to 999 rad, stay in float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    logging.disable(logging.WARNING)
    try:
        model = convert_float_to_float16(
            # A model in memory is passed on through protobuf to infer its shapes; of a file they are inferred in place.
            str(source) if weights_beside(source).exists() else onnx.load(str(source)),
            keep_io_types=True,
            node_block_list=kept_nodes(source, ["time_proj"]),
        )
    finally:
        logging.disable(logging.NOTSET)
    save_onnx(model, target)


def _weights8(source: Path, target: Path, kept: Sequence[str]) -> None:
    import onnx

    model = onnx.load(str(source))
    _store_int8(model, kept)
    save_onnx(model, target)


def _weights4(source: Path, target: Path, kept: Sequence[str]) -> None:
    """Matrix products in blocks of 4-bit weights (MatMulNBits); convolutions, which have no such operator, with 8-bit weights."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.WARNING)
    try:
        work: Any = MatMulNBitsQuantizer(
            onnx.load(str(source)), bits=4, block_size=_BLOCK, is_symmetric=True, nodes_to_exclude=list(kept)
        )
        work.process()
    finally:
        logging.disable(logging.NOTSET)
    model: Any = work.model.model
    _store_int8(model, kept)
    save_onnx(model, target)


def _store_int8(model: Any, kept: Sequence[str]) -> None:
    """Weights of the layers of `model` become int8, a scale for each output channel, with a DequantizeLinear before the layer."""
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    opened: list[Any] = []
    done: dict[str, str] = {}
    spared = {name for node in model.graph.node if node.name in kept for name in node.input}
    for node in model.graph.node:
        if node.op_type not in LAYERS or node.input[1] not in stored or node.input[1] in spared:
            continue
        name = node.input[1]
        if name not in done:
            weight = numpy_helper.to_array(stored[name])
            turned = any(entry.name == "transB" and entry.i for entry in node.attribute)
            axis = 0 if node.op_type == "Conv" or turned else weight.ndim - 1
            others = tuple(i for i in range(weight.ndim) if i != axis)
            scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True), 1e-12) / 127
            whole = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
            model.graph.initializer.append(numpy_helper.from_array(whole, f"{name}.int8"))
            model.graph.initializer.append(numpy_helper.from_array(scale.ravel().astype(np.float32), f"{name}.scale"))
            done[name] = f"{name}.opened"
            opened.append(
                helper.make_node(
                    "DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [done[name]], done[name], axis=axis
                )
            )
        node.input[1] = done[name]
    used = {name for node in model.graph.node for name in node.input}
    left = [t for t in model.graph.initializer if t.name in used or t.name.endswith((".int8", ".scale"))]
    nodes = [*opened, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(left)
    model.graph.node.extend(nodes)
