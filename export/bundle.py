"""From a student folder to proven builds: a folder per target with its model files, tokenizer and `bundle.json`.

A build that misses a gate is not called built: the folder keeps no bundle.json and the error says by how much.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import CorruptShard, EdgeFusionError, ParityError
from cluster.storage import digest_file, publish_folder
from export import parity
from export.card import CARD, provenance, write_card
from export.clip_gate import scores
from export.graph import Graph, graphs_of, to_onnx
from export.noise import GENERATOR
from export.profile import load_profile
from export.proof import BUNDLE, broken_files, write_reference, write_sample, write_sums
from export.quantise import quantise_onnx
from export.quantise_openvino import quantise_openvino
from export.recipe import ExportRecipe, Target
from export.runtime import GRAPHS, OPENERS, Build, scheduler_constants, times_kind
from export.sensitivity import keep_of, scan
from export.solve import Plan
from export.targets.judge import compile_plan
from export.tiled_build import SOURCE, TILED, lower_tiled, plan_unet, tiling_facts
from export.tiling import check_tiles
from factory.models.clip import Clip
from trainer.guidance import fix_guidance, takes_guidance
from trainer.models import open_pipeline
from trainer.sample import contact_sheet

_SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}

Progress = Callable[[str], None]


def export_student(
    student: Path, prompts: Sequence[str], recipe: ExportRecipe, folder: Path, progress: Progress = lambda what: None
) -> None:
    """Write `folder/TARGET` for every target of the recipe; a target with a bundle.json is finished and left alone."""
    todo: list[Target] = [target for target in recipe.targets if not (folder / target / BUNDLE).exists()]
    if not todo:
        return
    import torch

    torch.set_num_threads(recipe.threads)
    pipeline = _open_student(student, recipe)
    graphs = graphs_of(pipeline)
    lines = [prompts[i % len(prompts)] for i in range(recipe.calibration_prompts + recipe.parity_prompts)]
    tokens = _tokenize(pipeline, lines)
    reference = Build(
        parity.torch_calls(graphs),
        scheduler_constants(pipeline, recipe.steps),
        tuple(graphs[1].inputs["latent"].shape),
    )
    calibration = _calibrate(reference, tokens[: recipe.calibration_prompts])
    judged = tokens[recipe.calibration_prompts :]
    wanted = [reference.picture(row, i) for i, row in enumerate(judged)]
    sources = folder / ".graphs"
    for graph in graphs:
        if not (sources / f"{graph.name}.onnx").exists():
            progress(f"lowering {graph.name}")
            to_onnx(graph, sources / f"{graph.name}.onnx")
    plan, compiled = None, None
    if recipe.tiling is not None:
        plan = plan_unet(pipeline.unet, recipe.tiling.profile, pipeline.tokenizer.model_max_length)
        if recipe.tiling.compile:
            compiled = compile_plan(plan, load_profile(recipe.tiling.profile))
        if plan.tiled:
            progress("lowering the tiled unet")
            lower_tiled(graphs[1], plan, sources)
    keep = keep_of(recipe, sources, calibration, reference, tokens[: recipe.calibration_prompts], progress)
    torch_ms = parity.latency_ms(reference, judged[0], _arrays(graphs), recipe.latency_runs)
    for target in todo:
        progress(f"building {target}")
        publish_folder(
            folder / target,
            lambda place, target=target: _build_target(
                target,
                place,
                sources,
                pipeline,
                graphs,
                reference,
                calibration,
                judged,
                lines[recipe.calibration_prompts :],
                wanted,
                torch_ms,
                recipe,
                plan,
                compiled,
                keep,
                student,
            ),
        )
    shutil.rmtree(sources)


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
    pipeline = _open_student(student, recipe)
    graphs = graphs_of(pipeline)
    tokens = _tokenize(pipeline, [prompts[i % len(prompts)] for i in range(max(count, recipe.calibration_prompts))])
    shape = tuple(graphs[1].inputs["latent"].shape)
    reference = Build(parity.torch_calls(graphs), scheduler_constants(pipeline, recipe.steps), shape)
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
    calls = OPENERS[facts["target"]](folder, facts["builds"][precision]["graphs"], threads)
    return Build(calls, facts["scheduler"], facts["latent_shape"]), facts


def read_bundle(folder: Path) -> dict[str, Any]:
    """bundle.json; raises EdgeFusionError if the folder is no finished bundle."""
    try:
        return json.loads((folder / BUNDLE).read_text())
    except (OSError, ValueError) as error:
        raise EdgeFusionError(
            "is no finished bundle", where=str(folder), remedy="Run edgefusion run or export first"
        ) from error


def _open_student(student: Path, recipe: ExportRecipe) -> Any:
    """The pipeline; a guidance input of its UNet is fixed at the recipe's scale. Raises EdgeFusionError if that says none."""
    pipeline = open_pipeline(str(student))
    if takes_guidance(pipeline.unet):
        if recipe.guidance_scale is None:
            raise EdgeFusionError(
                "the student takes guidance as an input, and a build has it fixed",
                where=str(student),
                remedy="Set export.guidance_scale to a scale that it was trained for (w + 1)",
            )
        pipeline.unet = fix_guidance(pipeline.unet, recipe.guidance_scale - 1)
    return pipeline


def _calibrate(reference: Build, tokens: Sequence[np.ndarray]) -> dict[str, list[dict[str, np.ndarray]]]:
    """What each graph is shown while PyTorch draws `tokens` in the few steps of the build; seeds from 1000."""
    found: dict[str, list[dict[str, np.ndarray]]] = {graph: [] for graph in GRAPHS}
    for i, row in enumerate(tokens):
        found["text_encoder"].append({"input_ids": row})
        found["vae_decoder"].append({"latent": reference.denoise(row, 1000 + i, found["unet"].append)})
    return found


def _build_target(
    target: Target,
    place: Path,
    sources: Path,
    pipeline: Any,
    graphs: Sequence[Graph],
    reference: Build,
    calibration: dict[str, list[dict[str, np.ndarray]]],
    judged: Sequence[np.ndarray],
    prompts: Sequence[str],
    wanted: Sequence[np.ndarray],
    torch_ms: dict[str, float],
    recipe: ExportRecipe,
    plan: Plan | None,
    compiled: dict[str, Any] | None,
    keep: Sequence[str],
    student: Path,
) -> None:
    """Fill `place` with the builds of one target, prove each, and write bundle.json last."""
    builds: dict[str, Any] = {}
    sheet = [list(wanted)]
    # A plan that leaves every block untiled would only repeat the untiled builds.
    variants = [""] if plan is None or not plan.tiled else ["", TILED]
    clip = None if recipe.gates.judge is None else Clip(recipe.gates.judge)
    for mix, variant in [(mix, variant) for mix in recipe.builds(target) for variant in variants]:
        precision, precisions = mix.name, mix.graphs()
        names = _lower(target, precisions, place, sources, calibration, keep, variant)
        if plan is not None and variant == TILED:
            check_tiles(place / names["unet"], plan)
        build = Build(OPENERS[target](place, names, recipe.threads), reference.scheduler, reference.shape)
        pictures = [build.picture(row, i) for i, row in enumerate(judged)]
        proof = {
            "graph_snr_db": parity.graph_parity(reference.calls, build.calls, _arrays(graphs)),
            **parity.picture_parity(wanted, pictures),
        }
        if clip is not None:
            proof["judge"] = {"pytorch": scores(clip, prompts, wanted), "build": scores(clip, prompts, pictures)}
        missed = parity.failures(precisions, proof, pictures, recipe.gates)
        if missed:
            raise ParityError(
                f"the {precision}{variant} build is too far from full precision: {'; '.join(missed)}",
                where=f"{target}",
                remedy="Loosen export.gates or leave the precision out of export.precisions",
            )
        builds[precision + variant] = {
            "graphs": names,
            "precisions": precisions,
            "bytes": {graph: _size(place / name) for graph, name in names.items()},
            "parity": proof,
            "measured_ms": None,
            "emulated_ms": None,
        }
        ms = parity.latency_ms(build, judged[0], _arrays(graphs), recipe.latency_runs)
        builds[precision + variant][f"{times_kind(target, precisions)}_ms"] = ms
        if plan is not None and variant == TILED:
            kind = f"{times_kind(target, precisions)}_ms"
            tiled_ms, untiled_ms = (builds[name][kind]["unet"] for name in (precision + TILED, precision))
            builds[precision + TILED]["tiling"] = tiling_facts(plan, tiled_ms, untiled_ms, compiled)
        sheet.append(pictures)
    from PIL import Image

    Image.fromarray(contact_sheet(sheet)).save(place / "parity.png")
    pipeline.tokenizer.save_pretrained(place / "tokenizer")
    write_reference(place, reference.calls, _arrays(graphs), judged, wanted)
    write_sample(place, target)
    facts = {
        "target": target,
        "runtime": f"{'onnxruntime' if target == 'onnx' else 'openvino'} {metadata.version('onnxruntime' if target == 'onnx' else 'openvino')}",
        "measured_on": f"{platform.machine()} CPU, {recipe.threads} threads",
        "steps": recipe.steps,
        "latent_shape": list(reference.shape),
        "scheduler": reference.scheduler,
        "noise": GENERATOR,
        "tokenizer": {"length": pipeline.tokenizer.model_max_length, "pad": pipeline.tokenizer.pad_token_id},
        "prompts": list(prompts),
        "student": provenance(student, recipe.sources),
        "keep": list(keep),
        "gates": recipe.gates.model_dump(),
        "pytorch_fp32_ms": torch_ms,
        "tiling": None if plan is None else {"profile": plan.profile, "blocks_tiled": len(plan.tiled)},
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


def _lower(
    target: Target,
    precisions: dict[str, str],
    place: Path,
    sources: Path,
    calibration: dict[str, list[dict[str, np.ndarray]]],
    keep: Sequence[str],
    variant: str = "",
) -> dict[str, str]:
    """Write the files of one build, those that are not there yet; returns graph to file name."""
    origins = {graph: f"{graph}.onnx" for graph in GRAPHS}
    if variant == TILED:
        origins["unet"] = SOURCE
    names: dict[str, str] = {}
    for graph, origin in origins.items():
        precision = precisions[graph]
        names[graph] = f"{Path(origin).stem}{'' if precision == 'fp32' else f'.{precision}'}{_SUFFIX[target]}"
        if (place / names[graph]).exists():
            continue
        rows, source, path = calibration[graph], sources / origin, place / names[graph]
        if target == "openvino":
            quantise_openvino(source, path, precision, rows, keep)
        elif precision == "fp32":
            shutil.copyfile(source, path)
        else:
            quantise_onnx(source, path, precision, rows, keep)
    return names


def _size(path: Path) -> int:
    """Bytes of a graph, an OpenVINO weights file included."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def _arrays(graphs: Sequence[Graph]) -> dict[str, dict[str, np.ndarray]]:
    return {graph.name: {name: tensor.numpy() for name, tensor in graph.inputs.items()} for graph in graphs}


def _tokenize(pipeline: Any, prompts: Sequence[str]) -> list[np.ndarray]:
    tokenizer = pipeline.tokenizer
    rows = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length)[
        "input_ids"
    ]
    return [np.array([row], dtype=np.int64) for row in rows]
