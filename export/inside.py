"""What quantising does to each block of the UNet: signal-to-noise of its output inside the lowered graph, against the same tensor in float."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from export import parity
from export.layers import module_of

_BLOCK = re.compile(r"(?:^|\.)(down_blocks\.\d+|mid_block|up_blocks\.\d+)(?:\.|$)")

Values = Mapping[str, np.ndarray]


def unet_blocks(source: Path) -> dict[str, str]:
    """Block (`down_blocks.0`, `mid_block`, ...) to the name of the tensor that it hands on, in the float32 ONNX file of a UNet."""
    import onnx

    nodes = onnx.load(str(source), load_external_data=False).graph.node
    homes = [match[1] if (match := _BLOCK.search(module_of(node))) else "" for node in nodes]
    readers: dict[str, set[str]] = {}
    for node, home in zip(nodes, homes, strict=True):
        for name in node.input:
            readers.setdefault(name, set()).add(home)
    # The last tensor of a block that somebody outside reads: skips are handed on as well, but before it.
    return {
        home: name
        for node, home in zip(nodes, homes, strict=True)
        for name in node.output
        if home and readers.get(name, set()) - {home}
    }


def block_snr_db(blocks: Mapping[str, str], plain: Values, quantised: Values) -> dict[str, float] | None:
    """Of each block whose tensor both graphs still have, in dB; None where the target shows none."""
    both = {block: name for block, name in blocks.items() if name in plain and name in quantised}
    return {block: parity.snr_db(plain[name], quantised[name]) for block, name in both.items()} or None
