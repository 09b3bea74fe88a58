"""Writing in the picture: captions, signs, logos with letters and watermarks that are text. `pip install 'edgefusion[text]'`.

RapidOCR brings its weights inside its package (PP-OCRv6 small, Apache-2.0) and nothing is downloaded. A box counts only if what stands in it
can be read: detectors alone also find ribbons, windows and leaves. A watermark without letters is not found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.errors import TargetUnavailable
from factory.scorers import Batch, Score
from factory.scorers.detect import threads


class Writing:
    scores = (
        Score("text_letters", 0, None, "lower", "letters and digits that RapidOCR reads in the picture"),
        Score("text_area", 0, 1, "lower", "share of the picture that boxes with read letters take"),
    )

    def __init__(self, least: float = 0.8) -> None:
        """`least`: the reader's confidence from which a line counts."""
        try:
            from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise TargetUnavailable(
                "the scorer text needs rapidocr", remedy="pip install 'edgefusion[text]' here and on every node"
            ) from None
        self.least = least
        engine = "EngineConfig.onnxruntime"
        self.model: Any = RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.log_level": "error",
                f"{engine}.intra_op_num_threads": threads(),
                f"{engine}.inter_op_num_threads": 1,
            }
        )

    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        rows = [self._read(picture) for picture in batch.pictures]
        return {name: [row[i] for row in rows] for i, name in enumerate(score.name for score in self.scores)}

    def _read(self, picture: np.ndarray) -> tuple[float, float]:
        found = self.model(np.ascontiguousarray(picture[..., ::-1]))  # it expects what OpenCV reads: BGR
        if found.boxes is None or found.txts is None:
            return 0.0, 0.0
        letters, area = 0, 0.0
        for box, text, sure in zip(found.boxes, found.txts, found.scores, strict=True):
            read = sum(c.isalnum() for c in text)
            # One letter alone is as often a wheel or a pole.
            if sure >= self.least and read > 1:
                letters += read
                area += _area(np.asarray(box, np.float64))
        return float(letters), min(area / (picture.shape[0] * picture.shape[1]), 1.0)


def _area(corners: np.ndarray) -> float:
    """Pixels inside a polygon of n x 2 corners (shoelace)."""
    x, y = corners.T
    return float(abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2)
