"""A made data set without models (plan, ledger and pictures by hand, and the recipe that selects and packs it), and a site to download from."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import publish_bytes
from factory.ledger import commit_unit
from factory.plan import PLAN, table_bytes
from factory.stages import encode_picture, looks
from tests.factory.site import Site

UNIT_IMAGES = 8
RECIPE = """
name: by-hand
factory:
  plan: {taxonomy: "zoo:taxonomy.yaml", prompts: 24, writer: {kind: transformers, model: "zoo:writer"}}
  make:
    teacher: {kind: diffusers, model: "zoo:teacher", size_px: 64, batch_images: 8}
    scorer: {kind: open_clip, model: "zoo:clip"}
    unit_images: 8
  select: {min_clip: 0.2}
trainer: {whatever: this part is not read}
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """24 rows in 3 units under RUN/dataset: row i scores i / 23, row 5 is dead; RUN/recipe.yaml fits."""
    folder = tmp_path / "run" / "dataset"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        picture = np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        row = {
            "id": hashlib.sha256(b"%d" % i).hexdigest(),
            "prompt": f"a {('fox', 'key', 'owl')[i % 3]} number {i} <b>&amp;",
            "group": "things",
            "attributes": json.dumps({"subject": ("fox", "key", "owl")[i % 3], "it's": 'a "quoted" value'}),
            "seed": i,
            "outcome": "dead" if i == 5 else "pending",
            "reason": "plan: by hand" if i == 5 else "",
        }
        made = {"picture": encode_picture(picture, "png"), "clip_score": i / 23, "embedding": b"", **looks(picture)}
        rows.append(({**row, "unit": f"unit-{i // UNIT_IMAGES:05d}"}, row["outcome"] == "pending" and made))
    plan = [{key: value for key, value in row.items() if key != "unit"} for row, _ in rows]
    publish_bytes(folder / PLAN, table_bytes(pa.Table.from_pylist(plan)))
    for start in range(0, 24, UNIT_IMAGES):
        commit_unit(folder, [{**row, **(made or {})} for row, made in rows[start : start + UNIT_IMAGES]])
    (folder.parent / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def ids() -> list[str]:
    """The ids of `dataset`, in the order of the plan."""
    return [hashlib.sha256(b"%d" % i).hexdigest() for i in range(24)]


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()
