"""A data set of noise, packed as a real one is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from factory.pack import Sample, pack
from factory.stages import encode_picture
from trainer.reproduce.recipe import RECIPES


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 32 px with prompts `a fox N`; read-only."""
    folder = tmp_path_factory.mktemp("data")
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    samples = [
        Sample(hashlib.sha256(bytes([i])).hexdigest(), encode_picture(p, "png"), "png", f"a fox {i}")
        for i, p in enumerate(pictures)
    ]
    pack(samples, folder)
    return folder


@pytest.fixture(scope="session")
def protocol(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of the protocol with tiny models and counts; its recipes are the shipped ones with those models."""
    folder = tmp_path_factory.mktemp("protocol")
    clip = {"kind": "open_clip", "model": str(tiny_models / "clip")}
    for name in ("pocket", "pocket-wild"):
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        make = recipe["factory"]["make"] | {"scorer": clip, "unit_images": 16, "threads": 1}
        if name == "pocket":
            recipe["factory"]["plan"]["taxonomy"] = str(tiny_models / "taxonomy.yaml")
            recipe["factory"]["plan"]["writer"]["model"] = str(tiny_models / "writer")
            recipe["factory"]["plan"]["tries"] = 1
            make["teacher"] |= {"model": str(tiny_models / "teacher"), "size_px": 32, "steps": 2, "batch_images": 4}
        else:
            make |= {"crop": {"size_px": 32, "choice": "best"}}
            make["captioner"] |= {"model": str(tiny_models / "captioner"), "max_new_tokens": 6}
        recipe["factory"]["make"] = make
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "wild_recipe": str(folder / "pocket-wild.yaml"),
        "synt_recipe": str(folder / "pocket.yaml"),
        "wild_pictures": 40,
        "synt_prompts": 24,
        "teacher": str(tiny_models / "teacher"),
        "judge": str(tiny_models / "clip"),
        "size_px": 32,
        "batch_images": 4,
        "adapt_steps": 2,
        "distill_steps": 2,
        "count": 6,
        "among": 4,
        "eval_steps": 2,
        "seeds": 1,
        "threads": 1,
    }
    (folder / "protocol.yaml").write_text(yaml.safe_dump(settings))
    return folder / "protocol.yaml"
