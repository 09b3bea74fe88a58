"""Sizes from rates: a made-up set of rates has known best sizes, and what is printed can be pasted into the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.recipe import build_recipe, override
from factory.recipe import FactoryRecipe
from factory.size_lines import lines
from factory.sizes import BatchProbe, StageProbe, batch_keys, batches_to_try, propose, with_size

GIB = 1 << 30
TEACHER, SCORER = "factory.make.teacher.batch_images", "factory.make.scorer.batch_images"


def tree_of(**make: Any) -> dict[str, Any]:
    return {
        "plan": {
            "taxonomy": "zoo:taxonomy.yaml",
            "prompts": 64_000,
            "writer": {"kind": "transformers", "model": "zoo:writer"},
        },
        "make": {
            "teacher": {"model": "zoo:teacher", "batch_images": 8},
            "scorer": {"model": "zoo:clip"},
            "unit_images": 64,
            **make,
        },
    }


def recipe_of(**make: Any) -> FactoryRecipe:
    return FactoryRecipe.model_validate(tree_of(**make))


def stage(name: str, per_sample_s: float, device: float = 0.0, gib: float = 0.0) -> StageProbe:
    """100 samples; `device` is the share of the time that is the model's."""
    return StageProbe(name, 0.0, 100, 100 * per_sample_s, 0.0, 100 * per_sample_s * device, round(gib * GIB))


def sizes(proposal: Any) -> dict[str, Any]:
    return {step.key.removeprefix("factory.make."): step.after for step in proposal.steps}


def test_the_best_sizes_of_made_up_rates() -> None:
    """A picture takes 2 s, all of it the model's, so 8 GPUs make 4 a second; scoring takes 0.6 s, so 2.4 scorers keep up, with a tenth more."""
    stages = [stage("render", 2.0, 1.0, 20), stage("score", 0.6), stage("commit", 0.001)]
    found = propose(recipe_of(), 64_000, stages, [], gpus=8, price=2.5, gpu_bytes=80 * GIB)
    assert sizes(found) == {"render_gpus": 1, "render_workers": 8, "score_workers": 3}
    assert found.limit == "render" and found.hours == pytest.approx(64_000 * 2 / 3600)
    # One scorer would hold eight GPUs up; the third makes the GPUs the limit.
    hours = [step.hours for step in found.steps]
    assert hours == pytest.approx([64_000 * 2 / 3600, 64_000 * 0.6 / 3600, 64_000 * 0.25 / 3600])
    assert [step.cost for step in found.steps] == pytest.approx([h * 8 * 2.5 for h in hours])
    again = propose(recipe_of(render_gpus=1, render_workers=8, score_workers=3), 64_000, stages, [], 8, None, 80 * GIB)
    assert again.steps == () and again.cost is None and "no stage waits" in lines(again)[0]


def test_two_workers_share_a_gpu_that_would_idle_while_pictures_are_encoded() -> None:
    stages = [stage("render", 2.0, 0.6, 30), stage("score", 0.1), stage("commit", 0.001)]
    found = propose(recipe_of(), 64_000, stages, [], gpus=4, price=None, gpu_bytes=80 * GIB)
    assert sizes(found)["render_gpus"] == 0.5 and sizes(found)["render_workers"] == 8
    # No faster than the model: 1.2 s of a GPU a picture.
    assert found.steps[-1].hours == pytest.approx(64_000 * 1.2 / 4 / 3600)
    tight = propose(recipe_of(), 64_000, stages, [], gpus=4, price=None, gpu_bytes=40 * GIB)
    assert sizes(tight)["render_gpus"] == 1 and sizes(tight)["render_workers"] == 4
    assert any("it holds 1" in note for note in tight.notes)
    third = propose(recipe_of(), 64_000, [stage("render", 2.0, 0.33, 9), *stages[1:]], [], 1, None, 80 * GIB)
    assert sizes(third)["render_gpus"] == 0.33 and 0.33 * sizes(third)["render_workers"] <= 1


def probes(key: str, name: str, **per_sample_s: float | None) -> list[BatchProbe]:
    found = {int(batch[1:]): took for batch, took in per_sample_s.items()}
    return [BatchProbe(key, b, None if took is None else stage(name, took, 1.0)) for b, took in found.items()]


def test_a_batch_is_proposed_only_if_it_was_measured_to_be_worth_it() -> None:
    stages = [stage("render", 2.0, 1.0, 20), stage("score", 0.01), stage("commit", 0.001)]

    def best(**took: float | None) -> Any:
        tried = probes(TEACHER, "render", **took)
        return sizes(propose(recipe_of(), 64_000, stages, tried, 1, None, 80 * GIB)).get("teacher.batch_images", 8)

    assert best(b4=2.2, b8=2.0, b16=1.5, b32=1.49) == 16, "the smaller of two that are as fast"
    assert best(b4=2.01, b8=2.0, b16=1.98) == 8, "not worth a change"
    assert best(b4=2.2, b8=2.0, b16=1.5, b32=None) == 16 and best(b8=2.0, b16=None) == 8
    assert best(b4=1.0, b8=2.0) == 4
    tried = probes(TEACHER, "render", b8=4.0, b16=3.0)
    faster = propose(recipe_of(), 64_000, stages, tried, 1, None, 80 * GIB)
    assert faster.steps[0].hours == pytest.approx(faster.hours * 0.75), "the ratio of two probes of one kind"


def test_the_scorer_s_batch_is_for_cropping_too() -> None:
    crops = FactoryRecipe.model_validate(
        {
            "plan": {"kind": "pictures", "paths": ["here"], "limit": 640},
            "make": {"scorer": {"model": "zoo:clip", "batch_images": 16}, "unit_images": 64},
        }
    )
    assert batch_keys(crops.make) == {SCORER: (16, ("crop", "score"))}
    tried = [*probes(SCORER, "crop", b16=1.0, b32=0.5, b64=0.8), *probes(SCORER, "score", b16=1.0, b32=1.0, b64=0.6)]
    stages = [stage("crop", 1.0), stage("score", 1.0), stage("commit", 0.001)]
    found = propose(crops, 640, stages, tried, gpus=4, price=None)
    assert sizes(found) == {"scorer.batch_images": 64, "score_workers": 4}
    assert found.limit == "crop"


def shared(**make: Any) -> FactoryRecipe:
    """Three pictures of four by `a`, one by `b`, in batches of 8 both."""
    teachers = {
        name: {"model": "zoo:teacher", "batch_images": 8, "share": share} for name, share in (("a", 3), ("b", 1))
    }
    tree = tree_of(**make)
    del tree["make"]["teacher"]
    tree["make"]["teachers"] = teachers
    return FactoryRecipe.model_validate(tree)


def test_each_of_several_teachers_has_a_batch_of_its_own() -> None:
    """A picture takes `a` 2 s and `b` 6 s, so 3 s on average; larger batches halve the one, smaller ones the other."""
    key = "factory.make.teachers.{}.batch_images".format
    assert list(batch_keys(shared().make))[:2] == [key("a"), key("b")]
    stages = [stage("render", 3.0, 1.0, 30), stage("score", 0.01), stage("commit", 0.001)]
    tried = [*probes(key("a"), "render", b8=2.0, b16=1.0), *probes(key("b"), "render", b4=3.0, b8=6.0, b16=None)]
    found = propose(shared(), 64_000, stages, tried, gpus=1, price=None, gpu_bytes=80 * GIB)
    assert [(step.key, step.after) for step in found.steps[:2]] == [(key("a"), 16), (key("b"), 4)]
    assert [step.hours for step in found.steps[:2]] == pytest.approx([64_000 * 2.25 / 3600, 64_000 * 1.5 / 3600])
    assert found.tree()["factory"]["make"]["teachers"] == {"a": {"batch_images": 16}, "b": {"batch_images": 4}}
    assert any("teachers.b.batch_images 8 -> 4" in line for line in lines(found))
    make = with_size(shared().make, key("b"), 4)
    assert make.teachers["b"].batch_images == 4 and make.teachers["a"] == shared().make.teachers["a"]
    # One that the probe never saw: said so, and taken to be as slow as the other.
    alone = propose(shared(), 64_000, stages, tried[:2], gpus=1, price=None, gpu_bytes=80 * GIB)
    assert alone.steps[0].hours == pytest.approx(64_000 * (3 * 1.5 + 3.0) / 4 / 3600)
    assert any("teacher b drew nothing in the probe" in note for note in alone.notes)
    assert not any("drew nothing" in note for note in found.notes)


def test_memory_is_that_of_the_teacher_that_takes_most() -> None:
    key = "factory.make.teachers.{}.batch_images".format
    stages = [stage("render", 2.0, 0.5, 20), stage("score", 0.01), stage("commit", 0.001)]
    tried = [
        *(
            BatchProbe(key("a"), batch, stage("render", took, 0.5, gib))
            for batch, took, gib in ((8, 2.0, 20), (16, 1.0, 30))
        ),
        BatchProbe(key("b"), 8, stage("render", 2.0, 0.5, 50)),
    ]
    found = propose(shared(), 64_000, stages, tried, gpus=1, price=None, gpu_bytes=80 * GIB)
    assert sizes(found)["render_gpus"] == 1 and any("50.0 of 80 GiB" in note for note in found.notes)


def test_scoring_goes_to_the_gpus_where_the_cores_do_not_reach() -> None:
    """A picture takes 0.5 s of a GPU and 2 s of a core to score: eight GPUs want 36 scorers, there are 16 cores."""
    stages = [stage("render", 0.5, 1.0, 20), stage("score", 2.0), stage("commit", 0.0001)]
    keys = {"gpus": 8, "price": None, "gpu_bytes": 80 * GIB, "on_gpu": [stage("score", 0.04, 0.5, 4)]}
    found = propose(recipe_of(), 64_000, stages, [], cores=2, **keys)
    assert sizes(found) == {"render_workers": 8, "render_gpus": 0.9, "score_workers": 8, "score_gpus": 0.1}
    assert found.limit == "render"
    # A GPU has both to do: 0.5 s and half of 0.04.
    assert found.steps[-1].hours == pytest.approx(64_000 * 0.52 / 8 / 3600)
    assert found.tree()["factory"]["make"]["render_gpus"] == 0.9, "once, and the last word"
    assert [step.key for step in found.steps].count("factory.make.render_gpus") == 1
    many = propose(recipe_of(), 64_000, stages, [], cores=8, **keys)
    assert sizes(many)["score_workers"] == 36 and "score_gpus" not in sizes(many)
    again = recipe_of(render_workers=8, render_gpus=0.9, score_workers=8, score_gpus=0.1)
    there = [stages[0], stage("score", 0.04, 0.5, 4), stages[2]]
    assert propose(again, 64_000, there, [], 8, None, 80 * GIB, cores=2).steps == ()


def test_no_share_is_proposed_of_what_is_taken_already() -> None:
    """The paper's recipe gives each scorer a tenth of a GPU, for eight GPUs."""
    stages = [stage("render", 2.0, 1.0, 20), stage("score", 0.04, 0.5, 4), stage("commit", 0.001)]
    crowded = recipe_of(render_workers=8, render_gpus=0.9, score_workers=16, score_gpus=0.1)
    found = propose(crowded, 64_000, stages, [], 1, None, 80 * GIB)
    assert sizes(found) == {"render_gpus": 0.5, "render_workers": 1, "score_workers": 5}
    assert any("16 scoring workers" in note and "5 fit" in note for note in found.notes)
    again = propose(recipe_of(render_gpus=0.5, score_workers=5, score_gpus=0.1), 64_000, stages, [], 1, None, 80 * GIB)
    assert again.steps == ()
    alone = propose(recipe_of(render_gpus=0.9, score_gpus=1), 64_000, stages, [], 1, None, 80 * GIB)
    assert alone.steps == () and any("leave nothing of 1 GPUs to render" in note for note in alone.notes)
    for workers in range(1, 40):
        for gpus in (1, 2, 8):
            for score_gpus in (0.06, 0.1, 0.3, 1):
                some = recipe_of(render_gpus=0.9, score_workers=workers, score_gpus=score_gpus)
                told = sizes(propose(some, 64_000, stages, [], gpus, None, 80 * GIB))
                assert told.get("render_gpus", 1) > 0 and told.get("score_workers", 1) > 0


def test_each_of_many_scorers_is_given_a_share() -> None:
    stages = [stage("render", 0.01, 1.0, 20), stage("score", 2.0), stage("commit", 0.0001)]
    on_gpu = [stage("score", 0.2, 0.01, 4)]
    found = propose(recipe_of(), 64_000, stages, [], 1, None, 80 * GIB, on_gpu, cores=2)
    assert sizes(found)["score_gpus"] == 0.01 and sizes(found)["score_workers"] == 10


def test_crops_and_scores_share_gpus_where_nothing_else_wants_them() -> None:
    crops = FactoryRecipe.model_validate(
        {
            "plan": {"kind": "pictures", "paths": ["here"], "limit": 64_000},
            "make": {"scorer": {"model": "zoo:clip"}, "unit_images": 64},
        }
    )
    stages = [stage("crop", 1.0), stage("score", 1.0), stage("commit", 0.0001)]
    on_gpu = [stage("crop", 0.02, 0.5, 4), stage("score", 0.01, 0.5, 4)]
    found = propose(crops, 64_000, stages, [], 2, None, 80 * GIB, on_gpu, cores=2)
    assert sizes(found) == {"score_workers": 2, "score_gpus": 0.5, "crop_gpus": 0.5} and found.limit == "crop"
    assert sizes(propose(crops, 64_000, stages, [], 2, None)) == {"score_workers": 2}


def test_no_more_workers_than_units_and_the_one_that_commits_is_named() -> None:
    stages = [stage("render", 0.1), stage("score", 0.1), stage("commit", 0.05)]
    found = propose(recipe_of(), 3 * 64, stages, [], gpus=8, price=None)
    assert sizes(found) == {"render_workers": 3, "score_workers": 3}
    assert found.limit == "commit" and any("one process commits" in note for note in found.notes)


def test_what_is_printed_fits_the_recipe() -> None:
    stages = [stage("render", 2.0, 0.6, 30), stage("score", 0.6), stage("commit", 0.001)]
    tried = [*probes(TEACHER, "render", b8=2.0, b16=1.0), *probes(SCORER, "score", b64=0.6, b32=0.2)]
    found = propose(recipe_of(), 64_000, stages, tried, gpus=8, price=1.0, gpu_bytes=80 * GIB)
    told = lines(found)
    start, end = told.index("to paste into the recipe:") + 1, len(told) - 1
    pasted = yaml.safe_load("\n".join(told[start:end]))
    assert pasted == found.tree() and set(pasted) == {"factory"}
    tree: dict[str, Any] = {"factory": tree_of()}
    for option in told[end].removeprefix("or: --set ").split(" --set "):
        override(tree, option, FactoryRecipe)
    changed = build_recipe(FactoryRecipe, tree["factory"], "test")
    for step in found.steps:
        place: Any = changed.make
        for name in step.key.removeprefix("factory.make.").split("."):
            place = getattr(place, name)
        assert place == step.after != step.before
    assert changed.make.teacher is not None and changed.make.teacher.batch_images == 16
    assert propose(changed, 64_000, stages, [], 8, None, 80 * GIB).limit in ("render", "score")


def test_batches_that_are_tried_cut_a_unit_into_whole_ones() -> None:
    assert batches_to_try(8, 64) == [4, 8, 16, 32] and batches_to_try(8, 24) == [4, 8]
    assert batches_to_try(64, 16) == [16, 64], "the recipe's own is filled up, which is measured"
    assert batches_to_try(1, 4) == [1, 2, 4]
    make = with_size(recipe_of().make, TEACHER, 32)
    assert make.teacher is not None and make.teacher.batch_images == 32


def test_a_real_probe_tries_each_teacher_on_its_own_pictures(tiny_models: Path, tmp_path: Path) -> None:
    """`rare` draws none of so few pictures, and is left out."""
    from factory.forecast import probe

    (tmp_path / "prompts.txt").write_text("\n".join(f"a fox number {i}" for i in range(8)))
    teacher = {"model": str(tiny_models / "teacher"), "size_px": 32, "batch_images": 4}
    shares = {"slow": {**teacher, "steps": 4}, "quick": {**teacher, "steps": 1}, "rare": {**teacher, "share": 1e-6}}
    recipe = FactoryRecipe.model_validate(
        {
            "plan": {"kind": "file", "paths": [str(tmp_path / "prompts.txt")]},
            "make": {
                "teachers": shares,
                "scorer": {"model": str(tiny_models / "clip"), "batch_images": 8},
                "unit_images": 8,
            },
            "select": {"min_clip": -1},
        }
    )
    told: list[str] = []
    found = probe(recipe, 0, 8, told.append, sizes=True)
    drawn = [(p.key, p.batch) for p in found.batches if p.stage is not None and p.stage.name == "render"]
    assert drawn == [
        (f"factory.make.teachers.{name}.batch_images", batch) for name in ("slow", "quick") for batch in (2, 4, 8)
    ]
    assert "render, teachers.quick.batch_images 2" in told
    render = found.stages[0]
    assert render.samples == 8 and render.open_s > 0 and 0 < render.device_s <= render.seconds
    notes = propose(recipe, 8000, found.stages, found.batches, 1, None, found.gpu_bytes).notes
    assert any("teacher rare drew nothing" in note for note in notes)


def test_a_real_probe_tries_batches(tiny_models: Path, tmp_path: Path) -> None:
    from factory.forecast import probe

    (tmp_path / "prompts.txt").write_text("\n".join(f"a fox number {i}" for i in range(8)))
    recipe = FactoryRecipe.model_validate(
        {
            "plan": {"kind": "file", "paths": [str(tmp_path / "prompts.txt")]},
            "make": {
                "teacher": {
                    **{"model": str(tiny_models / "teacher"), "steps": 1, "size_px": 32, "batch_images": 2},
                },
                "scorer": {"model": str(tiny_models / "clip"), "batch_images": 4},
                "unit_images": 8,
            },
            "select": {"min_clip": -1},
        }
    )
    found = probe(recipe, 0, 8, sizes=True)
    assert [(p.key, p.batch) for p in found.batches] == [
        *((TEACHER, batch) for batch in (1, 2, 4, 8)),
        *((SCORER, batch) for batch in (2, 4, 8)),
    ]
    assert all(p.stage is not None and p.stage.samples == p.batch and p.stage.seconds > 0 for p in found.batches)
    render = found.stages[0]
    assert 0 < render.device_s <= render.seconds
    told = lines(propose(recipe, 8000, found.stages, found.batches, 4, 1.0, found.gpu_bytes))
    assert any("render_workers 1 -> 4" in line for line in told)
