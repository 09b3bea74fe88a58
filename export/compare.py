"""One page with bundles side by side: the same prompts and seeds, quality, size, latency and memory, all measured anew in one go.

What was measured here, what the CPU only emulates, and what was predicted or estimated for other hardware stand apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import EdgeFusionError
from cluster.storage import publish_bytes
from export.bundle import open_bundle, read_bundle
from export.off_chip import estimates, fallbacks
from export.pages import png_url
from export.proof import read_reference
from export.runtime import GRAPHS
from export.verify import raise_failed, verify_or_say_why
from export.words import tokenize


def write_compare(
    folders: Sequence[Path],
    out: Path,
    prompts: int = 4,
    runs: int = 7,
    threads: int = 2,
    progress: Callable[[str], None] = lambda what: None,
) -> Path:
    """Write the page `out`. Raises CorruptShard for a damaged bundle; one that misses a gate or does not run here is shown as such."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise EdgeFusionError("a bundle is named twice", remedy="Name each bundle once")
    facts = [read_bundle(folder) for folder in folders]
    labels = _labels(folders)
    found: list[dict[str, Any]] = []
    for folder, label in zip(folders, labels, strict=True):
        one = verify_or_say_why(
            folder, runs=runs, threads=threads, progress=lambda what, label=label: progress(f"{label}: {what}")
        )
        if one["broken_files"]:
            raise_failed(one)
        found.append(one)
    lines = facts[0]["prompts"][:prompts]
    references = [read_reference(folder)["pictures"] for folder in folders]
    rows = [
        _row(label, name, one, fact)
        for label, one, fact in zip(labels, found, facts, strict=True)
        for name in one["builds"]
    ]
    page = (
        Environment(
            loader=FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "cluster"]),
            autoescape=select_autoescape(default=True),
        )
        .get_template("compare.html.j2")
        .render(
            bundles=[dict(one, label=label, facts=fact) for label, one, fact in zip(labels, found, facts, strict=True)],
            rows=rows,
            graphs=GRAPHS,
            prompts=lines,
            columns=_pictures(folders, labels, facts, found, lines, references[0], threads),
            forecasts=[row for row in rows if row["forecast"]],
            same_reference=all(np.array_equal(references[0], one) for one in references),
        )
    )
    publish_bytes(out, page.encode())
    return out


def _labels(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart."""
    if len(folders) == 1:
        return [folders[0].resolve().name]
    shared = os.path.commonpath([folder.resolve() for folder in folders])
    return [folder.resolve().relative_to(shared).as_posix() for folder in folders]


def _row(label: str, name: str, found: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """One build: what was measured, and apart from it what was forecast."""
    build, steps = found["builds"][name], facts["steps"]
    spread = build.get("measured_ms") or build.get("emulated_ms")
    at_once = facts["latent_shape"][0]
    calls = {"text_encoder": 1 / at_once, "unet": steps / at_once, "vae_decoder": 1 / at_once}  # a picture
    return {
        "label": label,
        "name": name,
        "emulated": "emulated_ms" in build,
        "not_run": found["not_run"],
        "stored": facts["builds"][name],
        "built_on": f"{facts['measured_on']}, {facts['runtime']}",
        "missed": build["missed"],
        "parity": build.get("parity"),
        "mib": sum(build["bytes"].values()) / 2**20,
        "ms": spread,
        "parts": [(graph, spread[graph]["median"] * count) for graph, count in calls.items()] if spread else [],
        "total": sum(spread[graph]["median"] * count for graph, count in calls.items()) if spread else 0.0,
        "steps": steps,
        "cold": build.get("cold"),
        "fallbacks": fallbacks(facts["builds"][name]),
        "estimates": estimates(facts["builds"][name]),
        "forecast": _forecast(facts["builds"][name].get("tiling")),
    }


def _forecast(tiling: dict[str, Any] | None) -> dict[str, Any] | None:
    """Sums over the attention blocks of a tiled build; what was not obtained is None.

    The compiler was asked of tiled blocks alone and may have refused some: both kinds are summed over the blocks that it told of.
    """
    if tiling is None:
        return None
    predicted = tiling["predicted"]
    estimated = {
        name: one for name, one in (tiling["compiler_estimated"] or {}).items() if isinstance(one["untiled"], dict)
    }
    names = [name for name in predicted if name in estimated or not estimated]
    told: dict[str, Any] = {"profile": tiling["profile"], "emulated": tiling["emulated"]}
    told["blocks"] = f"{len(names)} of {len(predicted)}"
    for kind, costs in (("predicted", predicted), ("compiler_estimated", estimated)):
        told[kind], blocks = None, [costs[name] for name in names if name in costs]
        if blocks:
            told[kind] = {
                when: {
                    "dram_mb": sum(one[when]["dram_bytes"] for one in blocks) / 1e6,
                    "ms": sum(one[when]["latency_s"] for one in blocks) * 1e3,
                }
                for when in ("untiled", "chosen")
            }
    return told


def _pictures(
    folders: Sequence[Path],
    labels: Sequence[str],
    facts: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
    lines: Sequence[str],
    wanted: np.ndarray,
    threads: int,
) -> list[dict[str, Any]]:
    """A column a build that runs here, and first what full precision draws; prompt i has seed i."""
    columns: list[dict[str, Any]] = [
        {
            "title": "PyTorch fp32",
            "under": f"stored in {labels[0]}",
            "pictures": [png_url(p) for p in wanted[: len(lines)]],
        }
    ]
    for folder, label, fact, one in zip(folders, labels, facts, found, strict=True):
        if one["not_run"]:
            continue
        tokens = tokenize(folder, fact["tokenizer"], lines)
        for name in fact["builds"]:
            build, _ = open_bundle(folder, name, threads)
            drawn = [png_url(picture) for picture in build.pictures(tokens, range(len(tokens)))]
            columns.append({"title": name, "under": label, "pictures": drawn})
    return columns
