"""The pictures by which the zoo is judged: real ones with their captions, in three splits, shipped so that anyone can measure again."""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import publish_bytes
from factory.models import ZOO
from factory.pocket.clip import Pairs
from factory.pocket.grammar import sentence
from factory.pocket.teacher import STYLES
from factory.pocket.world import BACKGROUNDS, compose, describe
from factory.stages import decode_picture, encode_picture

EVALSET = "evalset.parquet"
SPLITS = {"trained": 512, "compositions": 256, "held-out": 256}
"""`trained`: what the teacher learned to draw. `compositions`: professions x gender x skin tone x style that it never saw.
`held-out`: any picture that neither filter, autoencoder nor captioner saw, whole concepts and the third style among them."""


@dataclass(frozen=True)
class Shown:
    """One picture (64 x 64 x 3 uint8) with its caption and its record."""

    picture: np.ndarray
    caption: str
    record: dict[str, str]


def write_evalset(pairs: Pairs, pixels: np.ndarray, path: Path) -> Path:
    """Write the Parquet file (`split`, `picture` png bytes, `caption`, `record`); no record comes twice in a split."""
    names = list(BACKGROUNDS)
    rows: list[dict[str, object]] = []
    for split, count in SPLITS.items():
        rng, words, draw = random.Random(f"eval/{split}"), random.Random(f"words/{split}"), np.random.default_rng(31)
        fitting = [i for i, pair in enumerate(pairs) if _belongs(pair, split)]
        rng.shuffle(fitting)
        # Every picture once before any comes on a second background.
        grounds = {i: rng.sample(names, len(names)) for i in fitting}
        order = [(i, grounds[i][turn]) for turn in range(len(names)) for i in fitting][:count]
        for i, ground in order:
            record = describe(*pairs[i], ground)
            rows.append(
                {
                    "split": split,
                    "picture": encode_picture(compose(pixels[i], ground, draw), "png"),
                    "caption": sentence(record, words),
                    "record": json.dumps(record, sort_keys=True),
                }
            )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    publish_bytes(path, sink.getvalue())
    return path


def _belongs(pair: tuple, split: str) -> bool:
    concept, style = pair
    drawn = concept.is_drawn and style in STYLES
    if split == "trained":
        return drawn and not concept.held_out
    if split == "compositions":
        return drawn and concept.held_out and concept.is_person
    return concept.held_out


def read_evalset(split: str) -> list[Shown]:
    """A split of the shipped file, in its order."""
    rows = pq.read_table(ZOO / EVALSET, filters=[("split", "=", split)]).to_pylist()
    return [Shown(decode_picture(r["picture"]), r["caption"], json.loads(r["record"])) for r in rows]
