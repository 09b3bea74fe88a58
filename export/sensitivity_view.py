"""A sensitivity scan as a table, a plot and JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from cluster.storage import publish_bytes


def scan_table(found: dict[str, Any]) -> Table:
    """A row a part, most harmful first; what the scan proposes to keep is marked."""
    table = Table(
        Column("part", no_wrap=True),
        "layers",
        "weights %",
        "latents\nSNR dB",
        "pictures\nPSNR dB",
        "keep",
        title=f"each part alone at {found['precision']}",
    )
    for row in found["rows"]:
        table.add_row(
            row["part"],
            str(row["layers"]),
            f"{100 * row['weights']:.2f}",
            f"{row['snr_db']:.1f}",
            f"{row['psnr_db']:.1f}",
            "keep" if row["part"] in found["keep"] else "",
        )
    return table


def proof_lines(found: dict[str, Any]) -> list[str]:
    """The whole UNet before and after the proposal, and the recipe's line."""
    lines = [
        f"the whole UNet at {found['precision']}, {name} kept: latents SNR {one['snr_db']:.1f} dB, "
        f"pictures PSNR {one['psnr_db']:.1f} dB, worst {one['psnr_db_min']:.1f}"
        for name, one in (("defaults", found["before"]), ("proposal", found["after"]))
    ]
    return [*lines, f"export:\n  keep: [{', '.join(found['keep'])}]"]


def write_scan(found: dict[str, Any], out: Path) -> list[Path]:
    """sensitivity.json and sensitivity.png in the folder `out`."""
    from matplotlib.figure import Figure

    rows = found["rows"][:40][::-1]
    figure = Figure(figsize=(7.2, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#e76f51" if row["part"] in found["keep"] else "#2a9d8f" for row in rows]
    axes.barh([row["part"] for row in rows], [10 ** (-row["snr_db"] / 10) for row in rows], color=colours)
    axes.set_xscale("log")
    axes.set_xlabel(f"error power over signal power of the final latents, that part alone at {found['precision']}")
    axes.set_title("orange: stays in float, by default or by the proposal", fontsize=9)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120)
    publish_bytes(out / "sensitivity.png", sink.getvalue())
    publish_bytes(out / "sensitivity.json", (json.dumps(found, indent=2) + "\n").encode())
    return [out / "sensitivity.json", out / "sensitivity.png"]
