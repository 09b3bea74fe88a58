"""The workers of `make`: render (or crop and caption), score, commit. Each marks rows and drops none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from cluster.stage import Row, Stage
from factory.ingest import fetch
from factory.ledger import commit_unit
from factory.models import set_threads
from factory.recipe import CropRecipe, MakeRecipe
from factory.scorers import Batch, OpenedScorers, scores_of

REJECTED = "rejected"
_BLANK_DEVIATION = 2.0
"""A picture whose values (0-255) deviate less than this shows nothing."""


def make_stages(recipe: MakeRecipe, folder: Path) -> list[Stage]:
    """Render, or crop and caption what was taken in; then score and commit, as the runner places them."""
    if recipe.teacher is not None:
        first = [Stage("render", lambda: _Render(recipe), recipe.render_workers, cpus=1, gpus=recipe.render_gpus)]
    else:
        first = [Stage("crop", lambda: _Crop(recipe, folder), recipe.score_workers, cpus=0.5)]
        if recipe.captioner is not None:
            first.append(
                Stage("caption", lambda: _Caption(recipe), recipe.render_workers, cpus=0.5, gpus=recipe.render_gpus)
            )
    return [
        *first,
        Stage("score", lambda: _Score(recipe), recipe.score_workers, cpus=0.5),
        Stage("commit", lambda: _Commit(recipe, folder), 1, cpus=0.1, whole=True),
    ]


class _Render:
    def __init__(self, recipe: MakeRecipe) -> None:
        from factory.models.image import Painter

        set_threads(recipe.threads)
        assert recipe.teacher is not None
        self.painter, self.kind = Painter(recipe.teacher), recipe.picture_kind

    def __call__(self, rows: list[Row]) -> list[Row]:
        pictures = self.painter.paint([row["prompt"] for row in rows], [row["seed"] for row in rows])
        return [{**row, "picture": encode_picture(p, self.kind)} for row, p in zip(rows, pictures, strict=True)]


class _Crop:
    """The paper's best-of-three: centre and the two ends of the longer side, the one nearest to the text by CLIP."""

    def __init__(self, recipe: MakeRecipe, folder: Path) -> None:
        from factory.models.clip import Clip

        set_threads(recipe.threads)
        self.folder = folder
        self.recipe, self.kind = recipe.crop or CropRecipe(), recipe.picture_kind
        self.clip = Clip(recipe.scorer)

    def __call__(self, rows: list[Row]) -> list[Row]:
        opened = [decode_picture(fetch(row["source"], row["picture_sha256"], self.folder)) for row in rows]
        three = [crops(picture, self.recipe.size_px) for picture in opened]
        seen = self.clip.pictures([crop for crop_set in three for crop in crop_set]).reshape(len(rows), 3, -1)
        scores = np.einsum("bkd,bd->bk", seen, self.clip.texts([row["prompt"] for row in rows]))
        return [
            {
                **row,
                "picture": encode_picture(three[i][chosen], self.kind),
                "raw_caption": row["prompt"],
                "raw_clip_score": round(float(scores[i, chosen]), 6),
                "crop": CROPS[chosen],
                "width_px": opened[i].shape[1],
                "height_px": opened[i].shape[0],
            }
            for i, row in enumerate(rows)
            for chosen in [self._choose(row, scores[i])]
        ]

    def _choose(self, row: Row, scores: np.ndarray) -> int:
        """Index into CROPS; the centre where there is nothing to choose by, and on a tie."""
        best = int(scores.argmax())
        informed = self.recipe.choice == "best" and row["prompt"] and scores[best] > scores[0] + 1e-6
        return best if informed else 0


CROPS = ("centre", "start", "end")


def crops(picture: np.ndarray, size_px: int) -> list[np.ndarray]:
    """Three squares of H x W x 3 uint8, scaled to `size_px`: centre, left or upper end, right or lower end."""
    image, side = Image.fromarray(picture), min(picture.shape[:2])
    across, down = picture.shape[1] - side, picture.shape[0] - side
    boxes = [(left, top, left + side, top + side) for left, top in ((across // 2, down // 2), (0, 0), (across, down))]
    return [np.asarray(image.resize((size_px, size_px), Image.Resampling.LANCZOS, box=box)) for box in boxes]


class _Caption:
    def __init__(self, recipe: MakeRecipe) -> None:
        from factory.models.caption import open_captioner

        set_threads(recipe.threads)
        assert recipe.captioner is not None
        self.model = open_captioner(recipe.captioner)

    def __call__(self, rows: list[Row]) -> list[Row]:
        captions = self.model.describe([decode_picture(row["picture"]) for row in rows])
        return [{**row, "prompt": caption} for row, caption in zip(rows, captions, strict=True)]


class _Score:
    def __init__(self, recipe: MakeRecipe) -> None:
        from factory.models.clip import Clip

        set_threads(recipe.threads)
        self.clip, self.further = Clip(recipe.scorer), OpenedScorers(recipe)

    def __call__(self, rows: list[Row]) -> list[Row]:
        pictures = [decode_picture(row["picture"]) for row in rows]
        seen = self.clip.pictures(pictures)
        prompts = [row["prompt"] for row in rows]
        scores = (seen * self.clip.texts(prompts)).sum(axis=1)
        further = self.further(Batch(pictures, prompts, seen))
        return [
            {
                **row,
                **({"outcome": REJECTED, "reason": "blank"} if float(picture.std()) < _BLANK_DEVIATION else {}),
                "clip_score": round(float(score), 6),
                "embedding": embedding.astype(np.float16).tobytes(),
                **looks(picture),
                **more,
            }
            for row, picture, score, embedding, more in zip(rows, pictures, scores, seen, further, strict=True)
        ]


class _Commit:
    def __init__(self, recipe: MakeRecipe, folder: Path) -> None:
        self.folder, self.scores = folder, score_columns(recipe)

    def __call__(self, rows: list[Row]) -> list[Row]:
        commit_unit(self.folder, rows, self.scores)
        return [{"id": row["id"], "outcome": row["outcome"]} for row in rows]


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

    height, width = picture.shape[:2]
    quadrants = picture[: height // 2 * 2, : width // 2 * 2].reshape(2, height // 2, 2, width // 2, 3).mean(axis=(1, 3))
    return {
        "phash": str(imagehash.phash(Image.fromarray(picture))),
        "colours": quadrants.round().astype(np.uint8).tobytes(),
    }


def encode_picture(picture: np.ndarray, kind: str) -> bytes:
    """H x W x 3 uint8 to a png, lossless webp or jpg (quality 95) file."""
    sink = io.BytesIO()
    options = {"png": {"compress_level": 6}, "webp": {"lossless": True}, "jpg": {"quality": 95}}[kind]
    Image.fromarray(picture).save(sink, format="JPEG" if kind == "jpg" else kind.upper(), **options)
    return sink.getvalue()


MAX_PIXELS = 4096 * 4096


def decode_picture(data: bytes) -> np.ndarray:
    """H x W x 3 uint8; raises ValueError for what is no picture or an unreasonably large one."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"a picture of {image.width} x {image.height} is over the limit")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        # Its own words hold a memory address, and a reason must be the same in every run.
        raise ValueError("not a picture (neither PNG, JPEG nor WebP)") from None
    except ValueError:
        raise
    except Exception as error:  # damaged files make the decoders raise whatever they please
        raise ValueError(f"not a picture ({error})") from error
