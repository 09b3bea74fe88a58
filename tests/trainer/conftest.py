"""A data set of noise, packed as a real one is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from factory.pack import Sample, pack
from factory.stages import encode_picture


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 32 px with prompts `a fox N`; read-only."""
    folder = tmp_path_factory.mktemp("data")
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    samples = [
        Sample(hashlib.sha256(bytes([i])).hexdigest(), encode_picture(p, "png"), "png", f"a fox {i}")
        for i, p in enumerate(pictures)
    ]
    pack(samples, folder)
    return folder
