"""From a student folder to proven builds: a folder per target with its model files, tokenizer and `bundle.json`.

A build that misses a gate is not called built: the folder keeps no bundle.json and the error says by how much.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cluster.errors import CorruptShard, EdgeFusionError, LedgerConflict
from cluster.storage import publish_folder, sweep_dead
from export import parity
from export.build import Work, arrays_of, build_target, prove_tiles
from export.ends import draw_ends
from export.graph import decoder_graph, graphs_of, to_onnx
from export.guidance import spread_scales
from export.profile import load_profile
from export.proof import BUNDLE, broken_files, check_bundle
from export.recipe import ExportRecipe, Target
from export.runtime import GRAPHS, Build, scheduler_constants
from export.sensitivity import keep_of, scan
from export.student import check_parts, guidance_of, open_student
from export.targets.judge import compile_plan
from export.targets.registry import find_target, target_of
from export.tiled_build import lower_tiled, plan_unet
from export.vae import open_decoder, vae_facts
from factory.models import fresh_fingerprint
from trainer.identity import Identity, defaults_of

Progress = Callable[[str], None]
LOWERED = ".graphs"
"""Folder of the float32 ONNX files while an export goes on."""
_IDLE = ("targets", "threads", "latency_runs", "pages", "sources", "allow_pickle")
"""Keys of an ExportRecipe that decide nothing of a target's builds."""


def export_student(
    student: Path, prompts: Sequence[str], recipe: ExportRecipe, folder: Path, progress: Progress = lambda what: None
) -> None:
    """Write `folder/TARGET` for every target of the recipe; a target with a bundle.json is finished and left alone.

    Raises LedgerConflict for a finished one of another student or recipe.
    """
    for name in get_args(Target):  # a killed export may have had more targets
        sweep_dead(folder / name)
    check_parts(student, recipe.allow_pickle)
    for name in recipe.targets:
        _refuse_another(folder / name, identity_of(student, prompts, recipe, name))
    todo: list[Target] = [target for target in recipe.targets if not (folder / target / BUNDLE).exists()]
    if not todo:
        return
    for name in todo:
        find_target(name, recipe.openvino_device).require()
    import torch

    torch.set_num_threads(recipe.threads)
    pipeline = open_student(student, recipe)
    own_vae = pipeline.vae
    if recipe.vae is not None:
        pipeline.vae = open_decoder(recipe.vae, pipeline, recipe.allow_pickle)
    guidance = guidance_of(pipeline, recipe)
    graphs = graphs_of(pipeline, recipe.size_px, recipe.batch_images, guidance)
    lines = [prompts[i % len(prompts)] for i in range(recipe.calibration_prompts + recipe.parity_prompts)]
    tokens = _tokenize(pipeline, lines)
    reference = Build(
        parity.torch_calls(graphs),
        scheduler_constants(pipeline, recipe.steps, guidance),
        tuple(graphs[1].inputs["latent"].shape),
    )
    calibration = _calibrate(reference, tokens[: recipe.calibration_prompts])
    judged = tokens[recipe.calibration_prompts :]
    wanted = reference.pictures(judged, range(len(judged)))
    ends = draw_ends(reference, judged)
    vae = None if recipe.vae is None else vae_facts(recipe.vae, own_vae, reference, judged, wanted)
    tiles = None
    if recipe.decoder is not None:
        cut = (recipe.decoder.tile, recipe.decoder.overlap)
        graphs[2] = decoder_graph(pipeline.vae, graphs[2].inputs["latent"], cut)
        tiles = prove_tiles(reference, parity.torch_calls(graphs)["vae_decoder"], judged, wanted, recipe)
        reference = Build(parity.torch_calls(graphs), reference.scheduler, reference.shape)
    sources = folder / LOWERED / _mark_of(student, recipe)
    for graph in graphs:
        if not (sources / f"{graph.name}.onnx").exists():
            progress(f"lowering {graph.name}")
            to_onnx(graph, sources / f"{graph.name}.onnx")
    plan, compiled = None, None
    if recipe.tiling is not None:
        side, length = reference.shape[-1], pipeline.tokenizer.model_max_length
        plan = plan_unet(pipeline.unet, side, recipe.tiling.profile, length)
        if recipe.tiling.compile:
            compiled = compile_plan(plan.tiled, load_profile(recipe.tiling.profile))
        if plan.tiled:
            progress("lowering the tiled unet")
            lower_tiled(graphs[1], plan, sources)
    keep = keep_of(recipe, sources, calibration, reference, tokens[: recipe.calibration_prompts], progress)
    torch_ms = parity.medians(parity.latency_spread_ms(reference, judged[0], arrays_of(graphs), recipe.latency_runs))
    work = Work(
        pipeline=pipeline,
        graphs=graphs,
        sources=sources,
        reference=reference,
        calibration=calibration,
        tokens=judged,
        prompts=lines[recipe.calibration_prompts :],
        wanted=wanted,
        ends=ends,
        torch_ms=torch_ms,
        recipe=recipe,
        plan=plan,
        compiled=compiled,
        decoder_tiles=tiles,
        vae=vae,
        keep=keep,
        student=student,
        made_with={name: identity_of(student, prompts, recipe, name).facts for name in todo},
    )
    for name in todo:
        progress(f"building {name}")
        target = find_target(name, recipe.openvino_device)
        publish_folder(folder / name, lambda place, target=target: build_target(target, place, work))
    shutil.rmtree(folder / LOWERED)


def identity_of(student: Path, prompts: Sequence[str], recipe: ExportRecipe, target: Target) -> Identity:
    """What makes a target's bundle this one's: the student, the prompts, and what of the recipe decides that target's builds."""
    told = recipe.model_dump(mode="json", exclude={*_IDLE, *(() if target == "openvino" else ("openvino_device",))})
    told["precisions"] = [mix.model_dump(mode="json") for mix in recipe.builds(target)]
    told["vae"] = None if recipe.vae is None else fresh_fingerprint(recipe.vae)
    words = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    facts = {"student": fresh_fingerprint(str(student)), "prompts": words, "export": told}
    return Identity(facts, defaults_of(recipe, "export."))


def _refuse_another(place: Path, wanted: Identity) -> None:
    """A finished bundle must not be taken for one that was asked for and never built."""
    if not (place / BUNDLE).exists():
        return
    then = read_bundle(place).get("made_with")  # bundles of older versions do not say
    if then is not None and (found := wanted.changes(then)):
        raise LedgerConflict(
            f"holds a bundle of another student or recipe: {'; '.join(found)}",
            where=str(place),
            remedy="Choose another --out folder, or delete that one to build it anew",
        )


def _mark_of(student: Path, recipe: ExportRecipe) -> str:
    """What the lowered graphs hang on: those that an interrupted export left are used again for the very same ones only."""
    told = {"guidance_scale", "guidance_range", "decoder", "tiling", "size_px", "batch_images"}
    keys = recipe.model_dump(mode="json", include=told)
    vae = None if recipe.vae is None else fresh_fingerprint(recipe.vae)
    return hashlib.sha256(
        json.dumps([fresh_fingerprint(str(student)), vae, keys], sort_keys=True).encode()
    ).hexdigest()[:16]


def scan_student(
    student: Path,
    prompts: Sequence[str],
    recipe: ExportRecipe,
    by: str,
    precision: str,
    count: int,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """`sensitivity.scan` of a student folder's UNet, judged by `count` pictures of other seeds than those that calibrate."""
    import torch

    torch.set_num_threads(recipe.threads)
    pipeline = open_student(student, recipe)
    if recipe.vae is not None:
        pipeline.vae = open_decoder(recipe.vae, pipeline, recipe.allow_pickle)
    guidance = guidance_of(pipeline, recipe)
    graphs = graphs_of(pipeline, recipe.size_px, recipe.batch_images, guidance)
    tokens = _tokenize(pipeline, [prompts[i % len(prompts)] for i in range(max(count, recipe.calibration_prompts))])
    shape = tuple(graphs[1].inputs["latent"].shape)
    reference = Build(parity.torch_calls(graphs), scheduler_constants(pipeline, recipe.steps, guidance), shape)
    calibration = _calibrate(reference, tokens[: recipe.calibration_prompts])
    with tempfile.TemporaryDirectory() as place:
        progress("lowering unet")
        source = Path(place) / "unet.onnx"
        to_onnx(graphs[1], source)
        return scan(source, calibration["unet"], reference, tokens[:count], recipe.keep_budget, by, precision, progress)


def open_bundle(folder: Path, precision: str, threads: int = 2) -> tuple[Build, dict[str, Any]]:
    """A build of a finished bundle and its bundle.json, after checking every digest. Raises CorruptShard."""
    facts = read_bundle(folder)
    if precision not in facts["builds"]:
        raise EdgeFusionError(
            f"there is no {precision} build", where=str(folder), remedy=f"There are {', '.join(facts['builds'])}"
        )
    if broken := broken_files(folder):
        raise CorruptShard("; ".join(broken), where=str(folder), remedy="Export again")
    calls = target_of(facts).open(folder, facts["builds"][precision]["graphs"], threads)
    return Build(calls, facts["scheduler"], facts["latent_shape"]), facts


def read_bundle(folder: Path) -> dict[str, Any]:
    """bundle.json; raises EdgeFusionError if the folder is no finished bundle."""
    check_bundle(folder)
    try:
        return json.loads((folder / BUNDLE).read_text())
    except (OSError, ValueError) as error:
        raise EdgeFusionError(
            "is no finished bundle", where=str(folder), remedy="Run edgefusion run or export first"
        ) from error


def _calibrate(reference: Build, tokens: Sequence[np.ndarray]) -> dict[str, list[dict[str, np.ndarray]]]:
    """What each graph is shown while PyTorch draws `tokens` in the few steps of the build; seeds from 1000. Where guidance is an input the
    prompts share the range evenly, so that integers hold at both ends."""
    found: dict[str, list[dict[str, np.ndarray]]] = {graph: [] for graph in GRAPHS}
    scales = spread_scales(reference.scheduler, len(tokens))
    for i, (row, scale) in enumerate(zip(tokens, scales, strict=True)):
        found["text_encoder"].append({"input_ids": np.repeat(row, reference.shape[0], axis=0)})
        found["vae_decoder"].append({"latent": reference.at(scale).denoise(row, 1000 + i, found["unet"].append)})
    return found


def _tokenize(pipeline: Any, prompts: Sequence[str]) -> list[np.ndarray]:
    tokenizer = pipeline.tokenizer
    rows = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length)[
        "input_ids"
    ]
    return [np.array([row], dtype=np.int64) for row in rows]
