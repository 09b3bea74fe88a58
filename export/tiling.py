"""Model-level tiling of attention: the same result from tiles small enough to stay in an NPU's memory.

Owns the exact rewrite and the proof that a converter left it alone. Heads are split first, then queries; the heads of a tile are
joined and projected inside it, to keep converters from joining the tiles again by moving the concatenation past the matrix
product. Source: EdgeFusion, arXiv 2404.11925, section 3.4 (the idea).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F

from cluster.errors import ParityError
from export.openvino_core import openvino_core
from export.solve import Plan

Scores = tuple[int, int, int]
"""Heads, query rows and keys of one softmax."""


@dataclass(frozen=True)
class TiledAttnProcessor:
    """A diffusers attention processor: `head_group` heads at once, `query_tiles` tiles each; exact but for the order of float sums.

    Raises ValueError when heads or queries cannot be cut evenly: tiles of one static shape are what NPU compilers want.
    """

    query_tiles: int
    head_group: int = 1

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
        if attn.heads % self.head_group:
            raise ValueError(f"{attn.heads} heads cannot be cut into groups of {self.head_group}; choose a divisor")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        block: Any = attn  # diffusers types these members as optional
        query, key, value = block.to_q(hidden_states) * attn.scale, block.to_k(context), block.to_v(context)
        group_width = query.shape[-1] // attn.heads * self.head_group
        rows = tokens // self.query_tiles
        # parts[t] collects the head groups of tile t; groups are the outer loop, so that their keys and values are loaded once.
        parts: list[list[torch.Tensor]] = [[] for _ in range(self.query_tiles)]
        for start in range(0, query.shape[-1], group_width):
            group = slice(start, start + group_width)
            keys, values = self._heads(key[..., group]).transpose(1, 2), self._heads(value[..., group])
            for tile, part in enumerate(parts):
                queries = self._heads(query[:, tile * rows : (tile + 1) * rows, group])
                part.append(self._join((queries @ keys).softmax(dim=-1) @ values))
        projection: torch.nn.Linear = block.to_out[0]
        tiles = [F.linear(torch.cat(part, dim=-1), projection.weight, projection.bias) for part in parts]
        return torch.cat(tiles, dim=1) / attn.rescale_output_factor

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """B T (G D) to (B G) T D."""
        if self.head_group == 1:
            return tensor
        batch, tokens, width = tensor.shape
        split = tensor.view(batch, tokens, self.head_group, width // self.head_group)
        return split.transpose(1, 2).reshape(batch * self.head_group, tokens, -1)

    def _join(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B G) T D to B T (G D)."""
        if self.head_group == 1:
            return tensor
        joined, tokens, width = tensor.shape
        split = tensor.view(joined // self.head_group, self.head_group, tokens, width)
        return split.transpose(1, 2).reshape(joined // self.head_group, tokens, -1)


def tile_unet(unet: Any, plan: Plan) -> None:
    """Give each block of a diffusers UNet the tiles of its plan, in place; blocks planned untiled get the plain processor.

    Raises ValueError if the plan was made for another UNet.
    """
    modules = dict(unet.named_modules())
    strangers = [part.block.name for part in plan.blocks if not isinstance(modules.get(part.block.name), Attention)]
    if strangers:
        raise ValueError(f"the plan was made for another UNet: this one has no attention block {strangers[0]}")
    for part in plan.blocks:
        tiled = TiledAttnProcessor(part.chosen.query_tiles, part.chosen.head_group)
        modules[part.block.name].set_processor(tiled if part.is_tiled else AttnProcessor2_0())


def wanted_scores(plan: Plan) -> Counter[Scores]:
    """How many softmaxes of which shape a converted graph must hold if every tile is there."""
    wanted: Counter[Scores] = Counter()
    for part in plan.blocks:
        chosen = part.chosen
        shape = (chosen.head_group, part.block.queries // chosen.query_tiles, part.block.keys)
        wanted[shape] += part.block.heads // chosen.head_group * chosen.query_tiles
    return wanted


def check_tiles(path: Path, plan: Plan) -> None:
    """Prove that the tiles of `plan` survived conversion into the file at `path`: ONNX or OpenVINO.

    Every planned tile must have its softmax, of that tile's shape, which feeds one matrix product: converters are known to
    join tiles again, which restores the traffic that they were made to save. Raises ParityError.
    """
    found = _onnx_scores(path) if path.suffix == ".onnx" else _openvino_scores(path)
    compare_scores(found, plan, str(path.name))


def compare_scores(found: Iterable[tuple[Scores, int]], plan: Plan, where: str) -> None:
    """The softmaxes `found` in a graph (shape, and how many matrix products read it) against the plan. Raises ParityError."""
    seen = list(found)
    wanted, got = wanted_scores(plan), Counter(shape for shape, _ in seen)
    lost, extra = wanted - got, got - wanted
    if lost:
        raise ParityError(
            f"the converter changed the tiles: missing {_spell(lost)}, instead {_spell(extra)} (heads x rows x keys)",
            where=where,
            remedy="Leave export.tiling out, or choose another profile",
        )
    # Other softmaxes are not ours to judge: some UNets pool their text by one.
    if any(readers != 1 for shape, readers in seen if shape in wanted):
        raise ParityError("a tile's softmax does not feed exactly one matrix product", where=where)


def _spell(shapes: Counter[Scores]) -> str:
    return ", ".join(f"{count} of {' x '.join(map(str, shape))}" for shape, count in shapes.items()) or "none"


def _scores(dims: list[int]) -> Scores:
    heads = 1
    for size in dims[:-2]:
        heads *= size
    return heads, dims[-2], dims[-1]


def _onnx_scores(path: Path) -> list[tuple[Scores, int]]:
    import onnx

    # Without large weights: shapes do not hang on them, and protobuf would not pass on more than 2 GiB.
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), data_prop=True).graph
    shapes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in graph.value_info}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def products(name: str) -> int:
        """Matrix products that read a value, through the quantisation that may stand between."""
        total = 0
        for node in readers.get(name, []):
            if node.op_type == "MatMul":
                total += 1
            elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                total += products(node.output[0])
        return total

    return [(_scores(shapes[n.output[0]]), products(n.output[0])) for n in graph.node if n.op_type == "Softmax"]


def _openvino_scores(path: Path) -> list[tuple[Scores, int]]:
    found: list[tuple[Scores, int]] = []
    for node in openvino_core().read_model(str(path)).get_ops():
        if node.get_type_name() == "ScaledDotProductAttention":  # OpenVINO's own fusion, tile by tile
            query, key = list(node.get_input_shape(0)), list(node.get_input_shape(1))
            found.append((_scores([*query[:-1], key[-2]]), 1))
        elif node.get_type_name().lower() == "softmax":
            targets = [target.get_node().get_type_name() for target in node.output(0).get_target_inputs()]
            found.append((_scores(list(node.output(0).shape)), targets.count("MatMul")))
    return found
