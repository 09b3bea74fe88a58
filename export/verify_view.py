"""A verification as plain tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from export.off_chip import off_lines
from export.runtime import GRAPHS

_SHORT = {"text_encoder": "text", "unet": "UNet", "vae_decoder": "decoder"}
"""So that the figures fit 80 columns."""


def gates_table(found: dict[str, Any]) -> Table:
    """Every gate and figure of quality (dB, but for SSIM), a row a build."""
    table = Table(
        "build",
        *[f"{_SHORT[graph]} SNR" for graph in GRAPHS],
        "PSNR all, min",
        "SSIM mean, min",
        "CLIP, R@1",
        "blank",
        "verdict",
        title=f"{found['bundle']}: {found['prompts']} prompts against {found['reference']}",
        caption="CLIP, R@1: the judge's score and recall of the build's pictures, and in brackets of PyTorch's."
        if any((build.get("parity") or {}).get("judge") for build in found["builds"].values())
        else None,
    )
    for name, build in found["builds"].items():
        proof = build.get("parity")
        cells = ["-"] * 7
        if proof:
            cells = [
                *[f"{proof['graph_snr_db'][graph]:.1f}" for graph in GRAPHS],
                f"{proof['psnr_db']:.1f}, {proof['psnr_db_min']:.1f}",
                f"{proof['ssim_mean']:.3f}, {proof['ssim_min']:.3f}",
                _judge_cell(proof.get("judge")),
                str(build["blank_pictures"]),
            ]
        table.add_row(name, *cells, "MISSED: " + "; ".join(build["missed"]) if build["missed"] else "passed")
    return table


def block_lines(found: dict[str, Any]) -> list[str]:
    """Of each build whose target shows them: the SNR of every UNet block against the bundle's fp32 build, the least first."""
    lines: list[str] = []
    for name, build in found["builds"].items():
        blocks = (build.get("parity") or {}).get("block_snr_db")
        if blocks:
            told = ", ".join(f"{block} {db:.1f}" for block, db in sorted(blocks.items(), key=lambda one: one[1]))
            lines.append(f"{name}, SNR in dB of the UNet's blocks: {told}")
    return lines


def end_lines(found: dict[str, Any]) -> list[str]:
    """Of each build that takes guidance: how near its pictures come at either end of the range."""
    return [
        f"{name}, pictures at guidance {one['scale']:g}: PSNR {one['psnr_db']:.1f} dB, the worst {one['psnr_db_min']:.1f}, SSIM {one['ssim_mean']:.3f}"
        for name, build in found["builds"].items()
        for one in (build.get("parity") or {}).get("ends", {}).values()
    ]


def recorded_lines(found: dict[str, Any]) -> list[str]:
    """What the bundle holds of hardware that is not here: `verify` repeats it, since nobody can measure it again here."""
    lines = [line for name, build in found["builds"].items() for line in off_lines(name, build["stored"])]
    return ["As the bundle says, not measured here:", *lines] if lines else []


def _judge_cell(judged: dict[str, Any] | None) -> str:
    """The build's figures by the judge, and PyTorch's in brackets."""
    if judged is None:
        return "-"
    build, pytorch = (
        f"{judged[who]['clip_mean']:.3f} {judged[who]['recall_at_1']:.2f}" for who in ("build", "pytorch")
    )
    return f"{build}\n({pytorch})"


def speed_table(found: dict[str, Any]) -> Table:
    """Measured here: milliseconds as median and 10th to 90th percentile, cold start, peak memory, size."""
    table = Table(
        "build",
        *[f"{_SHORT[graph]} ms" for graph in GRAPHS],
        "picture ms",
        "cold s",
        "peak MiB",
        "size MiB",
        title=". ".join(filter(None, [f"measured on {found['measured_on']}", found["busy"]])),
        caption="Milliseconds: the median, and below it the 10th and the 90th percentile.",
    )
    for name, build in found["builds"].items():
        if "cold" not in build:
            continue
        ms = build.get("measured_ms") or build["emulated_ms"]
        spread = [ms[what] for what in (*GRAPHS, "picture")]
        table.add_row(
            name if "measured_ms" in build else f"{name} (emulated)",
            *[f"{one['median']:.1f}\n{one['low']:.1f}\nto {one['high']:.1f}" for one in spread],
            f"{build['cold']['cold_start_s']:.2f}",
            f"{build['cold']['peak_memory_bytes'] / 2**20:.0f}",
            f"{sum(build['bytes'].values()) / 2**20:.1f}",
        )
    return table
