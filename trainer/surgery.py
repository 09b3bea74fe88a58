"""BK-SDM block removal: a small student cut out of any SD-v1-shaped UNet, by the published map.

Source: Kim et al., "BK-SDM", arXiv 2305.15798, and its released code. Knows shapes and names only, no data and no losses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel

Kind = Literal["base", "small", "tiny"]

_PER_STAGE = (
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "only_cross_attention",
)
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(?:(resnets|attentions)\.(\d+)\.)?(.+)")


class SurgeryError(ValueError):
    """The teacher is not a UNet that this removal map fits."""


def student_config(teacher: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The diffusers config of a BK-SDM student of a UNet with config `teacher`.

    Base keeps one pair of residual and attention block where the teacher has several; Small also drops the mid block; Tiny also the
    innermost stage on both sides. Raises SurgeryError for a teacher of another shape.
    """
    _refuse_misfits(teacher, kind)
    config = {k: v for k, v in teacher.items() if not k.startswith("_")}
    config["layers_per_block"] = 1
    if kind != "base":
        config["mid_block_type"] = None
    if kind == "tiny":
        config["block_out_channels"] = list(teacher["block_out_channels"])[:-1]
        config["down_block_types"] = list(teacher["down_block_types"])[:-1]
        config["up_block_types"] = list(teacher["up_block_types"])[1:]
        for key in _PER_STAGE:
            if isinstance(teacher.get(key), list | tuple):
                config[key] = list(teacher[key])[:-1]
    return config


def tensor_map(student_keys: list[str], teacher: Mapping[str, Any], kind: Kind) -> dict[str, str]:
    """Student tensor name to the teacher tensor it is copied from.

    On the way up a student stage has two pairs: its first is the teacher's first, its last the teacher's last, whose skip
    connections have the same widths.
    """
    last_pair = int(teacher["layers_per_block"])
    return {key: _teacher_key(key, last_pair, shift=1 if kind == "tiny" else 0) for key in student_keys}


def build_student(teacher: UNet2DConditionModel, kind: Kind) -> UNet2DConditionModel:
    """A student that holds copies of the teacher's kept tensors, in the teacher's dtype and on its device."""
    config = dict(teacher.config)
    with torch.device("meta"):
        student: Any = UNet2DConditionModel.from_config(student_config(config, kind))
    source = teacher.state_dict()
    wanted = tensor_map(list(student.state_dict()), config, kind)
    for key, origin in wanted.items():
        if origin not in source or source[origin].shape != student.state_dict()[key].shape:
            raise SurgeryError(f"the student's {key} has no match in the teacher (looked for {origin})")
    student.load_state_dict({key: source[origin].clone() for key, origin in wanted.items()}, assign=True)
    return student


def _teacher_key(key: str, last_pair: int, shift: int) -> str:
    found = _BLOCK.fullmatch(key)
    if found is None:
        return key
    side, stage, part, pair, rest = found.groups()
    if side == "down_blocks":
        return key
    origin = f"{side}.{int(stage) + shift}."
    if part is None:
        return origin + rest
    return f"{origin}{part}.{last_pair if pair == '1' else 0}.{rest}"


def _refuse_misfits(teacher: Mapping[str, Any], kind: Kind) -> None:
    if kind not in get_args(Kind):
        raise SurgeryError(f"a student is {', '.join(get_args(Kind))}, not {kind!r}")
    lacking = {"down_block_types", "up_block_types", "block_out_channels", "layers_per_block"} - set(teacher)
    if lacking:
        raise SurgeryError(f"the teacher's config lacks {sorted(lacking)}: is it a UNet2DConditionModel's?")
    down, up = list(teacher["down_block_types"]), list(teacher["up_block_types"])
    if down != ["CrossAttnDownBlock2D"] * (len(down) - 1) + ["DownBlock2D"] or len(down) < 2:
        raise SurgeryError(f"down_block_types must be cross-attention blocks and one plain last block, not {down}")
    if up != ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(down) - 1):
        raise SurgeryError(f"up_block_types must mirror down_block_types, not {up}")
    if teacher.get("mid_block_type") is None:
        raise SurgeryError("the teacher has no mid block: is it a student already?")
    layers = teacher["layers_per_block"]
    if not isinstance(layers, int) or layers < 2:
        raise SurgeryError(f"layers_per_block must be one number of at least 2 to remove pairs from, not {layers}")
    widths = list(teacher["block_out_channels"])
    if len(widths) != len(down):
        raise SurgeryError(f"block_out_channels has {len(widths)} widths for {len(down)} stages")
    if kind == "tiny" and widths[-1] != widths[-2]:
        raise SurgeryError(
            f"Tiny joins the second-innermost stages, so the last two of block_out_channels must agree, not {widths}; "
            "use base or small"
        )
