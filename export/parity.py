"""How near a build is to PyTorch in float32: signal-to-noise a graph, PSNR of the pictures end to end, and the gates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from export.clip_gate import judge_failures
from export.graph import Graph
from export.recipe import GateRecipe
from export.runtime import GRAPHS, Build, Call
from export.ssim import ssim

_CEILING_DB = 200.0
"""Stands for `equal`: decibels of no difference are infinite, which JSON cannot hold. Its negative stands for what is not a number."""


def snr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    """10 log10 of signal over error power; -200 of what is not a number, 200 of what is equal."""
    error = float(np.square(wanted.astype(np.float64) - got).sum())
    signal = float(np.square(wanted.astype(np.float64)).sum())
    if error == 0:
        return _CEILING_DB
    # The error of what is not a number is none either, and compares as neither more nor less than anything.
    if not np.isfinite(error) or signal == 0:
        return -_CEILING_DB
    return round(float(np.clip(10 * np.log10(signal / error), -_CEILING_DB, _CEILING_DB)), 2)


def psnr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    """Of two uint8 pictures."""
    mse = float(np.square(wanted.astype(np.float64) - got).mean())
    return round(min(_CEILING_DB, 10 * np.log10(255**2 / mse)) if mse > 0 else _CEILING_DB, 2)


def torch_calls(graphs: Sequence[Graph]) -> dict[str, Call]:
    """The reference: the same modules run by PyTorch in float32."""

    def call(graph: Graph) -> Call:
        def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
            with torch.inference_mode():
                return graph.module(*(torch.from_numpy(inputs[name]) for name in graph.inputs)).numpy()

        return run

    return {graph.name: call(graph) for graph in graphs}


def graph_parity(
    reference: dict[str, Call], build: dict[str, Call], inputs: dict[str, dict[str, np.ndarray]]
) -> dict[str, float]:
    """SNR in dB of every graph on the same inputs."""
    return {name: snr_db(reference[name](inputs[name]), build[name](inputs[name])) for name in GRAPHS}


def picture_parity(wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> dict[str, float]:
    """PSNR and SSIM of uint8 pictures.

    `psnr_db` is of the squared error over all pictures together, `psnr_db_min` of the worst. A mean of decibels would be no
    figure: one picture that is equal to the last bit (no finite PSNR) would hide how far the others are.
    """
    psnr = [psnr_db(a, b) for a, b in zip(wanted, got, strict=True)]
    alike = [ssim(a, b) for a, b in zip(wanted, got, strict=True)]
    return {
        "psnr_db": psnr_db(np.stack(wanted), np.stack(got)),
        "equal_pictures": sum(np.array_equal(a, b) for a, b in zip(wanted, got, strict=True)),
        "psnr_db_min": min(psnr),
        "ssim_mean": round(float(np.mean(alike)), 4),
        "ssim_min": min(alike),
    }


def is_blank(picture: np.ndarray) -> bool:
    """One colour all over, as a broken build draws."""
    return float(picture.std()) < 1.0


def failures(
    precisions: dict[str, str],
    parity: dict[str, Any],
    pictures: Sequence[np.ndarray],
    gates: GateRecipe,
    decoder_tiled: bool = False,
) -> list[str]:
    """Which gates a build misses, in words; empty for a build that passes. `precisions`: of each graph; `decoder_tiled`: whether the pictures
    that it is held to were decoded whole, and its own in tiles."""
    found: list[str] = []
    if any(is_blank(picture) for picture in pictures):
        found.append("a picture is blank")
    least = {"fp32": gates.fp32_snr_db, "fp16": gates.half_snr_db, "bf16": gates.half_snr_db}
    for name, db in parity["graph_snr_db"].items():
        if db <= -_CEILING_DB:
            found.append(f"{name}: gives what is not a number, or anything but zero where PyTorch gives zero")
            continue
        if precisions[name] in least and not db >= least[precisions[name]]:
            found.append(f"{name}: SNR {db} dB is under {least[precisions[name]]}")
    for name, db in (parity.get("block_snr_db") or {}).items():
        if gates.block_snr_db is not None and not db >= gates.block_snr_db:
            found.append(f"unet, {name}: SNR {db} dB is under {gates.block_snr_db}")
    if gates.ssim is not None and not parity["ssim_mean"] >= gates.ssim:
        found.append(f"pictures: mean SSIM {parity['ssim_mean']} is under {gates.ssim}")
    if set(precisions.values()) == {"fp32"}:
        key = "decoder_psnr_db" if decoder_tiled else "fp32_psnr_db"
        wanted = getattr(gates, key)
        if wanted is not None and not parity["psnr_db"] >= wanted:
            found.append(f"pictures: PSNR {parity['psnr_db']} dB is under {wanted} ({key})")
    if set(precisions.values()) != {"fp32"} and not parity["psnr_db"] >= gates.quantised_psnr_db:
        found.append(f"pictures: PSNR {parity['psnr_db']} dB is under {gates.quantised_psnr_db}")
    # Among many good ones a ruined one hardly shows.
    if set(precisions.values()) != {"fp32"} and not parity["psnr_db_min"] >= gates.worst_psnr_db:
        found.append(f"pictures: the worst one's PSNR {parity['psnr_db_min']} dB is under {gates.worst_psnr_db}")
    return found + judge_failures(parity.get("judge"), gates, len(pictures))


def medians(spread: dict[str, dict[str, float]]) -> dict[str, float]:
    """The medians of `latency_spread_ms`."""
    return {name: one["median"] for name, one in spread.items()}


def latency_spread_ms(
    build: Build, tokens: np.ndarray, inputs: dict[str, dict[str, np.ndarray]], runs: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of each graph's call and of a picture, after one warm-up, on this machine: `median`, and as `low` and `high` the 10th and
    the 90th percentile of the runs.

    A build that draws several pictures at once gives `picture` as one's share of them.
    """
    found: dict[str, dict[str, float]] = {}
    work: dict[str, Any] = {name: lambda n=name: build.calls[n](inputs[n]) for name in GRAPHS}
    work["picture"] = lambda: build.picture(tokens, 0)
    for name, run in work.items():
        run()
        times: list[float] = []
        for _ in range(runs):
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1000)
        at_once = build.shape[0] if name == "picture" else 1
        low, median, high = (round(float(v) / at_once, 3) for v in np.percentile(times, [10, 50, 90]))
        found[name] = {"median": median, "low": low, "high": high}
    return found
