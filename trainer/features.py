"""The six feature pairs of BK-SDM, caught by forward hooks on any SD-v1-shaped teacher and its student.

Source: Kim et al., arXiv 2305.15798, and its released code: every down stage that the student has and every up stage, where the
innermost kept stage is tapped at its last attention's projection, for it has no downsampler in the student.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from trainer.surgery import Kind


def feature_names(stages: int, layers: int, kind: Kind) -> tuple[list[str], list[str]]:
    """(student's, teacher's) module names for a teacher of `stages` stages with `layers` layers a block."""
    kept = stages - 1 if kind == "tiny" else stages
    shift = stages - kept
    student = [f"down_blocks.{i}" for i in range(kept)] + [f"up_blocks.{i}" for i in range(kept)]
    teacher = [f"down_blocks.{i}" for i in range(kept)] + [f"up_blocks.{i + shift}" for i in range(kept)]
    if kind == "tiny":
        student[kept - 1] += ".attentions.0.proj_out"
        teacher[kept - 1] += f".attentions.{layers - 1}.proj_out"
    return student, teacher


class Features:
    """Catches the outputs of the named modules in each forward pass; read them with `take`."""

    def __init__(self, unet: UNet2DConditionModel, names: Sequence[str]) -> None:
        self.names, self._caught = list(names), {}
        self._handles = [unet.get_submodule(name).register_forward_hook(self._catch(name)) for name in names]

    def take(self, *, need_grad: bool = False) -> list[torch.Tensor]:
        """The features of the last pass, in order, and forgets them.

        With `need_grad`, raises RuntimeError for a feature without a gradient: re-entrant checkpointing detaches silently.
        """
        lacking = [name for name in self.names if name not in self._caught]
        if lacking:
            raise RuntimeError(f"no feature was caught at {lacking}: was the UNet called?")
        found = [self._caught[name] for name in self.names]
        self._caught.clear()
        cut = [name for name, feature in zip(self.names, found, strict=True) if need_grad and not feature.requires_grad]
        if cut:
            raise RuntimeError(f"the features {cut} have no gradient; use checkpointing with use_reentrant=False")
        return found

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _catch(self, name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            # Down blocks return (states, skips); attention projections and up blocks return the tensor.
            self._caught[name] = output[0] if isinstance(output, tuple) else output

        return hook
