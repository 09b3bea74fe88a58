"""Rewrites that leave a module's function as it is and suit every target: operators that all compilers take, fewer multiplications.

Equal but for the order of float sums. Knows diffusers' modules by class, no chips.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.embeddings import AttentionPooling
from diffusers.models.upsampling import Upsample2D
from torch import nn


class _Pooling(nn.Module):
    """diffusers' AttentionPooling, text states B T C to B C, by matrix products: it has Einsum, which Qualcomm's compiler refuses."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.q_proj, self.k_proj, self.v_proj = pool.q_proj, pool.k_proj, pool.v_proj
        self.heads = pool.num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = x.mean(dim=1, keepdim=True) + self.positional_embedding
        x = torch.cat([token, x], dim=1)
        query, key, value = self._split(self.q_proj(token)), self._split(self.k_proj(x)), self._split(self.v_proj(x))
        scale = query.shape[-1] ** -0.25
        shares = ((query * scale) @ (key * scale).transpose(2, 3)).softmax(dim=-1)
        return (shares @ value).reshape(x.shape[0], -1)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """B T (H D) to B H T D."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class _DoubleConv(nn.Module):
    """Nearest doubling and a 3 x 3 convolution with padding 1, B C H W to B D 2H 2W, as four 2 x 2 convolutions of the small picture.

    Each of the four pixels that come of one sees 2 x 2 different pixels only, so taps that meet the same pixel are summed: 16
    multiplications instead of 36 a pixel of the small picture, for 16 weights instead of 9.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # Row 2 i of the result sees rows i - 1, i with taps 0 | 1 + 2; row 2 i + 1 sees rows i, i + 1 with taps 0 + 1 | 2.
        taps = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).to(conv.weight)  # P 2 3
        weights = torch.einsum("pky,qlx,dcyx->pqdckl", taps, taps, conv.weight.detach()).flatten(0, 1)
        self.phases = nn.ModuleList()
        for weight in weights:
            phase = nn.Conv2d(conv.in_channels, conv.out_channels, 2, bias=conv.bias is not None)
            phase.weight = nn.Parameter(weight.clone())
            if conv.bias is not None:
                phase.bias = nn.Parameter(conv.bias.detach())
            self.phases.append(phase)

    def forward(self, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        height, width = x.shape[-2:]
        drawn = [
            phase(nn.functional.pad(x, (1 - i % 2, i % 2, 1 - i // 2, i // 2))) for i, phase in enumerate(self.phases)
        ]
        both = torch.stack(drawn, dim=1).unflatten(1, (2, 2)).permute(0, 3, 4, 1, 5, 2)  # B D H 2 W 2
        return both.reshape(x.shape[0], -1, 2 * height, 2 * width)


def without_einsum(module: Any) -> Any:
    """A UNet whose text pooling, where it has one, is made of matrix products. Weights are shared with `module`, which stays as it is."""
    if not any(isinstance(part, AttentionPooling) for part in module.modules()):
        return module
    return _replaced(module, lambda part: _Pooling(part) if isinstance(part, AttentionPooling) else None)


def with_small_upsampling(module: Any) -> Any:
    """A decoder whose doublings are taken into the convolution after them; weights are shared with `module`, which stays as it is.

    Not for a UNet: it has few multiplications there, and its file would grow by the weights.
    """

    def change(part: nn.Module) -> nn.Module | None:
        if isinstance(part, nn.Sequential):  # AutoencoderTiny's
            return _joined(part)
        plain = isinstance(part, Upsample2D) and part.use_conv and part.interpolate and part.norm is None
        conv: Any = getattr(part, "conv", None)
        return _DoubleConv(conv) if plain and _is_usual(conv) else None

    return _replaced(module, change)


def _joined(layers: nn.Sequential) -> nn.Sequential | None:
    """A Sequential with each nn.Upsample and the convolution after it as one; none if it has no such pair."""
    kept: list[nn.Module] = list(layers)
    for i in range(len(kept) - 1, 0, -1):
        first, conv = kept[i - 1], kept[i]
        doubles = isinstance(first, nn.Upsample) and first.mode == "nearest" and first.scale_factor in (2, 2.0)
        if doubles and isinstance(conv, nn.Conv2d) and _is_usual(conv):
            kept[i - 1 : i + 1] = [_DoubleConv(conv)]
    return nn.Sequential(*kept) if len(kept) < len(layers) else None


def _is_usual(conv: Any) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
    )


def _replaced(module: Any, change: Any) -> Any:
    """`module` with every part for which `change` gives another; modules are copied, tensors are not."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    done = copy.deepcopy(module, shared)
    for parent in list(done.modules()):
        for name, part in list(parent.named_children()):
            if (other := change(part)) is not None:
                setattr(parent, name, other)
    return done
