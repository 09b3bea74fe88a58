"""Which tiles each attention block should have on a chip: predicted working set, DRAM traffic and latency of every choice.

A model on paper: it ranks choices, a compiler or the chip itself judges them. Idea: EdgeFusion (arXiv 2404.11925, section 3.4)
and the I/O bound of FlashAttention (arXiv 2205.14135); the equations are ours. Knows no PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import RecipeError
from export.blocks import Block
from export.profile import Profile


@dataclass(frozen=True)
class Cost:
    """Predicted for one block and one way to cut it."""

    working_set_bytes: int
    dram_bytes: int
    latency_s: float
    keys_stay: bool


@dataclass(frozen=True)
class Choice:
    """`head_group` heads are computed at once, their queries in `query_tiles` tiles. All heads and 1 tile is the untiled block."""

    head_group: int
    query_tiles: int
    cost: Cost


@dataclass(frozen=True)
class BlockPlan:
    """What the solver decided for a block; `chosen` is `untiled` where tiles do not pay. `tried` is every choice, untiled first."""

    block: Block
    untiled: Choice
    chosen: Choice
    tried: tuple[Choice, ...]

    @property
    def is_tiled(self) -> bool:
        return self.chosen is not self.untiled


@dataclass(frozen=True)
class Plan:
    """The plan of a whole UNet for one profile."""

    profile: str
    blocks: tuple[BlockPlan, ...]

    @property
    def tiled(self) -> tuple[BlockPlan, ...]:
        return tuple(plan for plan in self.blocks if plan.is_tiled)

    def facts(self) -> dict[str, Any]:
        """For JSON: the decision a block, predicted before and after."""
        rows = [
            {
                **asdict(plan.block),
                "head_group": plan.chosen.head_group,
                "query_tiles": plan.chosen.query_tiles,
                "tiled": plan.is_tiled,
                "predicted": {"untiled": asdict(plan.untiled.cost), "chosen": asdict(plan.chosen.cost)},
            }
            for plan in self.blocks
        ]
        return {"profile": self.profile, "blocks": rows}


def solve(blocks: Sequence[Block], profile: Profile) -> Plan:
    """The fastest predicted choice a block; raises RecipeError if the chip cannot hold the smallest tile of a block."""
    return Plan(profile.name, tuple(_solve_block(block, profile) for block in blocks))


def choices(block: Block, profile: Profile) -> list[Choice]:
    """Every even cut of a block, untiled first: head groups and query tiles are divisors, rows a multiple of the chip's."""
    cuts = [(block.heads, 1)]
    for group in _divisors(block.heads):
        for tiles in _divisors(block.queries):
            rows = block.queries // tiles
            if (group, tiles) != cuts[0] and (tiles == 1 or rows % profile.row_multiple == 0):
                cuts.append((group, tiles))
    return [Choice(group, tiles, predict(block, profile, group, tiles)) for group, tiles in cuts]


def predict(block: Block, profile: Profile, head_group: int, query_tiles: int) -> Cost:
    """Cost of one block: projections, then for each head group and query tile the scores, their softmax and the weighted values.

    Keys and values stay on chip between the tiles of a head group where that is allowed and cheaper, else each tile reads them.
    """
    ways = [_predict(block, profile, head_group, query_tiles, keys_stay=False)]
    if profile.keeps_keys:
        ways.append(_predict(block, profile, head_group, query_tiles, keys_stay=True))
    fitting = [cost for cost in ways if cost.working_set_bytes <= profile.budget_bytes] or ways[:1]
    return min(fitting, key=lambda cost: (cost.latency_s, cost.dram_bytes, cost.working_set_bytes))


def _predict(block: Block, profile: Profile, head_group: int, query_tiles: int, keys_stay: bool) -> Cost:
    size, rows = profile.activation_bytes, block.queries // query_tiles
    groups = block.heads // head_group
    tiles = groups * query_tiles
    query = size * rows * head_group * block.head_width
    keys = size * block.keys * head_group * block.head_width
    scores = size * head_group * rows * block.keys
    # One phase at a time: a product with its operands, or softmax with its copies.
    working_set = max(query + scores, profile.live_scores.value * scores) + (2 * keys if keys_stay else 0)
    spilled = max(0.0, 1 - profile.budget_bytes / working_set)

    moved_scores = profile.score_transfers.value * scores * spilled * tiles
    moved_operands = 2 * query * tiles + 2 * keys * (groups if keys_stay else tiles)
    tokens = size * 2 * (block.queries * block.width * 2 + block.keys * (block.key_width + block.width))
    weights = profile.weight_bytes * 2 * block.width * (block.width + block.key_width)

    projections = 2 * block.width * (block.queries * block.width + block.keys * block.key_width)
    products = 2 * block.queries * block.keys * block.width
    elements = block.heads * block.queries * block.keys
    operators = 4 + 3 * tiles
    latency = (
        _longer(profile, projections / profile.weight_macs_per_s.value, tokens + weights, tokens + weights)
        + _longer(profile, products / profile.matmul_macs_per_s.value, moved_operands, 2 * size * elements)
        + _longer(profile, elements / profile.softmax_elements_per_s.value, 0, 2 * size * elements)
        + 2 * keys * tiles / profile.keys_bytes_per_s.value
        # Scores that do not stay are stored and loaded between operators: nothing is there to overlap with.
        + moved_scores / profile.dram_bytes_per_s.value
        + operators * profile.operator_s.value
    )
    return Cost(int(working_set), round(tokens + weights + moved_operands + moved_scores), latency, keys_stay)


def _longer(profile: Profile, compute_s: float, dram_bytes: float, sram_bytes: float) -> float:
    """Arithmetic and memory overlap inside an operator: the longest of the three counts."""
    return max(compute_s, dram_bytes / profile.dram_bytes_per_s.value, sram_bytes / profile.sram_bytes_per_s.value)


def _solve_block(block: Block, profile: Profile) -> BlockPlan:
    tried = choices(block, profile)
    least = min(tried, key=lambda choice: choice.cost.working_set_bytes)
    if least.cost.working_set_bytes > profile.budget_bytes:
        raise RecipeError(
            f"{block.name}: even its smallest tile ({block.queries // least.query_tiles} queries of {least.head_group} "
            f"of {block.heads} heads) needs {least.cost.working_set_bytes:,} bytes; "
            f"{profile.name} has {profile.budget_bytes:,} to give",
            remedy="Choose a profile with more memory, or a smaller picture",
        )
    best = min(tried, key=lambda choice: (choice.cost.latency_s, choice.cost.dram_bytes, choice.query_tiles))
    # Tiles cost operators and code: they must win by more than the model's own noise.
    if best.cost.latency_s > tried[0].cost.latency_s * (1 - _LEAST_GAIN):
        best = tried[0]
    return BlockPlan(block, tried[0], best, tuple(tried))


_LEAST_GAIN = 0.02


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
