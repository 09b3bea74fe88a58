"""The forecast: its sums on a probe by hand, and a real probe of tiny models that leaves nothing behind."""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from chain import Recipe
from cluster.errors import EdgeFusionError
from cluster.recipe import load_recipe
from factory.download import _listed
from factory.forecast import Probe, lines, planned_samples, probe, scale
from factory.lost_work import fitting_unit
from factory.recipe import FactoryRecipe
from factory.sizes import StageProbe
from tests.answering import Answer, Answering

RECIPES = Path(__file__).parent.parent.parent / "recipes"


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


def write_pictures(folder: Path, count: int) -> None:
    for i in range(count):
        cells = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        sink = io.BytesIO()
        Image.fromarray(cells).resize((64, 64), Image.Resampling.NEAREST).save(sink, format="PNG")
        (folder / f"{i:02d}.png").write_bytes(sink.getvalue())
        (folder / f"{i:02d}.txt").write_text("a fox")


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


def test_what_a_lost_node_costs(tmp_path: Path) -> None:
    """2.11 s a sample by hand, 12 s of opening; a unit is one batch of 4, or so many that half of them takes over ten minutes."""
    small = lines(by_hand(), scale(recipe_of(tmp_path, tmp_path), by_hand(), 1, None), 1)
    assert "costs some 8 s for each unit of 4 that it had in hand, and 12 s to open" in "\n".join(small)
    assert "unit_images=" not in "\n".join(small)
    clip = {"kind": "open_clip", "model": "m", "batch_images": 6}
    recipe = recipe_of(tmp_path, tmp_path, unit_images=768, scorer=clip)
    large = lines(by_hand(), scale(recipe, by_hand(), 1, None), 1)
    assert "some 27 min for each unit of 768" in "\n".join(large)
    assert "with factory.make.unit_images=192, set before the run begins, 7 min for each" in "\n".join(large)
    assert fitting_unit(by_hand().stages, 768, batch=384) is None  # half of them, one batch, takes 13 minutes


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


def test_pictures_are_counted_where_that_is_cheap(tmp_path: Path) -> None:
    """As many as the plan takes in; a shard does not tell, and a limit needs no source."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.JPG", "a.txt", "notes.md"):
        (folder / name).touch()
    assert planned_samples(recipe_of(tmp_path, folder, limit=None)) == 2
    pq.write_table(pa.table({"url": ["u"] * 5, "picture": [b""] * 5, "text": [""] * 5}), tmp_path / "p.parquet")
    assert planned_samples(recipe_of(tmp_path, tmp_path / "p.parquet", limit=None)) == 5
    (tmp_path / "u.txt").write_text("http://a/1\tone\n\nhttp://a/2\n")
    (tmp_path / "u.csv").write_text('url,text\nhttp://a/1,"two\nlines"\n\nhttp://a/2,\nhttp://a/3,\n')
    for name, count in (("u.txt", 2), ("u.csv", 3), ("p.parquet", 5)):
        tree = recipe_of(tmp_path, tmp_path / name, limit=None).model_dump()
        tree["plan"]["download"] = {}
        recipe = FactoryRecipe.model_validate(tree)
        assert planned_samples(recipe) == count
        assert recipe.plan.kind == "pictures" and len(list(_listed(tmp_path / name, recipe.plan))) == count
    (folder / "deep" / "s.tar").touch()
    for source in (folder, folder / "deep" / "s.tar"):
        with pytest.raises(EdgeFusionError, match=r"does not say how many.*limit"):
            planned_samples(recipe_of(tmp_path, source, limit=None))
        assert planned_samples(recipe_of(tmp_path, source, limit=7)) == 7


def test_the_recipe_of_real_pictures_that_ships_has_a_size() -> None:
    recipe = load_recipe(Recipe, RECIPES / "pocket-wild.yaml")
    assert planned_samples(recipe.factory) == 3000


class Charging(Answering):
    """Nine tokens a prompt, the first of which is empty; a hundred and ten a caption."""

    asked = 0

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        self.asked += 1
        caption = isinstance(body["messages"][0]["content"], list)
        usage = {"prompt_tokens": 100 if caption else 6, "completion_tokens": 10 if caption else 3}
        words = "a picture" if caption else f"{body['messages'][0]['content'].removesuffix(' =>')}, number {self.asked}"
        return 200, {"choices": [{"message": {"content": words if self.asked > 1 else ""}}], "usage": usage}, {}


PRICES = {"price_input": 1.0, "price_output": 2.0}


def test_what_a_servers_prompts_cost_is_a_line_of_its_own(tiny_models: Path, tmp_path: Path) -> None:
    """The tries that failed too: nine answers for eight prompts of two pictures each."""
    server, tree = Charging(), recipe_of(tiny_models, tmp_path).model_dump()
    writer = {"kind": "openai", "model": "m", "base_url": server.url, "concurrent": 1, **PRICES}
    tree["plan"] = {"taxonomy": "zoo:taxonomy.yaml", "prompts": 1000, "images_per_prompt": 2, "writer": writer}
    teacher = {"model": str(tiny_models / "teacher"), "size_px": 32, "steps": 1, "batch_images": 4}
    tree["make"] |= {"crop": None, "teacher": teacher}
    recipe = FactoryRecipe.model_validate(tree)
    found = probe(recipe, 0, 16)
    (charge,) = found.asked
    assert (charge.who, charge.usage.answers, server.asked) == ("writer", 9, 9)
    assert charge.of_a_sample == pytest.approx(9 * 12e-6 / 16)
    told = "\n".join(lines(found, scale(recipe, found, 1, 3.0), 1))
    assert "servers cost 0.01 by the tokens of the writer" in told and "9 answers, 54 tokens read, 27 written" in told
    assert "without the plan's" in told


def test_captions_cost_what_samples_that_live_ask_and_warming_up_is_not_theirs(
    tiny_models: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_pictures(source, 7)
    (source / "empty.png").touch()
    server = Charging()
    server.asked = 1
    captioner = {"kind": "openai", "model": "m", "base_url": server.url, **PRICES}
    recipe = recipe_of(tiny_models, source, captioner=captioner)
    found = probe(recipe, 0, 8)
    (charge,) = found.asked
    assert (charge.who, charge.usage.answers) == ("captioner", 8), "one of them warms up, one picture is dead"
    assert charge.of_a_sample == pytest.approx(120e-6 * 7 / 8)
    unpriced = recipe_of(tiny_models, source, captioner={**captioner, "price_input": None, "price_output": None})
    found = probe(unpriced, 0, 8)
    told = "\n".join(lines(found, scale(unpriced, found, 1, None), 1))
    assert "servers cost" not in told and "price_input and price_output are not in the recipe" in told


def test_a_real_probe_leaves_nothing_behind(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scratch = tmp_path / "in", tmp_path / "scratch"
    source.mkdir()
    scratch.mkdir()
    write_pictures(source, 20)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    found = probe(recipe_of(tiny_models, source), 0, 12)
    assert found.samples == 12 and found.kept == 6 and found.dead == 0
    assert [stage.name for stage in found.stages] == ["crop", "score", "commit"]
    assert all(stage.samples == 12 and stage.seconds > 0 for stage in found.stages)
    assert found.bytes_made > 0 and found.bytes_packed > 0
    assert not any(scratch.iterdir())
