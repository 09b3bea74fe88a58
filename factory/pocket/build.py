"""Rebuild the zoo from public packages, one resumable model at a time."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from cluster.errors import EdgeFusionError
from cluster.storage import digest_file, publish_bytes, publish_folder
from factory.pack import MANIFEST, Sample, pack
from factory.pocket.captioner import train_captioner
from factory.pocket.clip import FILTER, JUDGE, filter_tower, train_clip
from factory.pocket.evalset import EVALSET, write_evalset
from factory.pocket.grammar import sentence
from factory.pocket.people import train_people
from factory.pocket.sharpen import train_decoder
from factory.pocket.teacher import STYLES, train_teacher
from factory.pocket.vae import train_vae
from factory.pocket.wild import write_wild
from factory.pocket.world import BACKGROUNDS, compose, describe, render_world
from factory.pocket.writer import train_writer
from factory.stages import encode_picture

PACKAGES = {
    "fluent-emoji-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "emojibase-data": "emojibase-data@17.0.0",
}


def fetch_packages(folder: Path) -> Path:
    """Fetch and unpack the four picture and name packages with `npm pack`; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if (folder / name).exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            packed = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=scratch, check=True, capture_output=True, text=True
            )
            with tarfile.open(Path(scratch) / packed.stdout.strip().splitlines()[-1]) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "package").rename(folder / name)
    return folder


WILD = "wild.parquet"
MODELS = ("wild", "evalset", "vae", "clip", "judge", "captioner", "writer", "teacher", "people", "decoder")


CAN_GO_ON = ("captioner", "teacher")
"""What can be trained further from its finished weights."""


def build(model: str, zoo: Path, steps: int, warm: bool = False) -> None:
    """Train `model` up to optimiser step `steps` below `zoo`, from its checkpoint if there is one.

    Without a checkpoint, `warm` begins with the finished model that lies there (see `unpack`). Raises EdgeFusionError.
    """
    if warm and model not in CAN_GO_ON:
        raise EdgeFusionError(
            f"the zoo's {model} cannot go on from finished weights, only {' and '.join(CAN_GO_ON)} can",
            remedy="Leave --go-on out",
        )
    pairs, pixels = render_world(fetch_packages(zoo / "packages"), zoo / "world.npz")
    if model == "vae":
        train_vae(pairs, pixels, zoo / "vae", steps=steps)
    elif model == "clip":
        train_clip(pairs, pixels, zoo / "clip", FILTER, steps=steps)
    elif model == "wild":
        write_wild(pairs, pixels, zoo / "packages", zoo / WILD)
    elif model == "evalset":
        write_evalset(pairs, pixels, zoo / EVALSET)
    elif model == "judge":
        train_clip(pairs, pixels, zoo / "judge", JUDGE, steps=steps)
    elif model == "captioner":
        train_captioner(pairs, pixels, zoo, steps=steps, warm=warm)
    elif model == "writer":
        train_writer(pairs, zoo / "writer", steps=steps)
    elif model == "teacher":
        train_teacher(pairs, pixels, zoo, steps=steps, warm=warm)
    elif model == "people":
        train_people(pairs, pixels, zoo, steps=steps)
    elif model == "decoder":
        train_decoder(pairs, pixels, zoo, steps=steps)
    else:
        raise ValueError(f"no model of the zoo is called {model!r}")


def pack_world(zoo: Path) -> Path:
    """The pictures the teacher learns from, each on all backgrounds, as a packed data set: what the zoo's students train on."""
    folder = zoo / "world-shards"
    if (folder / MANIFEST).exists():
        return folder
    pairs, pixels = render_world(fetch_packages(zoo / "packages"), zoo / "world.npz")
    rng, words = np.random.default_rng(11), random.Random(11)
    samples = []
    for row, (concept, style) in enumerate(pairs):
        if style not in STYLES or not concept.is_drawn or concept.held_out:
            continue
        for ground in BACKGROUNDS:
            record = describe(concept, style, ground)
            key = hashlib.sha256(f"{concept.key}/{style}/{ground}".encode()).hexdigest()
            picture = encode_picture(compose(pixels[row], ground, rng), "png")
            samples.append(Sample(key, picture, "png", sentence(record, words), {"attributes": record}))
    pack(samples, folder, 2000)
    return folder


SHIPPED = {
    "clip": "clip/model",
    "judge": "judge/model",
    "captioner": "captioner/model",
    "writer": "writer/model",
    "teacher": "people/model",
    "student-fewstep": "student-fewstep",
}
"""Name in the zoo to the finished folder below the building place."""

PARTS = {"vae/model": "teacher/vae", "teacher/model": "teacher"}
"""Finished folder below the building place to where the zoo holds the same weights, or what came of them."""

DIGESTS = "digests.json"


def ship(zoo: Path, target: Path) -> None:
    """Copy the finished models to `target` (the zoo's place in the package) and write their digests."""
    for name, source in SHIPPED.items():
        if (zoo / source).exists():
            publish_folder(target / name, lambda place, source=source: copy_folder(zoo / source, place))
    for name in (WILD, EVALSET):
        if (zoo / name).exists():
            publish_bytes(target / name, (zoo / name).read_bytes())
    forget_origins(target)
    publish_bytes(target / DIGESTS, (json.dumps(digests_of(target), indent=2) + "\n").encode())


def unpack(shipped: Path, zoo: Path) -> None:
    """Lay the shipped models out as a building place, so that others can be built on them, or go on; what is there stays."""
    for source, name in ({place: name for name, place in SHIPPED.items()} | PARTS).items():
        if not (zoo / source).exists():
            publish_folder(zoo / source, lambda place, name=name: copy_folder(shipped / name, place))
    if not (zoo / "clip" / "text_encoder").exists():
        # Not the teacher's, which has learned more (factory/pocket/people.py).
        publish_folder(zoo / "clip" / "text_encoder", filter_tower(shipped / "clip").save_pretrained)


def forget_origins(target: Path) -> None:
    """Take the building place's paths out of the configs: they mean nothing elsewhere."""
    for path in target.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            publish_bytes(path, (json.dumps(config, indent=2) + "\n").encode())


def copy_folder(source: Path, place: Path) -> None:
    shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".cache"))


def digests_of(target: Path) -> dict[str, str]:
    """SHA-256 of every file of the zoo, by its path."""
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.name not in (DIGESTS, "README.md"))
    return {p.relative_to(target).as_posix(): digest_file(p) for p in files}


def distinct_bytes(target: Path) -> int:
    """Size in bytes with equal files counted once, as a git repository stores them: the student's frozen parts are the teacher's."""
    sizes = {digest: (target / name).stat().st_size for name, digest in digests_of(target).items()}
    return sum(sizes.values())
