"""OpenVINO's precisions of one graph, each from the float32 ONNX file, through NNCF."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.layers import kept_layers, kept_nodes
from export.openvino_core import openvino_core
from export.quantise import Inputs

_GROUP = 32
"""Weights that share a scale in w4."""

_SMOOTH, _ROWS_TO_SMOOTH = 0.95, 16
"""SmoothQuant's strength, and the calibration rows that it needs: with fewer the largest activations are not among them, and what it moves
into the weights does more harm than good."""


def quantise_openvino(
    source: Path, target: Path, precision: str, calibration: Sequence[Inputs], keep: Sequence[str]
) -> None:
    """Write the ONNX file `source` as OpenVINO IR at `precision`; modules `keep` stay in float.

    fp16 and bf16 store float16 weights, w8bf16 and w8a8bf16 all that is not int8; the arithmetic is what the runtime is asked for
    (`export.runtime`).
    """
    import openvino

    if precision in ("fp32", "fp16", "bf16"):
        model = openvino.convert_model(str(source)) if precision == "fp32" else _to_halve(source)
        openvino.save_model(model, str(target), compress_to_fp16=precision != "fp32")
        return
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    whole = precision.removesuffix("bf16")
    model = openvino_core().read_model(str(source)) if whole == precision else _halved(source)
    # OpenVINO calls the layer of an ONNX node as the node, or, where it split a bias off, NAME/WithoutBiases.
    patterns = [rf"^{re.escape(name)}(/WithoutBiases)?$" for name in kept_layers(source, keep)]
    ignored = nncf.IgnoredScope(patterns=patterns, validate=False)
    if whole == "w8a8":
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

        smooth = _SMOOTH if len(calibration) >= _ROWS_TO_SMOOTH else -1
        done = _quiet(
            nncf.quantize,
            model,
            nncf.Dataset(list(calibration)),
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=ignored,
            advanced_parameters=AdvancedQuantizationParameters(
                smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=smooth)
            ),
        )
    elif whole == "w8":
        done = _quiet(nncf.compress_weights, model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
    else:
        from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

        done = _quiet(
            nncf.compress_weights,
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=_GROUP,
            all_layers=True,
            ignored_scope=ignored,
            advanced_parameters=AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.IGNORE),
        )
    openvino.save_model(done, str(target), compress_to_fp16=False)


def _to_halve(source: Path) -> Any:
    """The model, ready for float16 weights: each frequency of the timestep becomes a sum of two numbers, of which the second is what float16
    leaves out of the first. Times 999, what it leaves out is half a radian. (OpenVINO's own mark against compression is lost on the way.)
    """
    import numpy as np
    import openvino
    from openvino import opset13

    model, angles = openvino.convert_model(str(source)), set(kept_nodes(source, ["time_proj"]))
    for node in model.get_ops():
        for place in node.inputs() if node.get_friendly_name() in angles else ():
            value = place.get_source_output().get_node()
            if value.get_type_name() == "Constant" and value.get_element_type() == openvino.Type.f32:
                whole = value.get_data()
                first = whole.astype(np.float16).astype(np.float32)
                both = opset13.add(opset13.constant(first), opset13.constant(whole - first))
                place.replace_source_output(both.output(0))
    return model


def _halved(source: Path) -> Any:
    """The model with float16 weights. OpenVINO stores float32 in a model that holds int8 weights, whatever it is asked for, so this comes first."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.xml"
        openvino.save_model(_to_halve(source), str(path), compress_to_fp16=True)
        # Read from bytes: a model read from a file keeps the file open, and this one goes away.
        return openvino_core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def _quiet(work: Any, *args: Any, **options: Any) -> Any:
    """NNCF's work without its progress bars, which fill a log."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return work(*args, **options)
