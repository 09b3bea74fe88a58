"""The wild set: pictures of this world as a crawler would find them, for the paper's L-orig. Says exactly how each flaw was made.

Real pictures of the same packages, with the noisy texts that come with them. What is wrong with a sample stands under `flaws`
and what it truly shows under `truth`, for evaluation only: nothing that filters may read it.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from cluster.storage import publish_bytes
from factory.pocket.world import BACKGROUNDS, SIZE, TONES, Concept, describe

Pairs = list[tuple[Concept, str]]

LICENCES = {"3d": "MIT", "flat": "MIT", "cartoon": "Apache-2.0"}
SHAPES = {"square": (64, 64), "wide": (104, 64), "tall": (64, 104)}
"""Width and height in pixels before anything is done to the resolution."""


def wild_samples(pairs: Pairs, pixels: np.ndarray, shortcodes: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """`count` samples: `picture` (jpg bytes), `text` and `facts` (source, licence, flaws), in a fixed random order."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        rng = random.Random(f"wild/{number}")
        repeat = rng.random()
        if found and repeat < 0.06:  # the same file again under another text
            old = rng.choice(found)
            concept, flaws = old["concept"], [*old["flaws"], "exact duplicate"]
            found.append(_sample(old["picture"], concept, flaws, pairs, shortcodes, rng, old["style"], old["ground"]))
            continue
        if found and repeat < 0.14:  # the same picture, brightened by 4% and compressed harder
            old = rng.choice(found)
            again = ImageEnhance.Brightness(Image.open(io.BytesIO(old["picture"]))).enhance(1.04)
            flaws = [*old["flaws"], "near duplicate"]
            found.append(
                _sample(_jpeg(again, 70), old["concept"], flaws, pairs, shortcodes, rng, old["style"], old["ground"])
            )
            continue
        row, ground = rng.randrange(len(pairs)), rng.choice(list(BACKGROUNDS))
        picture, flaws = place_roughly(pixels[row], ground, rng)
        concept, style = pairs[row]
        found.append(_sample(_jpeg(picture, 88), concept, flaws, pairs, shortcodes, rng, style, ground))
    return found


def place_roughly(rgba: np.ndarray, background: str, rng: random.Random) -> tuple[Image.Image, list[str]]:
    """A subject on a larger plain canvas: centred (55%), at one end of the longer side (30%) or cut off by 20 to 45% (15%); then
    shown at 22 to 40 pixels of its shorter side (15%). Returns the picture and its flaws."""
    flaws: list[str] = []
    width, height = SHAPES[rng.choice(list(SHAPES))]
    side = rng.randint(42, 60)
    subject = Image.fromarray(rgba).resize((side, side), Image.Resampling.LANCZOS)
    left, top, where = (width - side) // 2, (height - side) // 2, rng.random()
    if where >= 0.85:
        lost = int(side * rng.uniform(0.2, 0.45))
        left, top = rng.choice(((-lost, top), (width - side + lost, top), (left, -lost), (left, height - side + lost)))
        flaws.append("cut off")
    elif where >= 0.55 and width != height:
        left, top = rng.choice(((0, 0), (width - side, height - side)))
        flaws.append("off centre")
    canvas = Image.new("RGBA", (width, height), (*BACKGROUNDS[background], 255))
    layer = Image.new("RGBA", canvas.size)
    layer.paste(subject, (left, top))
    picture = Image.alpha_composite(canvas, layer).convert("RGB")
    if rng.random() < 0.15:
        factor = rng.uniform(22, 40) / SIZE
        picture = picture.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
        flaws.append("low resolution")
    return picture, flaws


def alt_text(concept: Concept, pairs: Pairs, shortcodes: dict[str, Any], rng: random.Random) -> tuple[str, list[str]]:
    """What a web page might say of the picture, and what is wrong with it.

    The label (30%), up to four tags (25%), a shortcode (20%), a file name (10%), nothing (7%), another picture's label (8%).
    """
    who = rng.random()
    if who < 0.30:
        return label(concept), []
    if who < 0.55:
        tags = list(concept.tags) or [concept.subject]
        return ", ".join(rng.sample(tags, min(len(tags), 4))), ["tags only"]
    if who < 0.75:
        code = shortcodes.get(concept.key.upper(), concept.subject.replace(" ", "_"))
        return f":{code[0] if isinstance(code, list) else code}:", ["shortcode"]
    if who < 0.85:
        return f"IMG_{rng.randrange(10_000):04d}_{concept.key[:12]}.png", ["file name"]
    if who < 0.92:
        return "", ["no text"]
    return label(rng.choice([c for c, _ in rng.sample(pairs, 8) if c.subject != concept.subject])), ["wrong text"]


def label(concept: Concept) -> str:
    """The package's own name of a picture, such as `woman astronaut: medium skin tone`."""
    if not concept.is_person:
        return concept.subject
    tone = f": {concept.tone} skin tone" if concept.tone in TONES else ""
    return (concept.subject if concept.gender == "person" else f"{concept.gender} {concept.subject}") + tone


def write_wild(pairs: Pairs, pixels: np.ndarray, packages: Path, path: Path, count: int = 3000) -> Path:
    """Write a Parquet file (`picture` jpg bytes, `text`, `source`, `licence`, `flaws`, `truth`); the same bytes each time."""
    shortcodes = json.loads((packages / "emojibase-data" / "en" / "shortcodes" / "github.json").read_text())
    rows = [
        {
            "picture": sample["picture"],
            "text": sample["text"],
            "source": f"{sample['style']}/{sample['concept'].key}",
            "licence": LICENCES[sample["style"]],
            "flaws": ", ".join(sample["flaws"]),
            "truth": json.dumps(describe(sample["concept"], sample["style"], sample["ground"]), sort_keys=True),
        }
        for sample in wild_samples(pairs, pixels, shortcodes, count)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    publish_bytes(path, sink.getvalue())
    return path


def _sample(
    picture: bytes,
    concept: Concept,
    flaws: list[str],
    pairs: Pairs,
    shortcodes: dict[str, Any],
    rng: random.Random,
    style: str,
    ground: str,
) -> dict[str, Any]:
    text, wrong = alt_text(concept, pairs, shortcodes, rng)
    kept = [flaw for flaw in flaws if flaw not in ("tags only", "shortcode", "file name", "no text", "wrong text")]
    return {
        "picture": picture,
        "text": text,
        "concept": concept,
        "flaws": kept + wrong,
        "style": style,
        "ground": ground,
    }


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format="JPEG", quality=quality)
    return sink.getvalue()
