"""Which recipes go on from a checkpoint, and what the others are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trainer.fit as fit
import trainer.loop as loop
from cluster.errors import CorruptShard, LedgerConflict
from trainer.decoder import _refuse_another
from trainer.identity import IDLE, decoder_identity, training_identity
from trainer.recipe import AdaptRecipe, DecoderRecipe, DistillRecipe, TrainerRecipe

PHASE = {"batch_images": 4, "learning_rate": 1e-3, "steps": 4, "checkpoint_s": 1e-9}
DATA = [{"manifest": "11aa", "encodings": None, "slots": 1024}]


def recipe(**changes: object) -> TrainerRecipe:
    keys = {
        "teacher": "t",
        "size_px": 32,
        "threads": 1,
        "adapt": AdaptRecipe(**PHASE),
        "distill": DistillRecipe(**PHASE),
    }
    return TrainerRecipe.model_validate(keys | changes)


def identity(phase: str = "adapt", seed: int = 1, data: list = DATA, **changes: object):
    return training_identity(recipe(**changes), phase, seed, data)


def test_what_decides_no_weight_does_not_count() -> None:
    other = {
        **{"gradient_checkpointing": True, "on_corrupt": "skip", "max_corrupt_share": 0.5, "trackers": ["mlflow"]},
        **{"sharding": "student", "loaders": 0, "cache_latents": True, "threads": 7, "allow_pickle": True},
        **{"grid_seed": 5, "grid_prompts": ["a fox"], "judge": {"kind": "open_clip", "model": "zoo:judge"}},
        **{"validation": {"every_steps": 2}, "checkpoints": {"keep": 3}},
    }
    phase = PHASE | {"checkpoint_s": 9.0, "spike_factor": 3.0, "on_spike": "rollback", "accumulation": 2}
    assert {key for (key, *_) in IDLE} <= other.keys() | {"adapt", "distill"}
    changed = identity("distill", **other, adapt=phase, distill=phase | {"compile_backend": None})
    assert changed.changes(identity("distill").facts) == []
    assert identity("adapt", distill=PHASE | {"huber_c": 0.1}).changes(identity("adapt").facts) == []


def test_what_counts_is_named_with_both_values() -> None:
    then = identity("distill").facts
    now = identity(
        "distill",
        seed=2,
        data=[DATA[0] | {"encodings": "22bb"}],
        teacher="other",
        adapt=PHASE | {"learning_rate": 2e-3},
        distill=PHASE | {"adversarial": {}},
        validation={"every_steps": 2, "keep": "best", "scorer": {"kind": "open_clip", "model": "zoo:clip"}},
        grid_prompts=["a fox"],
    )
    said = now.changes(then)
    assert said[:3] == [
        "seed: then 1, now 2",
        'trainer.teacher: then "t", now "other"',
        'trainer.validation: then null, now {"every_steps": 2, "phases": ["adapt", "distill"], "promp...',
    ]
    assert "trainer.adapt.learning_rate: then 0.001, now 0.002" in said
    assert any(one.startswith("trainer.distill.adversarial: then null, now {") for one in said)
    assert said[-1] == 'data.1.encodings: then null, now "22bb"' and len(said) == 6
    with pytest.raises(CorruptShard, match=r"step-4.*seed: then 1, now 2;.*encodings that the data set got since"):
        now.refuse_another(then, Path("step-4"))


def test_a_key_that_came_since_counts_only_off_its_default() -> None:
    then = json.loads(json.dumps(identity("distill").facts))
    del then["trainer"]["distill"]["huber_c"], then["trainer"]["mixed_precision"]
    assert identity("distill").changes(then) == []
    assert identity("distill", mixed_precision="bf16", distill=PHASE | {"huber_c": 0.5}).changes(then) == [
        "trainer.distill.huber_c: then 0.001, now 0.5",
        'trainer.mixed_precision: then "no", now "bf16"',
    ]
    then["trainer"]["gone"] = 3
    assert identity("distill").changes(then) == ["trainer.gone: then 3, now no such key"]


def test_a_checkpoint_of_another_recipe_is_refused_and_idle_keys_may_change(
    tiny_models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(**changes: object) -> TrainerRecipe:
        none = AdaptRecipe(**PHASE | {"steps": 0})
        return recipe(**{"teacher": str(tiny_models / "teacher"), "adapt": none, **changes})

    def die(*args: object) -> None:
        saved(*args)
        raise KeyboardInterrupt

    loop.train(settings(), data, tmp_path / "whole", seed=1)
    saved = fit.save_state
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "save_state", die)
        loop.train(settings(), data, tmp_path / "broken", seed=1)
    with pytest.raises(CorruptShard, match=r"trainer\.distill\.huber_c: then 0\.001, now 0\.5"):
        loop.train(settings(distill=DistillRecipe(**PHASE, huber_c=0.5)), data, tmp_path / "broken", seed=1)
    with pytest.raises(CorruptShard, match="seed: then 1, now 2"):
        loop.train(settings(), data, tmp_path / "broken", seed=2)
    phase = DistillRecipe(**PHASE | {"checkpoint_s": 60.0}, on_spike="rollback")
    loop.train(settings(distill=phase, loaders=0), data, tmp_path / "broken", seed=1)
    one, other = (tmp_path / name / "distill" / "unet" for name in ("whole", "broken"))
    assert all((one / file.name).read_bytes() == file.read_bytes() for file in other.iterdir())


def test_a_finished_decoder_is_not_taken_for_another_recipes(tmp_path: Path) -> None:
    def settings(**changes: object) -> DecoderRecipe:
        return DecoderRecipe.model_validate({"data": "d", **changes})

    _refuse_another(settings(threads=7, fit={"checkpoint_s": 1.0}), settings(), tmp_path)
    with pytest.raises(LedgerConflict, match=r"width: then null, now 8; fit\.steps: then 20000, now 3"):
        _refuse_another(settings(width=8, fit={"steps": 3}), settings(), tmp_path)
    assert decoder_identity(settings(), "x").changes(decoder_identity(settings(), "y").facts) == [
        'latents: then "y", now "x"'
    ]
