"""OpenVINO's runtime, one for this process."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino


@cache
def openvino_core() -> openvino.Core:
    """The same one each time, and never given back.

    Each would put a stack for signals under the main thread, and the last of several to go leaves one there that is gone: the next signal,
    Ctrl-C too, then ends the process without a word.
    """
    import openvino

    return openvino.Core()
