"""The five data sets of the paper in miniature, each made once below OUT/data by the factory's own steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from cluster.errors import StageError
from cluster.runner import InProcess
from cluster.storage import publish_bytes
from factory.make import make, select_and_pack
from factory.models import resolve
from factory.pack import MANIFEST, Sample, pack, read_manifest, read_shard
from factory.plan import PLAN, make_plan, resolve_models
from factory.pocket.evalset import read_evalset
from factory.stages import encode_picture
from trainer.reproduce.recipe import TablesRecipe

FUNNEL = "funnel.json"
Say = Callable[[str], object]


def ensure_data(recipe: TablesRecipe, name: str, out: Path, say: Say) -> Path:
    """The packed data set `name`, made now if it is not there; goes on where it was interrupted."""
    folder = out / "data" / name
    if (folder / MANIFEST).exists() and (folder / FUNNEL).exists():
        return folder
    say(f"data: {name}")
    if name == "synt-cur":
        funnel = _curate(ensure_data(recipe, "synt", out, say), folder, recipe.curated_share)
    else:
        part = recipe.factory_of(name)
        resolve_models(part.factory)
        if not (folder / PLAN).exists():
            make_plan(part.factory, part.seed, folder, lambda n: None)
        make(part.factory, folder, InProcess())
        funnel = select_and_pack(part.factory, folder)
    publish_bytes(folder / FUNNEL, (json.dumps(funnel, indent=2) + "\n").encode())
    if not read_manifest(folder):
        raise StageError(f"nothing of {name} was kept", where=str(folder), remedy="Take in or plan more pictures")
    return folder


def _curate(synt: Path, folder: Path, share: float) -> dict[str, object]:
    """The stand-in for the paper's people: the top `share` of synt by the filter CLIP's score, ties by id. The judge has no say."""
    samples: list[Sample] = []
    for shard in sorted({row["shard"] for row in read_manifest(synt)}):
        for key, members in read_shard(synt / shard):
            kind = next(kind for kind in members if kind not in ("json", "txt"))
            facts = json.loads(members["json"])
            samples.append(Sample(key, members[kind], kind, members["txt"].decode(), facts))
    samples.sort(key=lambda sample: (-sample.facts["clip_score"], sample.id))
    kept = samples[: max(1, round(share * len(samples)))]
    pack(kept, folder)
    return {
        "planned": len(samples),
        "kept": len(kept),
        "rejected": len(samples) - len(kept),
        "dead": 0,
        "reasons": {"rejected: not in the top share of the filter CLIP": len(samples) - len(kept)},
    }


def ensure_evaluation(recipe: TablesRecipe, out: Path) -> Path:
    """The zoo's evaluation set as a packed data set: captions to draw, real pictures to compare with."""
    folder = out / "data" / f"evaluation-{recipe.evaluation}"
    if not (folder / MANIFEST).exists():
        resolve("zoo:evalset.parquet")
        pack(
            [
                Sample(
                    hashlib.sha256(f"evaluation/{i}".encode()).hexdigest(),
                    encode_picture(shown.picture, "png"),
                    "png",
                    shown.caption,
                    {"attributes": shown.record},
                )
                for i, shown in enumerate(read_evalset(recipe.evaluation))
            ],
            folder,
        )
    return folder
