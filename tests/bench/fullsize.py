"""The full-size student end to end on this CPU beside its rivals, random weights: ratios of one run, parts that can be resumed.

    PYTHONPATH=. python tests/bench/fullsize.py FOLDER [--size-px 512] [--rounds 3] [--runs 1] [--threads 2] [--only NAME ...]

Every piece and every measurement is a process of its own; what FOLDER holds already is not made or measured again, so the command can be
cut off and repeated. Rivals take turns, so that what else the machine does falls on all alike; a figure is the median over the rounds.
GenAI needs openvino-genai (its folder may be given by PYTHONPATH). FOLDER takes 8 GB at 512 px, the largest process 9 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PIECES = {
    "student": "student",
    "bundle": "bundle/openvino/bundle.json",
    "small": "small",
    "genai": "genai",
    "ort": "ort",
}
OURS = ("w8bf16", "w8bf16+small", "int8", "int8+small")
RIVALS = (*OURS, "genai", "ort", "ort+small", "diffusers")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path)
    ask.add_argument("--size-px", type=int, default=512)
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--runs", type=int, default=1, help="pictures timed in each process, after one to warm up")
    ask.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    ask.add_argument("--only", nargs="*", default=[], help=f"pieces ({', '.join(PIECES)}) or rivals")
    asked = ask.parse_args()
    known = {*PIECES, *RIVALS}
    if strange := sorted(set(asked.only) - known):
        raise SystemExit(f"--only {strange[0]}: choose among {', '.join(sorted(known))}")
    place = asked.folder / f"{asked.size_px}px"
    place.mkdir(parents=True, exist_ok=True)
    wanted = set(asked.only) or known
    for piece in PIECES:
        if piece in wanted:
            make(piece, place, asked.size_px)
    for turn in range(asked.rounds):
        for rival in RIVALS:
            if rival in wanted:
                measure(rival, place, asked.size_px, asked.threads, asked.runs, turn)
    report(place, asked.size_px, asked.threads)


def make(piece: str, place: Path, size_px: int) -> None:
    """A piece of `fullsize_models`; a mark says that it is whole."""
    mark = place / f".{piece}.made"
    if mark.exists():
        return
    began = time.time()
    print(f"making {piece}", flush=True)
    said = run("fullsize_models.py", piece, str(place), str(size_px))
    if said.returncode:
        print(f"  {piece} cannot be made: {last_line(said)}", flush=True)
        return
    mark.write_text(f"{time.time() - began:.0f} s\n")


def measure(rival: str, place: Path, size_px: int, threads: int, runs: int, turn: int) -> None:
    path = place / "results" / f"{rival}.{turn}.json"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    said = run("fullsize_worker.py", rival, str(place), str(size_px), str(threads), str(runs))
    if said.returncode:
        print(f"{rival} does not run: {last_line(said)}", flush=True)
        return
    found = {**json.loads(said.stdout.splitlines()[-1]), "load": load, "threads": threads}
    path.write_text(json.dumps(found) + "\n")
    print(f"{rival} round {turn}: {found['picture_s']:.2f} s, {found['peak_bytes'] / 1e9:.2f} GB", flush=True)


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(HERE / script), *words], capture_output=True, text=True)


def last_line(said: subprocess.CompletedProcess[str]) -> str:
    lines = said.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {said.returncode}"


def report(place: Path, size_px: int, threads: int) -> None:
    found = {rival: results(place, rival) for rival in RIVALS}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("openvino", "onnxruntime", "torch"))
    table = Table(
        *("what", "text s", "UNet step s", "decoder s", "picture s", "spread", "peak GB", "against SD-v1.5", "load"),
        title=f"BK-SDM-Tiny, {size_px} px, 2 steps, random weights · {platform.machine()}, {threads} threads · {libraries} · commit {commit}",
        caption="diffusers: SD-v1.5's shapes, eager float32, 25 guided steps: one step measured and multiplied. The rest: measured whole",
    )
    for rival, rows in found.items():
        if not rows:
            table.add_row(rival, *["not run"] * 8)
            continue
        pictures = [row["picture_s"] for row in rows]
        cells = [f"{middle(rows, key):.2f}" if key in rows[0] else "" for key in ("text_s", "step_s", "decode_s")]
        against = (
            f"{middle(found['diffusers'], 'picture_s') / middle(rows, 'picture_s'):.1f}x" if found["diffusers"] else ""
        )
        table.add_row(
            rival,
            *cells,
            f"{middle(rows, 'picture_s'):.2f}",
            f"{min(pictures):.2f}-{max(pictures):.2f}",
            f"{middle(rows, 'peak_bytes') / 1e9:.2f}",
            against,
            f"{max(row['load'] for row in rows):.1f}",
        )
    console = Console(width=150)
    console.print(table)
    for line in aims(place, found):
        console.print(line)


def aims(place: Path, found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Each aim of the issue in words, with what it came to."""
    lines: list[str] = []

    def say(what: str, value: float | None, aim: float, more: bool, unit: str) -> None:
        if value is None:
            lines.append(f"{what}: not measured")
            return
        held = value >= aim if more else value <= aim
        lines.append(
            f"{what}: {value:.2f}{unit}, aim {'at least' if more else 'at most'} {aim:g}{unit}: {'reached' if held else 'MISSED'}"
        )

    def ratio(one: str, other: str, key: str = "picture_s") -> float | None:
        return middle(found[one], key) / middle(found[other], key) if found[one] and found[other] else None

    facts_path = place / "bundle" / "openvino" / "bundle.json"
    builds: dict[str, Any] = json.loads(facts_path.read_text())["builds"] if facts_path.exists() else {}
    for build in OURS[::2]:
        say(f"{build} against SD-v1.5, SD's decoder", ratio("diffusers", build), 25, True, "x")
        say(f"{build} against SD-v1.5, small decoder", ratio("diffusers", f"{build}+small"), 60, True, "x")
        say(f"{build} against OpenVINO GenAI", ratio("genai", build), 1.2, True, "x")
        say(f"{build} against ONNX Runtime's default", ratio("ort", build), 1.2, True, "x")
        say(f"{build}, small decoder, against ONNX Runtime's", ratio("ort+small", f"{build}+small"), 1.2, True, "x")
        say(f"{build}: memory over GenAI's", ratio(build, "genai", "peak_bytes"), 1, False, "x")
        say(f"{build}: memory over ONNX Runtime's", ratio(build, "ort", "peak_bytes"), 1, False, "x")
        say(
            f"{build}: peak memory",
            middle(found[build], "peak_bytes") / 1e9 if found[build] else None,
            2.5,
            False,
            " GB",
        )
        if build in builds:
            say(f"{build}: UNet's file", builds[build]["bytes"]["unet"] / 1e6, 330, False, " MB")
            lines.append(f"{build}: SNR against PyTorch fp32, dB: {builds[build]['parity']['graph_snr_db']}")
    return lines


def results(place: Path, rival: str) -> list[dict[str, float]]:
    return [json.loads(path.read_text()) for path in sorted((place / "results").glob(f"{rival}.[0-9]*.json"))]


def middle(rows: list[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


if __name__ == "__main__":
    main()
