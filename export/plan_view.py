"""A plan for people: the table, the plot and the JSON. Decides nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cluster.storage import publish_bytes, publish_file
from export.profile import Profile
from export.solve import Plan


def plan_table(plan: Plan, profile: Profile) -> Table:
    """One row a block: shape, tiles, working set, traffic and latency before and after. All predicted."""
    table = Table(
        title=f"{plan.profile}: {profile.chip}",
        caption="Predicted, not measured. Shape: queries x keys x width. Cut: heads at once x query tiles. "
        f"Set: bytes on chip at once, {profile.budget_bytes / 2**20:.1f} MiB to give.",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for heading in ("block", "shape", "cut", "set MiB", "DRAM MB", "latency ms"):
        table.add_column(heading)
    for part in plan.blocks:
        block, before, after = part.block, part.untiled.cost, part.chosen.cost
        cut = f"{part.chosen.head_group} x {part.chosen.query_tiles}" if part.is_tiled else "untiled"
        table.add_row(
            f"{_short(block.name)} {'cross' if block.crossed else 'self'}",
            f"{block.queries}x{block.keys}x{block.width}",
            cut,
            _change(before.working_set_bytes / 2**20, after.working_set_bytes / 2**20),
            _change(before.dram_bytes / 1e6, after.dram_bytes / 1e6),
            _change(before.latency_s * 1e3, after.latency_s * 1e3),
        )
    before, after = totals(plan)
    table.add_section()
    table.add_row(
        "all blocks",
        "",
        f"{len(plan.tiled)}/{len(plan.blocks)}",
        "",
        _change(before["dram_bytes"] / 1e6, after["dram_bytes"] / 1e6),
        _change(before["latency_s"] * 1e3, after["latency_s"] * 1e3),
    )
    return table


def totals(plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
    """DRAM bytes and seconds of all attention blocks, untiled and as chosen."""
    before: dict[str, float] = {"dram_bytes": 0, "latency_s": 0}
    after = dict(before)
    for part in plan.blocks:
        for into, cost in ((before, part.untiled.cost), (after, part.chosen.cost)):
            into["dram_bytes"] += cost.dram_bytes
            into["latency_s"] += cost.latency_s
    return before, after


def compiled_table(plan: Plan, compiled: dict[str, Any]) -> Table:
    """What the compiler estimated for every block: with its own softmax, untiled, as chosen; the sums last."""
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
        caption="Compiler-estimated, not measured: DRAM MB, ms. Own: untiled with the compiler's softmax; untiled and chosen write it out in parts. "
        "*: one head at a time, because the compiler takes no more.",
    )
    for heading in ("block", "shape", "cut", "own", "untiled", "chosen", "own to chosen"):
        table.add_column(heading)
    sums: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in ("own_softmax", "untiled", "chosen")}
    for part in plan.blocks:
        block, said = part.block, compiled[part.block.name]
        mark = "*" if said["untiled_heads"] not in (None, block.heads) else ""
        known = said["untiled_heads"] is not None
        for kind in sums if known else ():
            sums[kind][0] += said[kind]["dram_bytes"]
            sums[kind][1] += said[kind]["latency_s"]
        table.add_row(
            f"{_short(block.name)} {'cross' if block.crossed else 'self'}",
            f"{block.queries}x{block.keys}x{block.width}",
            f"{part.chosen.head_group} x {part.chosen.query_tiles}" if part.is_tiled else "untiled",
            *(_costs(said[kind], mark) if known else "no build" for kind in ("own_softmax", "untiled")),
            _costs(said["chosen"], ""),
            _gain(said["own_softmax"], said["chosen"]) if known else "",
        )
    before, untiled, after = ({"dram_bytes": dram, "latency_s": time} for dram, time in sums.values())
    table.add_section()
    table.add_row("sum", "", "", _costs(before, ""), _costs(untiled, ""), _costs(after, ""), _gain(before, after))
    return table


def _costs(said: dict[str, Any], mark: str) -> str:
    return f"{_brief(said['dram_bytes'] / 1e6)}, {_brief(said['latency_s'] * 1e3)}{mark}"


def _gain(before: dict[str, Any], after: dict[str, Any]) -> str:
    if not after["dram_bytes"]:
        return ""
    return (
        f"{before['dram_bytes'] / after['dram_bytes']:.1f}x less, {after['latency_s'] / before['latency_s'] - 1:+.0%}"
    )


def write_plan(
    plan: Plan, profile: Profile, model: str, folder: Path, compiled: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """`plan.json` and `plan.png` in `folder`; returns both paths."""
    before, after = totals(plan)
    facts: dict[str, Any] = {
        "model": model,
        **plan.facts(),
        "profile_values": profile.model_dump(mode="json", exclude_none=True),
        "predicted_totals": {"untiled": before, "chosen": after},
        "compiler_estimated": compiled,
    }
    publish_bytes(folder / "plan.json", (json.dumps(facts, indent=2) + "\n").encode())
    publish_file(folder / "plan.png", lambda path: _draw(plan, path))
    return folder / "plan.json", folder / "plan.png"


def _draw(plan: Plan, path: Path) -> None:
    """Traffic and latency against the number of tiles, a line for each distinct shape that the plan tiles (or the largest)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list({(p.block.queries, p.block.keys, p.block.width, p.block.heads): p for p in plan.tiled}.values())
    if not shown:
        shown = [max(plan.blocks, key=lambda p: p.untiled.cost.working_set_bytes)]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    traffic, latency = figure.subplots(1, 2)
    for part in shown[:6]:
        block, best = part.block, part.chosen
        tried = [c for c in part.tried if c.head_group == best.head_group]
        counts = [block.heads // c.head_group * c.query_tiles for c in tried]
        label = f"{block.queries} x {block.keys} x {block.width}, {best.head_group} of {block.heads} heads at once"
        order = sorted(range(len(tried)), key=lambda i: counts[i])
        at = block.heads // best.head_group * best.query_tiles
        for axis, value, scale in ((traffic, "dram_bytes", 1e-6), (latency, "latency_s", 1e3)):
            line = axis.plot(
                [counts[i] for i in order],
                [getattr(tried[i].cost, value) * scale for i in order],
                marker=".",
                label=label,
            )[0]
            axis.axhline(getattr(part.untiled.cost, value) * scale, color=line.get_color(), linestyle=":", linewidth=1)
            axis.plot([at], [getattr(best.cost, value) * scale], "o", color=line.get_color(), fillstyle="none", ms=10)
    for axis, unit in ((traffic, "DRAM traffic, MB"), (latency, "latency, ms")):
        axis.set(xscale="log", yscale="log", xlabel="tiles (head groups x query tiles)", ylabel=f"predicted {unit}")
        axis.grid(alpha=0.3)
    traffic.legend(fontsize=8)
    figure.suptitle(f"{plan.profile}: predicted, not measured. Dotted: untiled; ring: chosen")
    figure.savefig(path, dpi=110, format="png")


def _change(before: float, after: float) -> str:
    return _brief(before) if before == after else f"{_brief(before)} → {_brief(after)}"


def _brief(number: float) -> str:
    """Three digits that count."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _short(name: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0.attn2` to `down 0.1`, the block of a deeper transformer appended."""
    parts = name.split(".")
    places = [part for part in parts if part.isdigit()]
    deeper = "" if places[-1:] == ["0"] else f".{places[-1]}" if places else ""
    return f"{parts[0].removesuffix('_blocks').removesuffix('_block')} {'.'.join(places[:-1])}{deeper}"
