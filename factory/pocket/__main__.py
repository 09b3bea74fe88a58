"""Rebuild the zoo: `python -m factory.pocket BUILD_FOLDER vae|clip|teacher --steps N`; rerun to resume."""

from __future__ import annotations

import argparse
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch

from factory.pocket.clip import train_clip
from factory.pocket.teacher import train_teacher
from factory.pocket.vae import train_vae
from factory.pocket.world import render_world

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m factory.pocket", description=__doc__)
    parser.add_argument("folder", type=Path, help="where packages, checkpoints and finished models lie")
    parser.add_argument("model", choices=["vae", "clip", "teacher"], help="the teacher needs the other two")
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps in all, earlier runs included")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    zoo = asked.folder
    pairs, pixels = render_world(fetch_packages(zoo / "packages"), zoo / "world.npz")
    if asked.model == "vae":
        train_vae(pairs, pixels, zoo / "vae", steps=asked.steps)
    elif asked.model == "clip":
        train_clip(pairs, pixels, zoo / "clip", steps=asked.steps)
    else:
        train_teacher(pairs, pixels, zoo, steps=asked.steps)


if __name__ == "__main__":
    main()
