"""The forecast: its sums on a probe by hand, and a real probe of tiny models that leaves nothing behind."""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import EdgeFusionError
from factory.forecast import Probe, lines, planned_samples, probe, scale
from factory.recipe import FactoryRecipe
from factory.sizes import StageProbe


def recipe_of(models: Path, source: Path, limit: int | None = 1000, **make: object) -> FactoryRecipe:
    return FactoryRecipe.model_validate(
        {
            "plan": {"kind": "pictures", "paths": [str(source)], "limit": limit},
            "make": {
                "crop": {"size_px": 64},
                "scorer": {"kind": "open_clip", "model": str(models / "clip")},
                "scores": [{"kind": "sharpness"}],
                "unit_images": 4,
                **make,
            },
            "select": {"min_clip": -1, "scores": {"sharpness": {"best_share": 0.5}}},
        }
    )


def by_hand() -> Probe:
    stages = (
        StageProbe("render", 10.0, 50, 100.0, 1),
        StageProbe("score", 2.0, 50, 5.0, 0),
        StageProbe("commit", 0.0, 50, 0.5, 0),
    )
    return Probe(50, 5.0, stages, 49, 25, 1, 40_000, 10_000, "CPU")


def test_sums_of_a_probe_by_hand(tmp_path: Path) -> None:
    found = scale(recipe_of(tmp_path, tmp_path, limit=36_000), by_hand(), gpus=4, price=2.0)
    assert found.plan_hours == pytest.approx(1.0)
    assert found.hours == pytest.approx(1 + (36_000 * 2 / 4 + 10) / 3600)  # drawing sets the pace
    assert found.gpu_hours == pytest.approx(4 * (found.hours - 1)) and found.cost == pytest.approx(2 * found.gpu_hours)
    assert found.disk_bytes == 720 * (40_000 + 2 * 10_000)  # the shards, and what they are sorted from
    assert found.kept[1] < found.kept[0] == 18_000 < found.kept[2]
    many = scale(recipe_of(tmp_path, tmp_path, limit=36_000), by_hand(), gpus=1000, price=None)
    assert many.hours == pytest.approx(1 + (36_000 * 0.1 + 2) / 3600)  # one scorer cannot keep up
    more = scale(recipe_of(tmp_path, tmp_path, limit=36_000, score_workers=5), by_hand(), gpus=1000, price=None)
    assert more.hours < many.hours and many.cost is None


def test_opening_the_writer_counts_once(tmp_path: Path) -> None:
    """90 s of opening and 2 s for 64 prompts are 8.7 hours of a million, not 399."""
    found = replace(by_hand(), samples=64, plan_s=2.0, plan_open_s=90.0)
    recipe = recipe_of(tmp_path, tmp_path, limit=1_000_000)
    whole = scale(recipe, found, gpus=1, price=None)
    assert whole.plan_hours == pytest.approx((1_000_000 * 2 / 64 + 90) / 3600)
    assert "32.00 samples/s, its writer opened in 90.0 s" in lines(found, whole, 1)[1]


def test_the_opening_of_a_writer_is_not_its_writing(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def write(self, records: list[dict[str, str]], seed: int) -> list[str]:
            clock[0] += 2.0
            return [", ".join(record.values()) for record in records]

        def note_usage(self, journal: Path) -> None: ...

        def close(self) -> None:
            clock[0] += 5.0

    def opened(*_: object) -> Slow:
        clock[0] += 90.0
        return Slow()

    clock, recipe = [0.0], recipe_of(tiny_models, tmp_path).model_dump()
    writer = {"kind": "transformers", "model": "zoo:writer"}
    recipe["plan"] = {"kind": "written", "taxonomy": "zoo:taxonomy.yaml", "prompts": 1000, "writer": writer}
    recipe["make"] |= {
        "crop": None,
        "teacher": {"model": str(tiny_models / "teacher"), "size_px": 32, "steps": 1, "batch_images": 4},
    }
    monkeypatch.setattr("factory.models.text.open_writer", opened)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    found = probe(FactoryRecipe.model_validate(recipe), 0, 8)
    assert (found.plan_s, found.plan_open_s) == (2.0, 95.0)


def test_every_selection_takes_its_disk(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tmp_path, limit=36_000)
    views = FactoryRecipe.model_validate({**recipe.model_dump(), "views": {"raw": {"text": "raw"}, "few": {"best": 5}}})
    assert scale(views, by_hand(), 1, None).disk_bytes == 720 * (40_000 + 4 * 10_000)


def test_a_probe_on_a_cpu_says_so(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tmp_path)
    told = "\n".join(lines(by_hand(), scale(recipe, by_hand(), 4, 2.0), 4))
    assert "measured here by a probe of 50 samples, on CPU" in told and "scaled to 1,000 samples" in told
    assert "This machine has no GPU" in told
    with pytest.raises(EdgeFusionError, match="does not say how many"):
        planned_samples(recipe_of(tmp_path, tmp_path, limit=None))


def test_a_real_probe_leaves_nothing_behind(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scratch = tmp_path / "in", tmp_path / "scratch"
    source.mkdir()
    scratch.mkdir()
    for i in range(20):
        cells = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        sink = io.BytesIO()
        Image.fromarray(cells).resize((64, 64), Image.Resampling.NEAREST).save(sink, format="PNG")
        (source / f"{i:02d}.png").write_bytes(sink.getvalue())
        (source / f"{i:02d}.txt").write_text("a fox")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    found = probe(recipe_of(tiny_models, source), 0, 12)
    assert found.samples == 12 and found.kept == 6 and found.dead == 0
    assert [stage.name for stage in found.stages] == ["crop", "score", "commit"]
    assert all(stage.samples == 12 and stage.seconds > 0 for stage in found.stages)
    assert found.bytes_made > 0 and found.bytes_packed > 0
    assert not any(scratch.iterdir())
