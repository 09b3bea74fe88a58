"""One target's bundle: its builds lowered, proven beside PyTorch, and described in bundle.json, which is written last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ParityError
from cluster.storage import digest_file
from export import parity
from export.card import CARD, SHOWN, provenance, write_card
from export.clip_gate import scores
from export.ends import prove_ends
from export.graph import Graph
from export.inside import block_snr_db, unet_blocks
from export.noise import GENERATOR
from export.proof import BUNDLE, write_reference, write_sample, write_sums
from export.recipe import ExportRecipe
from export.refusal import refusals
from export.runtime import Build, Call
from export.solve import Plan
from export.targets.contract import EdgeTarget, Source, bytes_of
from export.targets.registry import find_target
from export.tiled_build import SOURCE, TILED, tiles_in, tiling_facts
from export.tiling import check_tiles
from factory.models.clip import Clip
from trainer.sample import contact_sheet


@dataclass(frozen=True)
class Work:
    """What all targets of one export share. Lists of tokens (1 T), prompts and `wanted` (H W 3 uint8, PyTorch's) belong together."""

    pipeline: Any
    graphs: Sequence[Graph]
    sources: Path
    """Folder of the float32 ONNX files."""
    reference: Build
    calibration: dict[str, list[dict[str, np.ndarray]]]
    tokens: Sequence[np.ndarray]
    prompts: Sequence[str]
    wanted: Sequence[np.ndarray]
    ends: Mapping[str, Sequence[np.ndarray]]
    """PyTorch's too, at either end of the range of guidance scales; empty where guidance is fixed."""
    torch_ms: dict[str, float]
    recipe: ExportRecipe
    plan: Plan | None
    compiled: dict[str, Any] | None
    decoder_tiles: dict[str, Any] | None
    vae: dict[str, Any] | None
    """Whose decoder draws, where it is not the student's own."""
    keep: Sequence[str]
    student: Path
    made_with: dict[str, dict[str, Any]]
    """Of each target: the student, prompts and recipe that a finished bundle is held to."""


def build_target(target: EdgeTarget, place: Path, work: Work) -> None:
    """Fill `place` with the builds of one target. Raises ParityError for one that misses a gate.

    A build that this machine cannot run has no parity and no times; `not_run` says why.
    """
    recipe, plan = work.recipe, work.plan
    builds: dict[str, Any] = {}
    sheet = [list(work.wanted)]
    # A plan that leaves every block untiled would only repeat the untiled builds.
    tiles = plan is not None and bool(plan.tiled) and target.from_onnx
    clip = None if recipe.gates.judge is None else Clip(recipe.gates.judge)
    blocks = unet_blocks(work.sources / "unet.onnx")
    for mix, variant in [(mix, variant) for mix in recipe.builds(target.name) for variant in ["", TILED][: 1 + tiles]]:
        name, precisions = mix.name + variant, mix.graphs()
        names = _lower(target, precisions, place, work, variant)
        if plan is not None and variant == TILED:
            check_tiles(target.readable(place / names["unet"]), plan)
        facts = builds[name] = {
            "graphs": names,
            "precisions": precisions,
            "tiled": tiles_in(target, _source(work, work.graphs[1], variant), variant),
            "bytes": {graph: bytes_of(target, place / file) for graph, file in names.items()},
            "parity": None,
            "measured_ms": None,
            "emulated_ms": None,
            "spread_ms": None,
            "not_run": target.not_here(),
            "fallback": {graph: target.fallback(place / file) for graph, file in names.items()},
            "compiler_estimated": {graph: target.estimate(place / file) for graph, file in names.items()},
        }
        if facts["not_run"]:
            continue
        build = Build(target.open(place, names, recipe.threads), work.reference.scheduler, work.reference.shape)
        pictures = build.pictures(work.tokens, range(len(work.tokens)))
        inside: dict[str, Any] = {}
        if precisions["unet"] != "fp32" and not variant:
            inside["block_snr_db"] = _blocks(target, place / names["unet"], work, blocks)
        facts["parity"] = _prove(target, name, precisions, build, pictures, work, clip, inside)
        spread = parity.latency_spread_ms(build, work.tokens[0], arrays_of(work.graphs), recipe.latency_runs)
        ms, kind = parity.medians(spread), target.times_kind(precisions)
        facts[f"{kind}_ms"] = ms
        facts["spread_ms"] = {what: [one["low"], one["high"]] for what, one in spread.items()}
        if plan is not None and variant == TILED:
            untiled = builds[mix.name][f"{kind}_ms"]["unet"]
            where = target.hardware(recipe.threads)
            facts["tiling"] = tiling_facts(plan, kind, where, ms["unet"], untiled, work.compiled)
        sheet.append(pictures)
    _describe(target, place, work, builds, sheet, blocks)


def prove_tiles(
    whole: Build, tiled: Call, tokens: Sequence[np.ndarray], wanted: Sequence[np.ndarray], recipe: ExportRecipe
) -> dict[str, Any]:
    """How near pictures that are decoded in tiles come to the whole decoder's. Raises ParityError for one that misses its gate."""
    assert recipe.decoder is not None
    drawn = Build({**whole.calls, "vae_decoder": tiled}, whole.scheduler, whole.shape).pictures(
        tokens, range(len(tokens))
    )
    found = parity.picture_parity(wanted, drawn)
    least = recipe.gates.decoder_psnr_db
    if found["psnr_db"] < least:
        raise ParityError(
            f"decoding in tiles of {recipe.decoder.tile} latents changes the pictures: {found['psnr_db']:.1f} dB, {least:g} wanted",
            where="vae_decoder",
            remedy="Choose a larger export.decoder.tile, a larger overlap (up to the tile less one), or leave export.decoder out",
        )
    return {**recipe.decoder.model_dump(), **found}


def arrays_of(graphs: Sequence[Graph]) -> dict[str, dict[str, np.ndarray]]:
    """The example inputs of each graph."""
    return {graph.name: {name: tensor.numpy() for name, tensor in graph.inputs.items()} for graph in graphs}


def _lower(
    target: EdgeTarget, precisions: dict[str, str], place: Path, work: Work, variant: str = ""
) -> dict[str, str]:
    """Write the files of one build, those that are not there yet; returns graph to file name."""
    names: dict[str, str] = {}
    for graph in work.graphs:
        source = _source(work, graph, variant)
        precision = precisions[graph.name]
        name = f"{source.onnx.stem}{'' if precision == 'fp32' else f'.{precision}'}{target.suffix_of(graph.name)}"
        names[graph.name] = name
        if not (place / name).exists():
            with refusals(target.name, graph.name, precision):
                target.lower(source, precision, place / name)
    return names


def _source(work: Work, graph: Graph, variant: str) -> Source:
    origin = SOURCE if graph.name == "unet" and variant == TILED else f"{graph.name}.onnx"
    return Source(graph, work.sources / origin, work.calibration[graph.name], work.keep, work.plan)


def _prove(
    target: EdgeTarget,
    name: str,
    precisions: dict[str, str],
    build: Build,
    pictures: Sequence[np.ndarray],
    work: Work,
    clip: Clip | None,
    inside: dict[str, Any],
) -> dict[str, Any]:
    proof = {
        "graph_snr_db": parity.graph_parity(work.reference.calls, build.calls, arrays_of(work.graphs)),
        **parity.picture_parity(work.wanted, pictures),
        **inside,
    }
    if clip is not None:
        proof["judge"] = {
            "pytorch": scores(clip, work.prompts, work.wanted),
            "build": scores(clip, work.prompts, pictures),
        }
    gates, tiled = work.recipe.gates, work.decoder_tiles is not None
    missed = parity.failures(precisions, proof, pictures, gates, tiled)
    ends, missed_there = prove_ends(build, work.tokens, work.ends, precisions, gates, tiled)
    proof |= ends
    missed += missed_there
    if missed:
        raise ParityError(
            f"the {name} build is too far from full precision: {'; '.join(missed)}",
            where=target.name,
            remedy="Loosen export.gates or leave the precision out of export.precisions",
        )
    return proof


def _blocks(target: EdgeTarget, path: Path, work: Work, blocks: dict[str, str]) -> dict[str, float] | None:
    """Each UNet block's SNR against the float32 ONNX file; None where the target shows no tensors."""
    row, names, threads = arrays_of(work.graphs)["unet"], list(blocks.values()), work.recipe.threads
    inside = target.tensors(path, names, row, threads)
    # Only now, for a full-size UNet is not opened for nothing.
    plain = find_target("onnx").tensors(work.sources / "unet.onnx", names, row, threads) if inside else {}
    return block_snr_db(blocks, plain, inside)


def _describe(
    target: EdgeTarget,
    place: Path,
    work: Work,
    builds: dict[str, Any],
    sheet: list[list[np.ndarray]],
    blocks: dict[str, str],
) -> None:
    """Tokenizer, references, sample, card, digests and bundle.json beside the builds."""
    from PIL import Image

    recipe, tokenizer = work.recipe, work.pipeline.tokenizer
    Image.fromarray(contact_sheet([row[:SHOWN] for row in sheet])).save(place / "parity.png")
    tokenizer.save_pretrained(place / "tokenizer")
    write_reference(place, work.reference.calls, arrays_of(work.graphs), work.tokens, work.wanted, work.ends)
    write_sample(place, target.sample or target.name)
    facts = {
        "target": target.name,
        **({} if target.device in ("", "CPU") else {"device": target.device}),
        "runtime": target.runtime(),
        "measured_on": target.hardware(recipe.threads),
        "steps": recipe.steps,
        "latent_shape": list(work.reference.shape),
        "scheduler": work.reference.scheduler,
        "noise": GENERATOR,
        "tokenizer": {"length": tokenizer.model_max_length, "pad": tokenizer.pad_token_id},
        "prompts": list(work.prompts),
        "student": provenance(work.student, recipe.sources),
        "made_with": work.made_with[target.name],
        "keep": target.kept(work.keep),
        "gates": recipe.gates.model_dump(),
        "pytorch_fp32_ms": work.torch_ms,
        "tiling": None if work.plan is None else {"profile": work.plan.profile, "blocks_planned": len(work.plan.tiled)},
        "decoder_tiles": work.decoder_tiles,
        **({} if work.vae is None else {"vae": work.vae}),
        "unet_blocks": blocks,
        "builds": builds,
        "files": {
            str(f.relative_to(place)): digest_file(f)
            for f in sorted(place.rglob("*"))
            if f.is_file() and f.name != BUNDLE
        },
    }
    write_card(place, facts)
    facts["files"][CARD] = digest_file(place / CARD)
    (place / BUNDLE).write_text(json.dumps(facts, indent=2) + "\n")
    write_sums(place)
