"""OpenVINO's precisions of one graph, each from the float32 ONNX file, through NNCF."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.layers import kept_layers
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
        openvino.save_model(openvino.convert_model(str(source)), str(target), compress_to_fp16=precision != "fp32")
        return
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    whole = precision.removesuffix("bf16")
    model = openvino.Core().read_model(str(source)) if whole == precision else _halved(source)
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


def _halved(source: Path) -> Any:
    """The model with float16 weights. OpenVINO stores float32 in a model that holds int8 weights, whatever it is asked for, so this comes first."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.xml"
        openvino.save_model(openvino.convert_model(str(source)), str(path), compress_to_fp16=True)
        # Read from bytes: a model read from a file keeps the file open, and this one goes away.
        return openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def _quiet(work: Any, *args: Any, **options: Any) -> Any:
    """NNCF's work without its progress bars, which fill a log."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return work(*args, **options)
