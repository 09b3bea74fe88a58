"""README.md of a bundle: pictures, what it is, what it came from and under which licences, precisions, figures with their kind, how to run it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.guidance import guidance_words
from export.layers import HIGH_PRECISION
from export.off_chip import off_lines
from export.recipe import SourceRecipe
from export.runtime import GRAPHS
from export.targets.contract import EdgeTarget
from export.targets.registry import find_target
from factory.models import ZOO
from trainer.trained_on import TRAINED_ON

CARD = "README.md"
SHOWN = 8
"""Pictures a row of parity.png."""
_PHASES = {"adapt": "1, adapt (feature distillation)", "distill": "2, distill (few steps)"}

_ZOO_SOURCES = (
    SourceRecipe(
        name="EdgeFusion's embedded zoo", part="weights", licence="Apache-2.0", used_for="teacher and student"
    ),
    SourceRecipe(name="@lobehub/fluent-emoji-3d 1.1.0", part="data", licence="MIT", used_for="pictures, style 3d"),
    SourceRecipe(
        name="@iconify-json/fluent-emoji-flat 1.2.6", part="data", licence="MIT", used_for="pictures, style flat"
    ),
    SourceRecipe(
        name="@iconify-json/noto 1.2.9", part="data", licence="Apache-2.0", used_for="pictures, style cartoon"
    ),
    SourceRecipe(name="emojibase-data 17.0.0", part="data", licence="MIT", used_for="names and groups"),
)
"""Source: factory/pocket/README.md."""


def provenance(student: Path, stated: Sequence[SourceRecipe]) -> dict[str, Any]:
    """For bundle.json: the student's name, and every model and data set that it came from with its licence.

    What a recipe states goes first; the shipped student knows its own. `sources` is empty where nobody said. `trained_on` are the data of each
    phase, where the student's folder tells.
    """
    own = _ZOO_SOURCES if student.resolve().is_relative_to(ZOO.resolve()) else ()
    found: dict[str, Any] = {"name": student.resolve().name, "sources": [one.model_dump() for one in stated or own]}
    if (student / TRAINED_ON).exists():
        found["trained_on"] = json.loads((student / TRAINED_ON).read_text())
    return found


def write_card(place: Path, facts: dict[str, Any]) -> None:
    """CARD of a bundle, from what bundle.json will hold."""
    (place / CARD).write_text(_text(facts))


def _text(facts: dict[str, Any]) -> str:
    side = facts["latent_shape"][-1]
    first, range_words = next(iter(facts["builds"])), guidance_words(facts["scheduler"])
    guided = "with guidance as an input" if range_words else "without guidance"
    target = find_target(facts["target"])
    parts = [
        f"# {facts['student']['name']} for {facts['target']}",
        "",
        f"A text-to-image model for the edge: text to a picture in {facts['steps']} steps {guided}, as three static graphs (text encoder, UNet, VAE decoder) "
        f"with latents of {side} x {side}. Distilled after EdgeFusion (arXiv 2404.11925); built and proven by `edgefusion export`."
        + _other_decoder(facts.get("vae")),
        "",
        f"![Rows: PyTorch in float32, then {', '.join(facts['builds'])}. Columns: the prompts below, seeds 0, 1, ...](parity.png)",
        "",
        f"Rows: PyTorch in float32, then {', '.join(facts['builds'])}. Columns, seeds 0, 1, ...: {'; '.join(facts['prompts'][:SHOWN])}.",
        "",
        "## Run it",
        "",
        f"    pip install {' '.join(('numpy', target.library, *target.sample_needs, 'tokenizers'))}",
        f'    python sample.py "{facts["prompts"][0]}" --seed 3 --build {first} --out picture.png',
        "",
        *([f"`--guidance` takes a guidance scale: {range_words}.", ""] if range_words else []),
        "`sha256sum -c SHA256SUMS` finds a damaged file; `edgefusion export verify .` repeats the whole proof.",
        "",
        "## Precisions and sizes",
        "",
        "| build | text encoder | UNet | VAE decoder | MiB |",
        "|---|---|---|---|---|",
    ]
    for name, build in facts["builds"].items():
        parts.append(
            f"| {name} | {' | '.join(build['precisions'][graph] for graph in GRAPHS)} | {sum(build['bytes'].values()) / 2**20:.1f} |"
        )
    parts += [
        "",
        "w8a16, w8a8: int8 weights and 16- or 8-bit integer activations. w8, w4: int8 or 4-bit weights, float activations. "
        f"In float wherever a graph is quantised: {', '.join(facts['keep']) or 'nothing'}.{_heedless(target)}",
        "",
        "## Figures",
        "",
        f"Against PyTorch in float32 on {len(facts['prompts'])} prompts; times on {facts['measured_on']} with {facts['runtime']}. Measured: what that machine needs. "
        "Emulated: a CPU plays a chip's arithmetic, so that pictures are true and times say nothing of the chip."
        + (" No phone or NPU was at hand." if facts.get("device", "CPU") == "CPU" else "")
        + shared_time(facts),
        "",
        "| build | UNet SNR dB | pictures PSNR dB, worst | SSIM | judge's CLIP, R@1 | picture ms: median, 10th to 90th percentile | kind of time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, build in facts["builds"].items():
        if build["not_run"]:
            parts.append(f"| {name} | not run on the machine that built it: {build['not_run']} | | | | | |")
            continue
        proof, judged = build["parity"], build["parity"].get("judge")
        kind = "measured" if build["measured_ms"] else "emulated"
        parts.append(
            f"| {name} | {proof['graph_snr_db']['unet']} | {proof['psnr_db']}, {proof['psnr_db_min']} | {proof['ssim_mean']} | "
            + (f"{judged['build']['clip_mean']}, {judged['build']['recall_at_1']}" if judged else "not asked")
            + f" | {picture_ms(build)} | {kind} |"
        )
    proofs = [build["parity"] for build in facts["builds"].values() if build["parity"]]
    judged = next((proof["judge"]["pytorch"] for proof in proofs if "judge" in proof), None)
    if judged:
        judge = facts["gates"]["judge"]["model"]
        parts += [
            "",
            f"PyTorch's own pictures by the same judge ({judge}): {judged['clip_mean']}, {judged['recall_at_1']}.",
        ]
    parts += _off_chip(facts["builds"])
    data = _trained_on(facts["student"].get("trained_on", []))
    return "\n".join([*parts, "", *data, *_licences(facts["student"]["sources"])]) + "\n"


def _off_chip(builds: dict[str, Any]) -> list[str]:
    """What stays off the accelerator and what a compiler estimates, for bundles of targets that know."""
    lines = [f"- {line}" for name, build in builds.items() for line in off_lines(name, build)]
    head = [
        "",
        "## On the chip it is for",
        "",
        "By the target's own tools; no device of that kind measured any of it.",
        "",
    ]
    return [*head, *lines] if lines else []


def _heedless(target: EdgeTarget) -> str:
    if target.kept(HIGH_PRECISION):
        return ""
    return f" The tools of {target.name} quantise every layer, also those that a recipe names in `export.keep`."


def _trained_on(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    told = [f"| {_PHASES[one['phase']]} | {one['data']} | {one['samples']} | {one['share']:.1%} |" for one in rows]
    head = ["| phase | data set | samples | share of the draws |", "|---|---|---|---|"]
    return ["## What it was trained on", "", *head, *told, ""]


def picture_ms(build: dict[str, Any]) -> str:
    """Median and spread of a picture's time, measured or emulated; bundles of older versions hold no spread."""
    median = (build["measured_ms"] or build["emulated_ms"])["picture"]
    spread = build.get("spread_ms")
    return f"{median}, {spread['picture'][0]} to {spread['picture'][1]}" if spread else str(median)


def shared_time(facts: dict[str, Any]) -> str:
    """What the time of a picture means where several are drawn at once; empty where not."""
    at_once = facts["latent_shape"][0]
    return "" if at_once == 1 else f" The builds draw {at_once} pictures at once; the time of a picture is its share."


def _other_decoder(vae: dict[str, Any] | None) -> str:
    if vae is None:
        return ""
    return f" The decoder is that of {vae['folder']}, whose pictures are {vae['against_own_decoder']['psnr_db']} dB from those of the student's own."


def _licences(sources: Sequence[dict[str, str]]) -> list[str]:
    if not sources:
        return [
            "## Licences",
            "",
            "Not stated. Licences of the weights and of the data bind this bundle too: state them in the recipe's `export.sources` before you publish it.",
        ]
    rows = [f"| {one['name']} | {one['part']} | {one['used_for']} | {one['licence']} |" for one in sources]
    return ["## What it came from", "", "| name | part | used for | licence |", "|---|---|---|---|", *rows]
