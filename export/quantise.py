"""Precisions of the UNet: the text encoder and the decoder stay in full precision, as in the paper.

w8a16 is static: int8 weights a channel, 16-bit activations, calibrated on the student's own few-step trajectories. w8 keeps
activations in float: a smaller file, no claim about integer arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

Inputs = dict[str, np.ndarray]

HIGH_PRECISION = ("time_embedding", "time_proj", "add_embedding", "conv_in", "conv_out")
"""Modules that stay in float: few weights, large loss."""


def quantise_onnx(source: Path, target: Path, calibration: Sequence[Inputs]) -> None:
    """QDQ with uint16 activations and int8 weights per channel, for convolutions and matrix products."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[Inputs] = iter(calibration)

        def get_next(self) -> Inputs | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return next(self.rows, None)

    logging.disable(logging.WARNING)
    try:
        kept = [node.name for node in onnx.load(str(source)).graph.node if _is_high(node)]
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt16,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            extra_options={"WeightSymmetric": True},
        )
    finally:
        logging.disable(logging.NOTSET)


def _is_high(node: object) -> bool:
    names = [*getattr(node, "input", ()), getattr(node, "name", "")]
    return any(part in name for name in names for part in HIGH_PRECISION)


def compress_openvino(source: Path, target: Path) -> None:
    """int8 weights per channel, decompressed at run time."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.Core().read_model(str(source))
    ignored = nncf.IgnoredScope(patterns=[f".*{name}.*" for name in HIGH_PRECISION], validate=False)
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
    openvino.save_model(compressed, str(target), compress_to_fp16=False)


def to_openvino(source: Path, target: Path) -> None:
    """An ONNX file as OpenVINO IR, weights in float32."""
    import openvino

    openvino.save_model(openvino.convert_model(str(source)), str(target), compress_to_fp16=False)
