"""IS and FID on Inception features, by the torch-fidelity package (extra `fidelity`): absent, it is said and not replaced.

The package's own network and formulas give the values; the intervals are ours, by the bootstrap on the same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.errors import StageError, TargetUnavailable
from trainer.metrics import Interval, frechet_interval, inception_interval

EXTRACTOR, FEATURES, LOGITS = "inception-v3-compat", "2048", "logits_unbiased"
"""The package's names for the network, the features of FID (as many numbers as the name says) and the logits of IS."""
SPLITS = 10
"""Of the pictures, for the inception score: the published way."""
_DRAWS = 50
"""Bootstrap samples of FID: each takes the roots of two matrices of 2,048 x 2,048."""


def require_fidelity() -> Any:
    """The package; raises TargetUnavailable."""
    try:
        import torch_fidelity  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TargetUnavailable(
            "torch-fidelity is not installed, so there is no IS and no FID on Inception features",
            remedy="pip install 'edgefusion[fidelity]' (its Inception weights need a network once), or leave --fidelity out",
        ) from error
    return torch_fidelity


class Inception:
    """The package's network as a judge: features and logits of pictures, side by side."""

    batch = 32

    def __init__(self, size_px: int) -> None:
        """Pictures are resized to `size_px` first, as BK-SDM does (256). Raises StageError without the weights."""
        require_fidelity()
        from torch_fidelity.utils import create_feature_extractor  # pyright: ignore[reportMissingImports]

        self.size_px, self.digest = size_px, f"{EXTRACTOR} of torch-fidelity at {size_px} px"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._network = create_feature_extractor(
                EXTRACTOR, [FEATURES, LOGITS], cuda=self.device.type == "cuda", verbose=False
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise StageError(
                f"torch-fidelity failed: {(str(error).splitlines() or [type(error).__name__])[0]}",
                remedy=f"Its weights need a network once, or a filled cache ({torch.hub.get_dir()}/checkpoints)",
            ) from error

    @torch.no_grad()
    def pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """N x (features + logits) float32 of pictures H x W x 3 uint8."""
        size = (self.size_px, self.size_px)
        resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in pictures]
        batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
        found = self._network(batch.to(self.device))
        return np.concatenate([part.float().cpu().numpy() for part in found], axis=1)


def fidelity(made: np.ndarray, real: np.ndarray | None) -> dict[str, Interval | None]:
    """`inception_score` of what `Inception` says of pictures and, with references, `fid`; None where it is not defined."""
    package = require_fidelity()
    width = int(FEATURES)
    score = fid = None
    if len(made) >= SPLITS:
        said = package.metric_isc.isc_features_to_metric(torch.from_numpy(made[:, width:]), SPLITS)
        around = inception_interval(made[:, width:], SPLITS)
        score = around._replace(value=said["inception_score_mean"])
    if real is not None:
        statistics = [
            package.metric_fid.fid_features_to_statistics(torch.from_numpy(x[:, :width])) for x in (made, real)
        ]
        said = package.metric_fid.fid_statistics_to_metric(*statistics, False)
        around = frechet_interval(made[:, :width], real[:, :width], _DRAWS)
        value = said["frechet_inception_distance"]
        # Where covariances are not full the package's root and ours round apart: the interval goes with the package's.
        fid = Interval(value, around.low + value - around.value, around.high + value - around.value)
    return {"inception_score": score, "fid": fid}
