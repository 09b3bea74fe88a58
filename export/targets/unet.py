"""A whole UNet2DConditionModel of Stable Diffusion's shape in terms of `Ops`: static, int16, nothing left to a CPU.

What depends on the step alone (and on the guidance scale, and on the text as a whole) is the host's: `HostTime` gives each resnet's time vector in float32.
Knows diffusers' modules, no file format and no chip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.errors import StageError
from export.layers import lies_in
from export.targets.attention import Reach, Softmax, Weights, attend_heads
from export.targets.norms import geglu, group_norm, layer_norm, silu
from export.targets.ops import Ops, Tensor, as_int8

Cuts = Mapping[str, tuple[int, int]]
"""Attention block to heads at once and query tiles."""


class HostTime(nn.Module):
    """Timestep 1, text states 1 S D and, where guidance is an input, its embedding to the time vectors of all resnets, joined: 1 E. Shares
    the UNet's weights."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.widths = {name: resnet.time_emb_proj.out_features for name, resnet in time_resnets(unet)}

    def forward(self, timestep: torch.Tensor, text: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        unet = self.unet
        state = unet.time_embedding(unet.get_time_embed(sample=text, timestep=timestep), guidance)
        more = unet.get_aug_embed(emb=state, encoder_hidden_states=text, added_cond_kwargs={})
        state = nn.functional.silu(state if more is None else state + more)
        return torch.cat([resnet.time_emb_proj(state) for _, resnet in time_resnets(unet)], dim=-1)


def time_resnets(unet: Any) -> list[tuple[str, Any]]:
    """The resnets that take a time vector, by name, in the order in which they are registered."""
    return [
        (name, module) for name, module in unet.named_modules() if getattr(module, "time_emb_proj", None) is not None
    ]


def check_unet(unet: Any) -> None:
    """Raises StageError, naming the part, for a UNet with parts that are not lowered."""
    refused: list[tuple[str, bool]] = [
        ("class embeddings", unet.config.class_embed_type is not None),
        ("size and crop embeddings (SDXL)", unet.config.addition_embed_type not in (None, "text")),
        (f"{unet.config.act_fn} for SiLU", unet.config.act_fn not in ("silu", "swish")),
        ("scale and shift by time", unet.config.resnet_time_scale_shift != "default"),
    ]
    for name, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            refused.append((f"{name}: an output scale", module.output_scale_factor != 1))
            refused.append((f"{name}: up- or downsampling", module.up or module.down))
        if kind == "BasicTransformerBlock":
            refused.append((f"{name}: {module.norm_type}", module.norm_type != "layer_norm"))
            refused.append((f"{name}: only cross-attention", module.only_cross_attention))
            gate = type(module.ff.net[0]).__name__
            refused.append((f"{name}: {gate} for GEGLU", gate != "GEGLU"))
        if kind.endswith(("Block2D", "Block2DCrossAttn")) and "Block" in kind and kind not in _BLOCKS:
            refused.append((f"{name}: {kind}", True))
    for what, is_so in refused:
        if is_so:
            raise StageError(
                f"the UNet has {what}, which is not lowered for NPUs",
                remedy="Leave the target out of export.targets, or take a student of Stable Diffusion 1's shape",
            )


_BLOCKS = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "ResnetBlock2D"),
}


class Lowering:
    """Walks a UNet once and adds its operators to `ops`."""

    def __init__(
        self,
        ops: Ops,
        unet: Any,
        cuts: Cuts,
        softmax: Softmax = "parts",
        release: bool = True,
        keep: Sequence[str] = (),
    ) -> None:
        """Convolutions of the modules `keep` get 16-bit weights, as two of 8 bits.

        `release`: results of heads that wait while a tiled block runs become outputs as well: outputs live
        in DRAM, whereas in an NPU's memory they would leave the tiles no room.
        """
        self.ops, self.unet, self.cuts, self.release = ops, unet, cuts, release
        self.softmax: Softmax = softmax
        self.keep = keep
        self.released: list[Tensor] = []
        self.names = {module: name for name, module in unet.named_modules()}

    def run(self, side: int, tokens: int) -> Tensor:
        """Latent 1 H W C, time vectors and text 1 S D to the prediction 1 H W C."""
        ops, unet = self.ops, self.unet
        latent = ops.input([1, side, side, unet.config.in_channels], "latent", "latent")
        self.text = ops.input([1, tokens, unet.config.cross_attention_dim], "text", "text")
        self.times = {
            name: ops.input([1, 1, 1, resnet.time_emb_proj.out_features], f"time.{name}", f"time.{name}")
            for name, resnet in time_resnets(unet)
        }
        x = self._conv(unet.conv_in, latent)
        skips = [x]
        for block in unet.down_blocks:
            for resnet, attention in _pairs(block):
                x = self._attend(attention, self._resnet(resnet, x))
                skips.append(x)
            for sampler in block.downsamplers or []:
                x = self._conv(sampler.conv, x)
                skips.append(x)
        if unet.mid_block is not None:
            x = self._resnet(unet.mid_block.resnets[0], x)
            for attention, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True):
                x = self._resnet(resnet, self._attend(attention, x))
        for block in unet.up_blocks:
            for resnet, attention in _pairs(block):
                x = self._attend(attention, self._resnet(resnet, self._join(x, skips.pop())))
            for sampler in block.upsamplers or []:
                x = self._conv(sampler.conv, ops.double(x))
        x = silu(ops, "conv_norm_out", self._group_norm(unet.conv_norm_out, x))
        return self._conv(unet.conv_out, x)

    def _resnet(self, resnet: Any, x: Tensor) -> Tensor:
        ops, name = self.ops, self.names[resnet]
        h = silu(ops, f"{name}.norm1", self._group_norm(resnet.norm1, x))
        h = self._conv(resnet.conv1, h)
        if name in self.times:
            h = ops.binary("ADD", h, self.times[name], f"{name}.timed")
        h = silu(ops, f"{name}.norm2", self._group_norm(resnet.norm2, h))
        h = self._conv(resnet.conv2, h)
        if resnet.conv_shortcut is not None:
            x = self._conv(resnet.conv_shortcut, x)
        return ops.binary("ADD", x, h, f"{name}.sum")

    def _attend(self, transformer: Any, x: Tensor) -> Tensor:
        """A Transformer2DModel, or x itself for none."""
        if transformer is None:
            return x
        ops, name = self.ops, self.names[transformer]
        norm, shape = transformer.norm, x.shape
        normal = group_norm(ops, f"{name}.norm", x, norm.num_groups, norm.eps, np.ones(shape[-1], np.float32), None)
        weight, bias = _folded(transformer.proj_in, norm)
        h = ops.dense(ops.reshape(normal, [1, shape[1] * shape[2], shape[3]]), weight, f"{name}.proj_in", bias)
        for block in transformer.transformer_blocks:
            h = self._block(block, h)
        weight, bias = _matrix(transformer.proj_out)
        h = ops.dense(h, weight, f"{name}.proj_out", bias)
        return ops.binary("ADD", ops.reshape(h, shape), x, f"{name}.sum")

    def _block(self, block: Any, h: Tensor) -> Tensor:
        ops, name = self.ops, self.names[block]
        for attention, norm in ((block.attn1, block.norm1), (block.attn2, block.norm2)):
            if attention is None:
                continue
            normal = layer_norm(ops, self.names[norm], h, norm.eps)
            said = self._attention(attention, norm, normal, normal if attention is block.attn1 else self.text)
            h = ops.binary("ADD", h, said, f"{self.names[attention]}.sum")
        normal = layer_norm(ops, self.names[block.norm3], h, block.norm3.eps)
        weight, bias = _folded(block.ff.net[0].proj, block.norm3)
        product = geglu(ops, f"{name}.ff", normal, weight, bias)
        weight, bias = _matrix(block.ff.net[2])
        return ops.binary("ADD", h, ops.dense(product, weight, f"{name}.ff.out", bias), f"{name}.ff.sum")

    def _attention(self, attention: Any, norm: Any, hidden: Tensor, context: Tensor) -> Tensor:
        """An Attention whose norm's gain and offset go into its weights.

        The offset's part of the keys adds the same to all scores of a query, which softmax ignores; its part of the values passes
        through shares that add up to 1, into the output's bias.
        """
        name = self.names[attention]
        query, query_bias = _folded(attention.to_q, norm)
        is_self = context is hidden
        key, _ = _folded(attention.to_k, norm) if is_self else _matrix(attention.to_k)
        value, value_bias = _folded(attention.to_v, norm) if is_self else _matrix(attention.to_v)
        out, bias = _matrix(attention.to_out[0])
        weights = Weights(query, key, value, out, bias + out @ value_bias, query_bias)
        reach = Reach(*(f"{name}.{part}" for part in Reach.__annotations__))
        group, tiles = self.cuts.get(name, (attention.heads, 1))
        if tiles > 1:
            self.ops.part()
        said, groups = attend_heads(
            self.ops, hidden, context, weights, attention.heads, group, tiles, reach, self.softmax
        )
        if tiles > 1:
            self.ops.part()
        if self.release and tiles > 1 and len(groups) > 1:
            self.released += groups
        return said

    def _group_norm(self, norm: Any, x: Tensor) -> Tensor:
        return group_norm(
            self.ops, self.names[norm], x, norm.num_groups, norm.eps, _array(norm.weight), _array(norm.bias)
        )

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        ops, name, weight = self.ops, self.names[conv], _array(conv.weight)
        bias = np.zeros(len(weight), np.float32) if conv.bias is None else _array(conv.bias)
        if not any(lies_in(name, part) for part in self.keep):
            return ops.conv(x, weight, name, bias, conv.stride[0])
        coarse = as_int8(weight)
        most = ops.conv(x, coarse, f"{name}.coarse", bias, conv.stride[0])
        rest = ops.conv(x, weight - coarse, f"{name}.rest", np.zeros(len(weight), np.float32), conv.stride[0])
        return ops.binary("ADD", most, rest, name)

    def _join(self, x: Tensor, skip: Tensor) -> Tensor:
        reach = max(x.reach, skip.reach)
        return self.ops.concat([self.ops.requantise(x, reach), self.ops.requantise(skip, reach)], axis=3)


def _pairs(block: Any) -> list[tuple[Any, Any]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return list(zip(block.resnets, attentions, strict=True))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def _matrix(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight E D and bias E of a Linear or a 1 x 1 convolution."""
    weight = _array(layer.weight).reshape(len(layer.weight), -1)
    return weight, np.zeros(len(weight), np.float32) if layer.bias is None else _array(layer.bias)


def _folded(layer: Any, norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """As `_matrix`, with the gain and the offset of the norm before it."""
    weight, bias = _matrix(layer)
    return weight * _array(norm.weight), bias + weight @ _array(norm.bias)
