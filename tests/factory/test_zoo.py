"""The shipped models: whole, loadable, and able to do their work. Judged by the filter CLIP, for want of an independent judge."""

from __future__ import annotations

import json

import numpy as np
import pytest

from factory.models import ZOO
from factory.models.clip import Clip
from factory.pocket.build import DIGESTS, digests_of
from factory.recipe import OpenClipScorer
from trainer.loop import open_pipeline
from trainer.sample import generate

PROMPTS = [
    "a 3d render of a red apple on a white background",
    "a flat icon of a fox on a blue background",
    "a 3d render of a rocket on a black background",
    "a flat icon of a pizza on a yellow background",
    "a 3d render of a penguin on a pink background",
    "a flat icon of a sunflower on a red background",
    "a 3d render of a soccer ball on a green background",
    "a flat icon of an octopus on a gray background",
]


def test_the_files_are_what_their_digests_say() -> None:
    assert digests_of(ZOO) == json.loads((ZOO / DIGESTS).read_text())
    assert sum(p.stat().st_size for p in ZOO.rglob("*") if p.is_file()) < 100e6


@pytest.mark.parametrize(
    ("model", "steps", "guidance", "least"), [("zoo:teacher", 20, 4.0, 6), ("zoo:student-fewstep", 2, 1.0, 5)]
)
def test_pictures_show_what_was_asked(model: str, steps: int, guidance: float, least: int) -> None:
    """Among the eight prompts, the right one is nearest for most pictures; chance would give one."""
    clip = Clip(OpenClipScorer(model="zoo:clip"))
    pictures = generate(open_pipeline(model), PROMPTS, list(range(8)), steps, guidance)
    near = clip.pictures(pictures) @ clip.texts(PROMPTS).T
    assert int((near.argmax(axis=1) == np.arange(8)).sum()) >= least
