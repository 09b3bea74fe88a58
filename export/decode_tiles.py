"""A VAE's decoder that draws a large picture tile by tile inside one static graph, so that no operator ever holds the whole picture's features.

Convolutions see as far as their taps: tiles that overlap by more than that are exact. A group norm sees the whole picture: its statistics
are taken from a pass over the features at half the size and held for all tiles, so that no tile has a contrast of its own. Attention
(the middle block) runs whole, and so does all that is small. Knows diffusers' decoders, no targets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cluster.errors import StageError

Statistics = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Of each norm: mean and reciprocal deviation, B G 1 each."""


class _HeldNorm(nn.Module):
    """A GroupNorm that notes its statistics while `noting`, and afterwards uses those in place of a tile's own."""

    def __init__(self, norm: nn.GroupNorm, place: int, held: Statistics, noting: Callable[[], bool]) -> None:
        super().__init__()
        self.norm, self.place, self.held, self.noting = norm, place, held, noting

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.noting():
            groups = x.unflatten(1, (self.norm.num_groups, -1)).flatten(2)
            mean = groups.mean(dim=2, keepdim=True)
            spread = (groups - mean).square().mean(dim=2, keepdim=True)
            self.held[self.place] = mean, (spread + self.norm.eps).rsqrt()
            return self.norm(x)
        mean, scale = self.held[self.place]
        width = x.shape[1] // self.norm.num_groups
        gain = scale.expand(-1, -1, width).flatten(1) * self.norm.weight
        offset = self.norm.bias - mean.expand(-1, -1, width).flatten(1) * gain
        return x * gain[..., None, None] + offset[..., None, None]


class TiledDecoder(nn.Module):
    """Latents B C H W to what `decoder` gives, B 3 fH fW: its later part in tiles of `tile` x `tile` latents that share `overlap`.

    Raises StageError for a decoder of another kind, or sizes that do not fit.
    """

    def __init__(self, decoder: Any, tile: int, overlap: int) -> None:
        super().__init__()
        if not 1 <= overlap < tile:
            raise StageError(
                f"decoder tiles of {tile} latents cannot share {overlap}",
                remedy="Choose an export.decoder.overlap from 1 to less than export.decoder.tile",
            )
        self.tile, self.overlap = tile, overlap
        self._held: Statistics = {}
        self._noting, self._norms = False, 0
        shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
        self.decoder = copy.deepcopy(decoder, shared)
        self.has_norms = len(getattr(decoder, "up_blocks", [])) > 1
        if not self.has_norms and not isinstance(getattr(decoder, "layers", None), nn.Sequential):
            raise StageError(
                f"a {type(decoder).__name__} is not decoded in tiles",
                remedy="Leave export.decoder out, or take a student with an AutoencoderKL or AutoencoderTiny",
            )
        if self.has_norms:
            self._hold_norms()

    def _hold_norms(self) -> None:
        last = self.decoder.up_blocks[-1]
        inside = [(parent, *child) for parent in last.modules() for child in parent.named_children()]
        for parent, name, part in [*inside, (self.decoder, "conv_norm_out", self.decoder.conv_norm_out)]:
            if isinstance(part, nn.GroupNorm):
                self._norms += 1
                setattr(parent, name, _HeldNorm(part, self._norms, self._held, lambda: self._noting))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        if not self.has_norms:
            return self._tiles(latent, self.decoder, 1)
        x = self._early(latent)
        self._noting = True
        self._later(x[..., ::2, ::2])
        self._noting = False
        return self._tiles(x, self._later, x.shape[-1] // latent.shape[-1])

    def _early(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.decoder.mid_block(self.decoder.conv_in(latent), None)
        *blocks, before, _ = self.decoder.up_blocks
        for block in blocks:
            x = block(x, None)
        for resnet in before.resnets:
            x = resnet(x, None)
        return x

    def _later(self, x: torch.Tensor) -> torch.Tensor:
        """From the last doubling on: a quarter of the multiplications, and nearly all of the memory."""
        *_, before, last = self.decoder.up_blocks
        for double in before.upsamplers or []:
            x = double(x)
        x = self.decoder.conv_norm_out(last(x, None))
        return self.decoder.conv_out(self.decoder.conv_act(x))

    def _tiles(self, x: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor], grown: int) -> torch.Tensor:
        """`grown`: pixels of x a latent."""
        tile, overlap = self.tile * grown, self.overlap * grown
        rows, columns = (starts(side, tile, overlap) for side in x.shape[-2:])
        high, wide = (min(tile, side) for side in x.shape[-2:])
        lines, factor = [], 1
        for top in rows:
            cells = [draw(x[..., top : top + high, left : left + wide]) for left in columns]
            factor = cells[0].shape[-1] // wide
            lines.append(joined(cells, columns, wide, factor, -1))
        return joined(lines, rows, high, factor, -2)


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of a side begin: as few as share at least `overlap`, in steps as even as whole numbers allow."""
    if side <= tile:
        return [0]
    steps = math.ceil((side - tile) / (tile - overlap))
    return [i * (side - tile) // steps for i in range(steps + 1)]


def joined(parts: Sequence[torch.Tensor], begins: Sequence[int], tile: int, factor: int, axis: int) -> torch.Tensor:
    """Parts put side by side along `axis`. Of what two share, the outer quarters (or more) go to the one that is farther from its edge
    there, and the middle goes from one to the other in a ramp."""
    kept, start, several = [], 0, len(begins) > 2
    for i, (part, begin) in enumerate(zip(parts, begins, strict=True)):
        end = tile * factor
        if i + 1 < len(parts):
            step = (begins[i + 1] - begin) * factor
            shared = tile * factor - step
            ramp = shared - 2 * (shared // 4)
            # Where three tiles share pixels: ramps no longer than the steps end before the next one begins.
            ramp = min(ramp, step) if several else ramp
            trim = (shared - ramp) // 2
            end = step + trim
            other = parts[i + 1].narrow(axis, trim, ramp)
            weight = (torch.arange(ramp, device=part.device, dtype=part.dtype) + 0.5) / ramp
            weight = weight.reshape([-1, *[1] * (-1 - axis)])
            blend = torch.lerp(part.narrow(axis, end, ramp), other, weight)
            kept += [part.narrow(axis, start, end - start), blend]
            start = trim + ramp
        else:
            kept.append(part.narrow(axis, start, end - start))
    return torch.cat(kept, dim=axis)
