"""What tests/bench/raw.py runs and hands to its peers: pictures from a crawl, our ways over them, and the zoo's CLIP under transformers' names.

`python tests/bench/raw_work.py {all|centre|resize} FOLDER OUT` is one of our ways, in a process of its own so that its CPU time can be told.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from factory.models import ZOO

SIZE_PX, MIN_SIZE_PX, SHARD, QUALITY = 256, 300, 1000, 95
"""Edge of the crops; least shorter edge, the paper's; samples a shard; JPEG quality: the same for all."""
WIDE_PX = (240, 1000)
"""Shorter edge of the pictures, drawn evenly."""


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files with texts beside them, and the same as lists for the peers (`list.parquet`, `list.jsonl`).

    The zoo's wild set (real pictures and alt-texts with their duplicates, factory/pocket/wild.py), enlarged to what the web serves and
    given film grain, for a smooth picture would be cheap to decode. A duplicate of the wild set stays one, down to its bytes.
    """
    folder.mkdir(parents=True)
    wild = pq.read_table(ZOO / "wild.parquet", columns=["picture", "text"]).slice(0, count).to_pylist()
    grain = np.random.default_rng(0).normal(0, 6, (2048, 2048)).round().astype(np.int16)
    names, texts = [], []
    for number in range(count):
        row = wild[number % len(wild)]
        # The seed is the wild picture's own bytes: the same file twice is the same file twice here too.
        rng = random.Random(hashlib.sha256(row["picture"]).digest() + bytes([number // len(wild)]))
        small = Image.open(io.BytesIO(row["picture"])).convert("RGB")
        factor = rng.uniform(*WIDE_PX) / min(small.size)
        large = small.resize((round(small.width * factor), round(small.height * factor)), Image.Resampling.BICUBIC)
        left, top = rng.randrange(grain.shape[1] - large.width), rng.randrange(grain.shape[0] - large.height)
        own = grain[top : top + large.height, left : left + large.width, None]
        pixels = (np.asarray(large, np.int16) + own).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(row["text"])
        names.append(str((folder / f"{number:06d}.jpg").resolve()))
        texts.append(row["text"])
    pq.write_table(pa.table({"url": [f"file://{n}" for n in names], "caption": texts}), folder / "list.parquet")


def write_transformers_clip(folder: Path) -> None:
    """zoo:clip, an open_clip folder, as the transformers folder that Data-Juicer reads: the same weights, tokens and preprocessing."""
    import open_clip
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPVisionConfig,
        PreTrainedTokenizerFast,
    )

    from factory.pocket.clip import text_encoder, tower_weights

    own = json.loads((ZOO / "clip" / "open_clip_config.json").read_text())
    facts, seen = own["model_cfg"], own["preprocess_cfg"]
    source, _ = open_clip.create_model_from_pretrained(f"local-dir:{ZOO / 'clip'}")
    weights, vision = source.state_dict(), facts["vision_cfg"]
    text = text_encoder(source, facts["text_cfg"]["vocab_size"])
    eyes = CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=vision["width"] * 4,
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision["head_width"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act="gelu",
        projection_dim=facts["embed_dim"],
    )
    words = CLIPTextConfig(**text.config.to_dict())
    model = CLIPModel(
        CLIPConfig(text_config=words.to_dict(), vision_config=eyes.to_dict(), projection_dim=facts["embed_dim"])
    )
    wanted = model.state_dict()
    found = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.state_dict().items()}
    tower = {k.removeprefix("vision_model."): v for k, v in wanted.items() if k.startswith("vision_model.")}
    found |= {f"vision_model.{k}": v for k, v in tower_weights(weights, tower, vision["layers"]).items()}
    found["visual_projection.weight"] = weights["visual.proj"].T.contiguous()
    found["text_projection.weight"] = weights["text_projection"].T.contiguous()
    found["logit_scale"] = np.log(100.0) * weights["logit_scale"].new_ones(())  # Data-Juicer divides by 100
    left = [key for key in wanted if key not in found and "position_ids" not in key]
    if left or set(found) - set(wanted):
        raise ValueError(f"CLIP does not fit transformers': {left}, {sorted(set(found) - set(wanted))}")
    model.load_state_dict(found, strict=False)
    end = facts["text_cfg"]["vocab_size"] - 1
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(ZOO / "clip" / "tokenizer.json"))
    tokens.add_special_tokens({"pad_token": tokens.convert_ids_to_tokens(end)})
    tokens.model_max_length = facts["text_cfg"]["context_length"]
    edge = {"height": vision["image_size"], "width": vision["image_size"]}
    picture = CLIPImageProcessor(
        do_resize=True, size=edge, do_center_crop=False, resample=3, image_mean=seen["mean"], image_std=seen["std"]
    )
    model.save_pretrained(folder)
    CLIPProcessor(picture, tokens).save_pretrained(folder)


def ours(way: str, folder: Path, out: Path) -> int:
    """Pictures kept of `folder`, packed into `out`. `all`: best of three crops; `centre`: the peers' work; `resize`: img2dataset's alone."""
    return resize_alone(folder, out) if way == "resize" else whole_path(way, folder, out)


def whole_path(way: str, folder: Path, out: Path) -> int:
    """Plan, make, select and pack, by a recipe like any other, in this process."""
    from cluster.runner import InProcess
    from factory.make import make, select_and_pack
    from factory.plan import make_plan
    from factory.recipe import FactoryRecipe

    recipe = FactoryRecipe.model_validate(
        {
            "plan": {"kind": "pictures", "paths": [str(folder)]},
            "make": {
                "crop": {"size_px": SIZE_PX, "choice": "best" if way == "all" else "centre"},
                "scorer": {"kind": "open_clip", "model": "zoo:clip"},
                "picture_kind": "jpg",
                "unit_images": 128,
            },
            "select": {"min_size_px": MIN_SIZE_PX, "min_clip": 0.2, "max_hamming_bits": 2, "same_meaning": 0.98},
            "pack": {"samples_per_shard": SHARD},
        }
    )
    make_plan(recipe, 0, out)
    make(recipe, out, InProcess(), lambda n: None)
    return select_and_pack(recipe, out)["kept"]


def resize_alone(folder: Path, out: Path) -> int:
    """The functions of that path that img2dataset has too, without the rest: read, digest, decode, least size, crop, encode, shards, manifest."""
    from factory.ingest import fetch, planned_rows
    from factory.pack import Sample, pack
    from factory.recipe import PicturePlan
    from factory.stages import encode_picture, open_crops

    kept = 0

    def samples():
        nonlocal kept
        for row in planned_rows(PicturePlan(paths=[str(folder)])):
            if not row["prompt"]:
                row["prompt"] = "-"
            three, (height, width) = open_crops(fetch(row["source"], row["picture_sha256"]), SIZE_PX, ends=False)
            if min(height, width) >= MIN_SIZE_PX:
                kept += 1
                facts = {"width_px": width, "height_px": height}
                yield Sample(row["id"], encode_picture(three[0], "jpg"), "jpg", row["prompt"], facts)

    pack(samples(), out, SHARD)
    return kept


if __name__ == "__main__":
    print(ours(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
