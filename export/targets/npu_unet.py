"""A UNet as one W8A16 TFLite file for NPUs: what the host computes, calibration on real inputs, and the writing.

The host gives latent, text states and the time vectors (`HostTime`); everything else is in the file, as int16 and int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.graph import Graph, to_onnx
from export.targets.attention import Softmax
from export.targets.meter import Meter
from export.targets.ops import Calibration
from export.targets.tflite import Writer
from export.targets.unet import Cuts, HostTime, Lowering, check_unet

Inputs = dict[str, np.ndarray]
"""latent 1 C H W, timestep 1, text 1 S D, and guidance 1 E where it is an input: as `runtime.Build` calls a UNet."""
_HOST = ("timestep", "text", "guidance")
"""Of these, what the host takes, in its order."""


def device_inputs(time: np.ndarray, widths: dict[str, int], latent: np.ndarray, text: np.ndarray) -> Inputs:
    """What the file is fed, by its inputs' names: latent 1 H W C, text, and each resnet's part of the time vectors 1 E."""
    fed, start = {"latent": latent.transpose(0, 2, 3, 1), "text": text}, 0
    for name, width in widths.items():
        fed[f"time.{name}"] = time[:, start : start + width].reshape(1, 1, 1, width)
        start += width
    return fed


def torch_inputs(host: HostTime, row: Inputs) -> Inputs:
    """As `device_inputs`, of one call of the UNet, with the time vectors by PyTorch."""
    with torch.inference_mode():
        time = host(*(torch.from_numpy(row[name]) for name in _HOST if name in row)).numpy()
    return device_inputs(time, host.widths, row["latent"], row["text"])


def calibrate(
    unet: Any, rows: Iterable[Inputs], keep: Sequence[str] = (), progress: Callable[[str], None] = lambda what: None
) -> Calibration:
    """Scales of every activation over `rows` of UNet inputs; `keep` as for `write_unet`. Raises StageError for a UNet that is not lowered.

    Twice over them: the peaks of the groups' variances must be known before what is scaled by them can be measured.
    """
    check_unet(unet)
    host, rows, found = HostTime(unet), list(rows), Calibration()
    for turn in range(2):
        found.reaches.clear()
        for i, row in enumerate(rows):
            progress(f"calibrating the NPU's unet: {turn * len(rows) + i + 1} of {2 * len(rows)}")
            meter_unet(unet, host, row, found, keep)
    return found


def usual_calibration(unet: Any) -> Calibration:
    """Scales to compile with where nothing was calibrated: a compiler's costs do not depend on them."""

    class Usual(dict[str, Any]):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def __missing__(self, name: str) -> Any:
            return self.value

    return Calibration(Usual(4.0), Usual(np.ones(unet.config.norm_num_groups, np.float32)))


def meter_unet(
    unet: Any, host: HostTime, row: Inputs, found: Calibration, keep: Sequence[str] = (), values: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The prediction 1 C H W as the operators give it in float32, and with `values` every named one."""
    meter = Meter(torch_inputs(host, row), found, values)
    with torch.inference_mode():
        # One head at a time: the same values, and no more memory than one head's scores.
        said = Lowering(meter, unet, _one_head(unet), keep=keep).run(row["latent"].shape[-1], row["text"].shape[1])
    return said.value.permute(0, 3, 1, 2).numpy(), meter.values or {}


def write_unet(
    unet: Any,
    side: int,
    tokens: int,
    found: Calibration,
    path: Path,
    cuts: Cuts,
    softmax: Softmax = "parts",
    release: bool = True,
    keep: Sequence[str] = (),
    in_parts: bool = False,
) -> list[Path]:
    """Write the file, or with `in_parts` one for each tiled block and for what lies between; returns them in the order they run.

    Convolutions of the modules `keep` get weights of 16 bits. The last file's first output is the prediction 1 H W C.
    Raises TargetUnavailable without ai-edge-litert.
    """
    check_unet(unet)
    writer = Writer(found)
    work = Lowering(writer, unet, cuts, softmax, release, keep)
    outputs = [work.run(side, tokens), *work.released]
    if in_parts:
        return writer.save_parts(outputs, path)
    writer.save(outputs, path)
    return [path]


def write_host(unet: Any, inputs: dict[str, torch.Tensor], path: Path) -> None:
    """Write the host's part as ONNX in float32: timestep, text (where the UNet pools it) and guidance (where it is an input) to the time
    vectors 1 E."""
    example = {name: inputs[name] for name in _HOST if name in inputs}
    to_onnx(Graph("unet_host", HostTime(unet).eval(), example, "time"), path)


def _one_head(unet: Any) -> Cuts:
    return {name: (1, 1) for name, module in unet.named_modules() if hasattr(module, "to_q")}
