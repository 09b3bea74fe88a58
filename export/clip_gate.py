"""The judge's gate: CLIP on the pictures of a build beside CLIP on PyTorch's, for what decibels do not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from export.recipe import GateRecipe
from factory.models.clip import Clip


def scores(clip: Clip, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """`clip_mean`: cosine of each picture (H x W x 3 uint8) and its prompt. `recall_at_1`: share nearest to their own prompt."""
    texts, drawn = clip.texts(list(prompts)), clip.pictures(list(pictures))
    near = drawn @ texts.T
    own = np.diagonal(near)
    # Prompts may repeat, so that a picture of the same words is a hit too.
    return {
        "clip_mean": round(float(own.mean()), 4),
        "recall_at_1": round(float((own >= near.max(axis=1) - 1e-6).mean()), 4),
    }


def judge_failures(judged: dict[str, Any] | None, gates: GateRecipe, count: int) -> list[str]:
    """Which of the judge's gates are missed, in words. `judged`: `pytorch` and `build`, each as `scores` gives them, of `count` pictures."""
    if judged is None:
        return []
    found: list[str] = []
    for key, words, margin in (
        ("clip_mean", "CLIP", gates.clip_margin),
        # Of few pictures one is more than the margin, and one may fall.
        ("recall_at_1", "R@1", max(gates.recall_margin, round(1 / count, 4))),
    ):
        wanted, got = judged["pytorch"][key], judged["build"][key]
        if not got >= wanted - margin - 1e-9:
            found.append(f"judge: {words} {got} is more than {margin} under PyTorch's {wanted}")
    return found
