"""Repeats the proof of a bundle from the bundle alone: digests, signal-to-noise, pictures, blank and NaN check, cold start, latency, memory.

The references are PyTorch's in float32, kept in the bundle. Where more prompts are asked for than it has pictures of, the bundle's own
fp32 build stands in, and the result says so. Gates are those of the recipe that built it, with today's defaults for those that came since.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import CorruptShard, EdgeFusionError, ParityError
from export import parity
from export.bundle import read_bundle
from export.clip_gate import scores
from export.ends import prove_ends
from export.inside import block_snr_db
from export.proof import broken_files, check_bundle, read_reference, reference_ends, reference_inputs
from export.recipe import GateRecipe
from export.runtime import GRAPHS, Build
from export.targets.contract import check_open
from export.targets.registry import target_of
from export.tiled_build import TILED
from export.words import tokenize
from factory.models.clip import Clip

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Judged:
    """Prompts as token rows 1 T, the pictures that a build should draw of them (picture i: seed i), and who drew those."""

    tokens: list[np.ndarray]
    pictures: list[np.ndarray]
    source: str
    prompts: list[str]
    clip: Clip | None


def verify_bundle(
    folder: Path,
    builds: Sequence[str] = (),
    prompts: int | None = None,
    runs: int = 7,
    threads: int = 2,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """What was found, as JSON would hold it; `ok` says whether every gate holds. Raises EdgeFusionError for no bundle.

    A file that is not what its digest says ends it there: nothing of a damaged bundle is run.
    """
    check_bundle(folder)
    progress("digests")
    # Digests first: a bundle.json with a flipped bit may be no JSON any more, and that is damage, not a wrong folder.
    broken = broken_files(folder)
    found: dict[str, Any] = {"bundle": str(folder), "ok": False, "broken_files": broken, "builds": {}}
    if broken:
        return found
    facts = read_bundle(folder)
    missing = [name for name in builds if name not in facts["builds"]]
    if missing:
        raise EdgeFusionError(
            f"there is no {missing[0]} build", where=str(folder), remedy=f"There are {', '.join(facts['builds'])}"
        )
    found["target"] = facts["target"]
    target = target_of(facts)
    target.require()
    check_open(target, folder)
    found["measured_on"] = f"{target.hardware(threads)}, {target.runtime()}"
    found["busy"] = _busy()
    found["built_with"] = facts["runtime"]
    reference = read_reference(folder)
    clip, judge = _open_judge(facts["gates"])
    judged = _judged(folder, facts, reference, prompts or len(reference["pictures"]), threads, clip)
    found |= {"prompts": len(judged.pictures), "reference": judged.source, "judge": judge}
    for name in builds or facts["builds"]:
        progress(f"{name}: gates")
        found["builds"][name] = _verify_build(folder, facts, name, reference, judged, runs, threads, progress)
    found["ok"] = all(not build["missed"] for build in found["builds"].values())
    return found


def verify_or_say_why(folder: Path, runs: int, threads: int, progress: Progress) -> dict[str, Any]:
    """As `verify_bundle`, and `not_run`: empty, or why this machine does not run the bundle, of which then only the digests are checked."""
    facts = read_bundle(folder)
    target = target_of(facts)
    try:
        target.require()
        reason = target.not_here()
    except EdgeFusionError as error:
        reason = error.what
    if not reason:
        return {**verify_bundle(folder, runs=runs, threads=threads, progress=progress), "not_run": ""}
    builds = {name: {"missed": [], "bytes": build["bytes"]} for name, build in facts["builds"].items()}
    broken = broken_files(folder)
    told = {"bundle": str(folder), "ok": False, "broken_files": broken, "builds": builds, "not_run": reason, "busy": ""}
    return told | {"target": facts["target"], "built_with": facts["runtime"]}


def raise_failed(found: dict[str, Any]) -> None:
    """The error, with its exit code, of a verification that is not ok."""
    if found["broken_files"]:
        raise CorruptShard("; ".join(found["broken_files"]), where=found["bundle"], remedy="Export again")
    missed = [f"{name}: {what}" for name, build in found["builds"].items() for what in build["missed"]]
    if missed:
        raise ParityError("; ".join(missed), where=found["bundle"], remedy="Do not ship it; export again")


def _open_judge(gates: dict[str, Any]) -> tuple[Clip | None, str]:
    """The judge that the bundle was built with, and what to say of it: a machine may not have it, and then its gate is not tried."""
    judge = GateRecipe(**gates).judge
    if judge is None:
        return None, "none: the recipe named no judge"
    try:
        return Clip(judge), judge.model
    except EdgeFusionError as error:
        return None, f"not tried here: {error.what}"


def _judged(
    folder: Path,
    facts: dict[str, Any],
    reference: dict[str, np.ndarray],
    count: int,
    threads: int,
    clip: Clip | None,
) -> Judged:
    pictures = list(reference["pictures"][:count])
    tokens = [row[None] for row in reference["tokens"][:count]]
    if count <= len(pictures):
        return Judged(tokens, pictures, "PyTorch fp32, stored in the bundle", facts["prompts"][:count], clip)
    if "fp32" not in facts["builds"]:
        raise EdgeFusionError(
            f"holds {len(pictures)} reference pictures and no fp32 build to draw more",
            where=str(folder),
            remedy=f"Ask for --prompts {len(pictures)} at most, or export with precision fp32",
        )
    lines = [facts["prompts"][i % len(facts["prompts"])] for i in range(count)]
    tokens = tokenize(folder, facts["tokenizer"], lines)
    build = _open(folder, facts, "fp32", threads)
    more = build.pictures(tokens[len(pictures) :], range(len(pictures), count))
    source = f"PyTorch fp32 for {len(pictures)}, stored in the bundle; its own fp32 build for {len(more)}"
    return Judged(tokens, pictures + more, source, lines, clip)


def _busy() -> str:
    """A warning where other work holds the cores, for it makes every time too long; empty where none does."""
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    return f"load {load:.1f} on {cores} cores when measuring began: the times are too long" if load > cores else ""


def _open(folder: Path, facts: dict[str, Any], name: str, threads: int) -> Build:
    calls = target_of(facts).open(folder, facts["builds"][name]["graphs"], threads)
    return Build(calls, facts["scheduler"], facts["latent_shape"])


def _verify_build(
    folder: Path,
    facts: dict[str, Any],
    name: str,
    reference: dict[str, np.ndarray],
    judged: Judged,
    runs: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    build = _open(folder, facts, name, threads)
    inputs = {graph: reference_inputs(reference, graph) for graph in GRAPHS}
    answers = {graph: build.calls[graph](inputs[graph]) for graph in GRAPHS}
    missed = [f"{graph}: gives what is not a number" for graph in GRAPHS if not np.isfinite(answers[graph]).all()]
    told: dict[str, Any] = {"missed": missed, "recorded": facts["builds"][name]["parity"]}
    told["bytes"] = facts["builds"][name]["bytes"]
    told["stored"] = {key: facts["builds"][name].get(key) for key in ("fallback", "compiler_estimated", "tiled")}
    if missed:
        return told
    try:
        pictures = build.pictures(judged.tokens, range(len(judged.tokens)))
    except ParityError as error:
        missed.append(error.what)
        return told
    told["blank_pictures"] = sum(parity.is_blank(picture) for picture in pictures)
    told["parity"] = {
        "graph_snr_db": {graph: parity.snr_db(reference[f"{graph}.out"], answers[graph]) for graph in GRAPHS},
        **parity.picture_parity(judged.pictures, pictures),
    }
    precisions = facts["builds"][name]["precisions"]
    if precisions["unet"] != "fp32":
        told["parity"]["block_snr_db"] = _blocks(folder, facts, name, inputs["unet"], threads)
    if judged.clip is not None:
        told["parity"]["judge"] = {
            "pytorch": scores(judged.clip, judged.prompts, judged.pictures),
            "build": scores(judged.clip, judged.prompts, pictures),
        }
    gates, tiled = GateRecipe(**facts["gates"]), facts.get("decoder_tiles") is not None
    missed += parity.failures(precisions, told["parity"], pictures, gates, tiled)
    rows = [row[None] for row in reference["tokens"]]
    try:
        ends, missed_there = prove_ends(build, rows, reference_ends(reference), precisions, gates, tiled)
    except ParityError as error:
        missed.append(error.what)
        return told
    told["parity"] |= ends
    missed += missed_there
    progress(f"{name}: latency")
    told[f"{target_of(facts).times_kind(precisions)}_ms"] = parity.latency_spread_ms(
        build, judged.tokens[0], inputs, runs
    )
    told["cold"] = _cold_start(folder, name, threads)
    return told


def _blocks(
    folder: Path, facts: dict[str, Any], name: str, row: dict[str, np.ndarray], threads: int
) -> dict[str, float] | None:
    """Each UNet block's SNR against the bundle's own fp32 build; None without one, or where the target shows no tensors."""
    blocks, plain = facts.get("unet_blocks", {}), facts["builds"].get("fp32")
    if plain is None or name.endswith(TILED):
        return None
    target = target_of(facts)
    both = (
        target.tensors(folder / build["graphs"]["unet"], list(blocks.values()), row, threads)
        for build in (plain, facts["builds"][name])
    )
    return block_snr_db(blocks, *both)


def _cold_start(folder: Path, name: str, threads: int) -> dict[str, float]:
    """`export.probe` in a fresh process; the system's file cache is warm."""
    home = str(Path(__file__).parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "export.probe", str(folder.resolve()), name, str(threads)]
    said = subprocess.run(
        command, capture_output=True, text=True, cwd=home, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    if said.returncode:
        reason = (said.stderr.strip().splitlines() or ["no word"])[-1]
        raise EdgeFusionError(f"the {name} build does not start by itself: {reason}", where=str(folder))
    return json.loads(said.stdout.splitlines()[-1])
