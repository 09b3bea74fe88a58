"""Model-level tiling of attention: the same result from tiles small enough to stay in an NPU's memory.

Heads are split first, then queries; values are weighted and projected inside each tile, to keep converters from joining the
tiles again by moving the concatenation past the matrix product (checked on the torch.export graph only, so far). Source: EdgeFusion, arXiv 2404.11925, section 3.4 (the idea).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch.nn import functional as F


@dataclass(frozen=True)
class TiledAttnProcessor:
    """A diffusers attention processor with `query_tiles` tiles a head; exact but for the order of float sums.

    Raises ValueError when the queries cannot be cut evenly: tiles of one static shape are what NPU compilers want.
    """

    query_tiles: int

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries B T D against B S D_text (or themselves) to B T D."""
        if (
            attention_mask is not None
            or attn.group_norm is not None
            or attn.residual_connection
            or attn.spatial_norm is not None
        ):
            raise ValueError(
                "tiling takes the plain attention of a UNet's transformer block: no mask, no norms, no residual"
            )
        tokens = hidden_states.shape[1]
        if tokens % self.query_tiles:
            raise ValueError(f"{tokens} queries cannot be cut into {self.query_tiles} even tiles; choose a divisor")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        block: Any = attn  # diffusers types these members as optional
        query, key, value = block.to_q(hidden_states), block.to_k(context), block.to_v(context)
        out_projection: torch.nn.Linear = block.to_out[0]
        width = query.shape[-1] // attn.heads
        total = torch.zeros_like(hidden_states)
        for head in range(attn.heads):
            part = slice(head * width, (head + 1) * width)
            keys, values = key[..., part].transpose(1, 2), value[..., part]
            weight = out_projection.weight[:, part]
            rows = [
                F.linear((tile * attn.scale @ keys).softmax(dim=-1) @ values, weight)
                for tile in query[..., part].chunk(self.query_tiles, dim=1)
            ]
            total = total + torch.cat(rows, dim=1)
        if out_projection.bias is not None:
            total = total + out_projection.bias
        return total / attn.rescale_output_factor
