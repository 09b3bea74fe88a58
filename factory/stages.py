"""The workers of `make`: render (or crop and caption), score, commit. Each marks rows and drops none."""

from __future__ import annotations

import io
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.stage import DEAD, Row, Stage
from cluster.usage import JOURNAL
from factory.budget import budget_of
from factory.dead import captions_before
from factory.ingest import fetch
from factory.ledger import commit_unit
from factory.models import pick_device, set_threads
from factory.models.answers import NoAnswer
from factory.pixels import decode_picture, open_crops
from factory.recipe import CropRecipe, MakeRecipe
from factory.scorers import Batch, OpenedScorers, scores_of
from factory.tally import seen_of
from factory.teachers import teacher_of

if TYPE_CHECKING:
    from factory.models.image import Painter

REJECTED = "rejected"
CAPTIONS = "captions"
"""Folder of the data set that holds what a captioner on a server was asked, a journal a unit."""
_BLANK_DEVIATION = 2.0
"""A picture whose values (0-255) deviate less than this shows nothing."""


def make_stages(recipe: MakeRecipe, folder: Path) -> list[Stage]:
    """Render, or crop and caption what was taken in; then score and commit, as the runner places them."""
    if recipe.painters():
        first = [Stage("render", lambda: _Render(recipe), recipe.render_workers, cpus=1, gpus=recipe.render_gpus)]
    else:
        first = [
            Stage("crop", lambda: _Crop(recipe, folder), recipe.score_workers, cpus=0.5, gpus=recipe.crop_gpus),
        ]
        if recipe.captioner is not None:
            first.append(
                Stage(
                    "caption",
                    lambda: _Caption(recipe, folder),
                    recipe.render_workers,
                    cpus=0.5,
                    gpus=recipe.render_gpus,
                )
            )
    return [
        *first,
        Stage("score", lambda: _Score(recipe), recipe.score_workers, cpus=0.5, gpus=recipe.score_gpus),
        Stage("commit", lambda: _Commit(recipe, folder), 1, cpus=0.1, whole=True),
    ]


class _Render:
    """Holds one teacher at a time: of several, plans put one after another (factory/teachers.py)."""

    def __init__(self, recipe: MakeRecipe) -> None:
        set_threads(recipe.threads)
        self.recipe, self.teachers, self.kind = recipe, recipe.painters(), recipe.picture_kind
        # Asked now: a teacher that is opened later is opened outside of the stage's opening.
        self.device = pick_device()
        self.name = next(iter(self.teachers)) if len(self.teachers) == 1 else None
        self.painter: Painter | None = None
        self.late_s = 0.0
        """Seconds in which teachers were opened since the worker itself was."""
        if self.name is not None:
            self._painter(self.name)
            self.late_s = 0.0
        self.device_s = 0.0
        """Seconds in the model; the rest is encoding, which leaves a GPU idle."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        names, done = [teacher_of(row, self.recipe) for row in rows], dict[int, Row]()
        for name in dict.fromkeys(names):
            own = [i for i, other in enumerate(names) if other == name]
            painter, began = self._painter(name), time.perf_counter()
            pictures = painter.paint([rows[i]["prompt"] for i in own], [rows[i]["seed"] for i in own])
            self.device_s += time.perf_counter() - began
            done |= {
                i: {**rows[i], "picture": encode_picture(p, self.kind)} for i, p in zip(own, pictures, strict=True)
            }
        return [done[i] for i in range(len(rows))]

    def _painter(self, name: str) -> Painter:
        from factory.models.image import Painter

        if self.painter is None or name != self.name:
            self.painter = None  # the next one may need its memory
            key, began = f"factory.make.teachers.{name}" if name else "factory.make.teacher", time.perf_counter()
            self.painter, self.name = Painter(self.teachers[name], key, self.device), name
            self.late_s += time.perf_counter() - began
        return self.painter


class _Crop:
    """The paper's best-of-three: centre and the two ends of the longer side, the one nearest to the text by CLIP."""

    def __init__(self, recipe: MakeRecipe, folder: Path) -> None:
        from factory.models.clip import Clip

        set_threads(recipe.threads)
        self.folder = folder
        self.recipe, self.kind = recipe.crop or CropRecipe(), recipe.picture_kind
        self.clip = Clip(recipe.scorer)
        self.device_s = 0.0
        """Seconds in CLIP."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        found, began = [self._open(row) for row in rows], time.perf_counter()
        # Every crop of every row in one list: short batches would be filled up with copies.
        seen = self.clip.pictures([crop for some, _ in found for crop in some])
        texts, done, start = self.clip.texts([row["prompt"] for row in rows]), list[Row](), 0
        self.device_s += time.perf_counter() - began
        for i, (row, (some, (height, width))) in enumerate(zip(rows, found, strict=True)):
            own = seen[start : start + len(some)]
            start += len(some)
            scores = own @ texts[i]
            chosen = self._choose(scores)
            done.append(
                {
                    **row,
                    "picture": encode_picture(some[chosen], self.kind),
                    "raw_caption": row["prompt"],
                    "raw_clip_score": round(float(scores[chosen]), 6),
                    "crop": CROPS[chosen],
                    "width_px": width,
                    "height_px": height,
                    SEEN: own[chosen].tobytes(),
                    READ: texts[i].tobytes(),
                }
            )
        return done

    def _open(self, row: Row) -> tuple[list[np.ndarray], tuple[int, int]]:
        data = fetch(row["source"], row["picture_sha256"], self.folder)
        ends = self.recipe.choice == "best" and bool(row["prompt"])
        return open_crops(data, self.recipe.size_px, ends, self.recipe.max_pixels)

    def _choose(self, scores: np.ndarray) -> int:
        """Index into CROPS; the centre where there is nothing to choose by, and on a tie."""
        best = int(scores.argmax())
        return best if scores[best] > scores[0] + 1e-6 else 0


CROPS = ("centre", "start", "end")
SEEN, READ = "seen", "read"
"""CLIP's embeddings (D float32) of a crop before it was encoded and of its text: nobody has to look at them twice."""


class _Caption:
    def __init__(self, recipe: MakeRecipe, folder: Path) -> None:
        from factory.models.caption import open_captioner

        set_threads(recipe.threads)
        assert recipe.captioner is not None
        self.folder, self.asked, self.model = folder, folder / CAPTIONS, open_captioner(recipe.captioner)
        self.budget = budget_of(recipe.captioner, self.asked)
        self.device_s = 0.0
        """Seconds in the model."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        # What lived in this unit before it was reopened for those that died is not asked, nor paid, for again.
        before = captions_before(self.folder, rows[0]["unit"])
        todo = [row for row in rows if row["id"] not in before]
        pictures, began = [decode_picture(row["picture"]) for row in todo], time.perf_counter()
        self.model.note_usage(journal := self.asked / f"{rows[0]['unit']}{JOURNAL}")
        with self.budget.set_aside(journal, len(todo)) if self.budget and todo else nullcontext():
            written = iter(self.model.describe(pictures) if todo else [])
        self.device_s += time.perf_counter() - began
        captions = [before[row["id"]] if row["id"] in before else next(written) for row in rows]
        return [_captioned(row, caption) for row, caption in zip(rows, captions, strict=True)]


def _captioned(row: Row, caption: str | NoAnswer) -> Row:
    """Dead where a server would not describe this one picture: others are no worse for it."""
    if isinstance(caption, NoAnswer):
        return {**row, "outcome": DEAD, "reason": f"caption: {caption.why}"[:300]}
    return {**row, "prompt": caption, READ: None}


class _Score:
    def __init__(self, recipe: MakeRecipe) -> None:
        from factory.models.clip import Clip

        set_threads(recipe.threads)
        self.clip, self.further = Clip(recipe.scorer), OpenedScorers(recipe)
        self.device_s = 0.0
        """Seconds in CLIP and the further scorers."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        pictures = [decode_picture(row["picture"]) for row in rows]
        prompts = [row["prompt"] for row in rows]
        seen, read = _known(rows, SEEN), _known(rows, READ)
        began = time.perf_counter()
        seen = self.clip.pictures(pictures) if seen is None else seen
        read = self.clip.texts(prompts) if read is None else read
        scores = (seen * read).sum(axis=1)
        further = self.further(Batch(pictures, prompts, seen))
        self.device_s += time.perf_counter() - began
        return [
            {
                **{name: value for name, value in row.items() if name not in (SEEN, READ)},
                **({"outcome": REJECTED, "reason": "blank"} if float(picture.std()) < _BLANK_DEVIATION else {}),
                "clip_score": round(float(score), 6),
                "embedding": embedding.astype(np.float16).tobytes(),
                **looks(picture),
                **more,
            }
            for row, picture, score, embedding, more in zip(rows, pictures, scores, seen, further, strict=True)
        ]


def _known(rows: list[Row], name: str) -> np.ndarray | None:
    """N x D float32 that an earlier stage left in every row, or None."""
    found = [row[name] for row in rows if row.get(name)]
    return np.stack([np.frombuffer(one, np.float32) for one in found]) if len(found) == len(rows) else None


class _Commit:
    def __init__(self, recipe: MakeRecipe, folder: Path) -> None:
        self.folder, self.scores = folder, score_columns(recipe)

    def __call__(self, rows: list[Row]) -> list[Row]:
        commit_unit(self.folder, rows, self.scores)
        # What the driver counts: scores and reasons, no pictures.
        return [seen_of(row, self.scores.names) for row in rows]


def score_columns(recipe: MakeRecipe) -> pa.Schema:
    """The ledger's columns of the recipe's further scorers; range, direction and meaning are metadata of the field."""
    return pa.schema(
        [
            pa.field(
                name, pa.float64(), metadata={"range": score.range(), "better": score.better, "about": score.about}
            )
            for name, score in scores_of(recipe).items()
        ]
    )


def looks(picture: np.ndarray) -> Row:
    """`phash`: 64-bit perceptual hash of the drawing, in hex; `colours`: mean colour of each quadrant, 12 bytes."""
    import imagehash

    down, across = picture.shape[0] // 2, picture.shape[1] // 2
    quadrants = picture[: down * 2, : across * 2].reshape(2, down, 2, across, 3)
    # The exact sums of `mean` over both axes, in a tenth of its time.
    means = quadrants.sum(axis=1, dtype=np.uint32).sum(axis=2, dtype=np.uint64) / (down * across)
    return {
        "phash": str(imagehash.phash(Image.fromarray(picture))),
        "colours": means.round().astype(np.uint8).tobytes(),
    }


def encode_picture(picture: np.ndarray, kind: str) -> bytes:
    """H x W x 3 uint8 to a png, lossless webp or jpg (quality 95) file."""
    sink = io.BytesIO()
    options = {"png": {"compress_level": 6}, "webp": {"lossless": True}, "jpg": {"quality": 95}}[kind]
    Image.fromarray(picture).save(sink, format="JPEG" if kind == "jpg" else kind.upper(), **options)
    return sink.getvalue()
