"""What is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.recipe import Settings


class ScoreRule(Settings):
    """What a stored score must be."""

    least: float | None = Field(default=None, description="smaller is rejected")
    most: float | None = Field(default=None, description="larger is rejected")
    best_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="keep this share of the best: 0.8 drops the worst fifth, which is the highest where a scorer says that lower is better",
    )
    within: list[str] = Field(
        default=[], description="take best_share in each combination of these attributes apart; `group` is one too"
    )


class Cap(Settings):
    """At most so many samples of each combination of some attributes; the best by rank_by stay."""

    attributes: list[str] = Field(
        min_length=1, description="attributes whose combinations are counted; `group` is one too"
    )
    most: int | None = Field(default=None, ge=0, description="samples of a combination")
    most_times: float | None = Field(
        default=None, ge=1, description="samples of a combination, as a multiple of the rarest one that is there"
    )

    @model_validator(mode="after")
    def _one(self) -> Cap:
        if (self.most is None) == (self.most_times is None):
            raise ValueError("give either most or most_times")
        return self


class Wanted(Settings):
    """At least so many samples of each combination of some attributes; what lacks goes to the refill list."""

    attributes: list[str] = Field(min_length=1, description="attributes whose combinations are counted, in each group")
    least: int = Field(ge=1, description="samples of a combination")


class SelectRecipe(Settings):
    """What is kept."""

    text: Literal["caption", "raw"] = Field(
        default="caption",
        description="words of a taken-in picture: its new caption, or those that came with it (the paper's L-pp)",
    )
    crop: Literal["made", "centre"] = Field(
        default="made",
        description="of a taken-in picture: the crop that was made and judged, or the centre, cut from the source anew (the paper's L-orig)",
    )
    min_clip: float = Field(default=0.0, ge=-1, le=1, description="least cosine of picture and prompt")
    min_size_px: int = Field(default=0, ge=0, description="least shorter edge of a taken-in picture, before the crop")
    scores: dict[str, ScoreRule] = Field(
        default={}, description="rules for any score that the ledger stores, by its name"
    )
    rank_by: str = Field(
        default="clip_score",
        description="score by which one of several is kept: the best (the highest, or the lowest where its scorer says so), then the smallest id",
    )
    same_file: bool | None = Field(
        default=True,
        description="keep the very same picture file once; null (or false) leaves copies to max_hamming_bits and same_meaning, and keeps "
        "every one where these are null too",
    )
    max_hamming_bits: int | None = Field(
        default=2, ge=0, le=16, description="perceptual hashes this near count as the same drawing; null: none do"
    )
    max_colour_difference: float = Field(
        default=6.0, ge=0, le=255, description="and so do mean colours (0-255) this near"
    )
    same_meaning: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="CLIP embeddings with at least this cosine count as the same picture; null: none do",
    )
    caps: list[Cap] = Field(default=[], description="most samples of combinations of attributes, applied in turn")
    wanted: list[Wanted] = Field(default=[], description="least samples of combinations of attributes")
    best: int | None = Field(default=None, ge=1, description="keep so many of the best by rank_by")
    people: Literal["apply", "ignore", "only"] = Field(
        default="apply",
        description="what people decided: have the last word, count for nothing, or keep only what a person kept",
    )
