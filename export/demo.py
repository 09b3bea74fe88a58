"""A static folder that draws pictures in a visitor's browser from one ONNX build; any plain web server serves it, without the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError
from cluster.storage import digest_file, publish_folder
from export import ort_web
from export.bundle import open_bundle, read_bundle
from export.onnx_file import weights_beside
from export.runtime import GRAPHS
from export.words import tokenize

_WEB = Path(__file__).parent / "web"
_STYLE = Path(__file__).parent.parent / "cluster" / "page.css"
_SHOWN = 4
"""Pictures that the page draws again to compare itself with Python."""


def write_demo(bundle: Path, out: Path, precision: str = "fp32", tarball: Path | None = None) -> None:
    """Write the folder `out`. Raises EdgeFusionError for another target's bundle, TargetUnavailable without onnxruntime-web."""
    if read_bundle(bundle)["target"] != "onnx":
        raise EdgeFusionError(
            f"holds {read_bundle(bundle)['target']} builds, and browsers run ONNX",
            where=str(bundle),
            remedy="Export with target onnx and give that bundle",
        )
    graphs = read_bundle(bundle)["builds"].get(precision, {}).get("graphs", {})  # open_bundle tells an unknown build
    if large := [name for name in graphs.values() if weights_beside(bundle / name).exists()]:
        raise EdgeFusionError(
            f"{large[0]} has more than 2 GiB of weights, which no browser takes",
            where=str(bundle),
            remedy="Choose a smaller build: --precision w8 or fp16",
        )
    if out.is_file():
        raise EdgeFusionError("is a file", where=str(out), remedy="Give the name of a folder: --out demo")
    if out.exists() and any(out.iterdir()) and not (out / "demo.json").exists():
        raise EdgeFusionError("is not empty and holds no demo", where=str(out), remedy="Choose another --out folder")
    publish_folder(out, lambda place: _fill(place, bundle, precision, tarball))


def _fill(place: Path, bundle: Path, precision: str, tarball: Path | None) -> None:
    from PIL import Image

    ort_web.copy_ort_web(place / "ort", tarball)
    build, facts = open_bundle(bundle, precision)
    shutil.copytree(_WEB, place, dirs_exist_ok=True)
    shutil.copyfile(_STYLE, place / "page.css")
    tokenizer = _tokenizer_facts(bundle, facts)
    shutil.copytree(bundle / "tokenizer", place / "tokenizer")
    (place / "models").mkdir()
    models: dict[str, Any] = {}
    for graph in GRAPHS:
        name = facts["builds"][precision]["graphs"][graph]
        copy = place / "models" / name
        shutil.copyfile(bundle / name, copy)
        models[graph] = {"file": f"models/{name}", "bytes": copy.stat().st_size, "sha256": digest_file(copy)}
    (place / "reference").mkdir()
    references: list[dict[str, Any]] = []
    for seed, prompt in enumerate(facts["prompts"][:_SHOWN]):
        file = f"reference/{seed}.png"
        Image.fromarray(build.picture(tokenize(bundle, facts["tokenizer"], [prompt])[0], seed)).save(place / file)
        references.append({"prompt": prompt, "seed": seed, "file": file})
    told = {key: facts[key] for key in ("latent_shape", "scheduler", "noise")}
    library = {"version": ort_web.VERSION, "licence": ort_web.LICENCE}
    page = {
        **told,
        "build": precision,
        "tokenizer": tokenizer,
        "prompts": list(dict.fromkeys(facts["prompts"])),
        "models": models,
        "references": references,
        "onnxruntime_web": library,
    }
    (place / "demo.json").write_text(json.dumps(page, indent=2) + "\n")
    (place / "LICENCES.txt").write_text(ort_web.LICENCE_TEXT)


def _tokenizer_facts(bundle: Path, facts: dict[str, Any]) -> dict[str, int]:
    """Length and the ids of start, end and filling. Raises EdgeFusionError for what tokenizer.js does not speak."""
    path = bundle / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))
    pieces = json.dumps([model.get("normalizer"), model.get("pre_tokenizer")])
    if model["model"].get("end_of_word_suffix") != "</w>" or "Lowercase" not in pieces or "startoftext" not in pieces:
        raise EdgeFusionError(
            "is not CLIP's byte-pair encoding, the only one that the page speaks",
            where=str(path),
            remedy="Export a student with a CLIP text encoder",
        )
    row = tokenize(bundle, facts["tokenizer"], [""])[0][0]
    return {**facts["tokenizer"], "start": int(row[0]), "end": int(row[1])}
