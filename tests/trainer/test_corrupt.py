"""Samples that cannot be read: left out, named and counted, the same ones for any number of workers; too many end the training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer.fit as fit
import trainer.loop as loop
from cluster.errors import CorruptShard, EdgeFusionError
from export.report import _skipped_part
from factory.pack import Sample, pack, read_manifest
from factory.stages import encode_picture
from trainer.mix import MixedStream, Source
from trainer.recipe import TrainerRecipe
from trainer.stream import CorruptSample, ShardStream

BAD = (3, 7)


def write(folder: Path, bad: tuple[int, ...] = BAD, count: int = 24) -> Path:
    """Packed as it should be: the checksums vouch for pictures that are none."""
    rng = np.random.default_rng(0)
    pictures = [encode_picture(p, "png") for p in rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)]
    samples = [
        Sample(
            hashlib.sha256(bytes([i])).hexdigest(),
            (p[:200] if i > BAD[0] else b"no picture") if i in bad else p,
            "png",
            f"a fox {i}",
        )
        for i, p in enumerate(pictures)
    ]
    pack(samples, folder, samples_per_shard=8)
    return folder


def keys(bad: tuple[int, ...] = BAD) -> set[str]:
    return {hashlib.sha256(bytes([i])).hexdigest() for i in bad}


def recipe(models: Path, **changes: object) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 4, "checkpoint_s": 1e-9}
    tree = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1, "adapt": phase, "distill": phase}
    return TrainerRecipe.model_validate(tree | {"max_corrupt_share": 0.2} | changes)


def test_a_stand_in_follows_from_the_draw_alone_whoever_asks(tmp_path) -> None:
    folder = write(tmp_path / "data")

    def ids(draws: list[int], stream: MixedStream) -> dict[int, str]:
        return {draw: stream.read_draw(draw, 32).id for draw in draws}

    whole = MixedStream([Source(folder)], 5, max_corrupt_share=1)
    wanted = ids(list(range(96)), whole)
    assert not set(wanted.values()) & keys()
    backwards = MixedStream([Source(folder)], 5, max_corrupt_share=1)
    assert ids(list(reversed(range(96))), backwards) == wanted
    workers = [MixedStream([Source(folder)], 5, max_corrupt_share=1) for _ in range(3)]
    found: dict[int, str] = {}
    for start in range(0, 96, 6):  # batches of six, two draws a worker, what each found told to all
        for rank, stream in enumerate(workers):
            found |= ids([start + 2 * rank, start + 2 * rank + 1], stream)
        news = sorted({pair for stream in workers for pair in stream._new.items()})
        for stream in workers:
            stream.gather = lambda _, news=news: news
            stream.settle()
    assert found == wanted
    whole.settle()
    assert all(stream.skipped == whole.skipped for stream in workers) and len(whole.skipped) == len(BAD)


@pytest.mark.long
def test_a_training_skips_names_and_resumes_to_the_byte(tiny_models, tmp_path, monkeypatch) -> None:
    folder, settings = write(tmp_path / "data"), recipe(tiny_models)
    loop.train(settings, folder, tmp_path / "whole", seed=1)
    (fact,) = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert {row["key"] for row in fact["skipped"]} == keys()
    assert all(row["shard"].startswith("shard-") and "cannot be decoded" in row["reason"] for row in fact["skipped"])
    assert [row["data"] for row in _skipped_part(tmp_path / "whole")] == [str(folder)] * 2, "and the report says so"
    saved = fit.save_state

    def save_and_die(*args: Any) -> None:
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_state", save_and_die)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            loop.train(settings, folder, tmp_path / "broken", seed=1)
    monkeypatch.setattr(fit, "save_state", saved)
    loop.train(settings, folder, tmp_path / "broken", seed=1)
    for name in ("adapt/unet/diffusion_pytorch_model.safetensors", "distill/unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert (tmp_path / "whole" / "data.json").read_bytes() == (tmp_path / "broken" / "data.json").read_bytes()


def test_too_many_end_the_training_in_words(tiny_models, tmp_path) -> None:
    folder = write(tmp_path / "data")
    with pytest.raises(CorruptShard, match=r"above trainer\.max_corrupt_share 2\.0%.*cannot be decoded") as caught:
        loop.train(recipe(tiny_models, max_corrupt_share=0.02), folder, tmp_path / "out", seed=11)  # met in step 3
    assert "shard-00000" in str(caught.value) and "factory repair" in str(caught.value)
    assert list((tmp_path / "out" / "adapt" / "checkpoints").glob("step-*"))
    loop.train(recipe(tiny_models, max_corrupt_share=0.5), folder, tmp_path / "out", seed=11)
    assert (tmp_path / "out" / "distill" / "unet").exists(), "raised, it goes on from there"


def test_a_missing_and_a_damaged_shard_stop_or_are_skipped_as_the_recipe_says(tiny_models, tmp_path) -> None:
    folder = write(tmp_path / "data", bad=())
    (folder / "shard-000002.tar").unlink()
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"\x89PNG") + 100  # in the first sample's picture
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptShard, match="shard-000000"):
        loop.train(recipe(tiny_models), folder, tmp_path / "stop", seed=1)
    with pytest.raises(CorruptShard, match="9 of 24 samples cannot be read"):
        loop.train(recipe(tiny_models, on_corrupt="skip"), folder, tmp_path / "many", seed=1)
    settings = recipe(tiny_models, on_corrupt="skip", max_corrupt_share=0.5)
    loop.train(settings, folder, tmp_path / "skip", seed=1)
    (fact,) = json.loads((tmp_path / "skip" / "data.json").read_text())
    reasons = {row["key"]: row["reason"] for row in fact["skipped"]}
    rows = read_manifest(folder)
    assert reasons == {
        rows[0]["id"]: "its bytes are not what the manifest says",
        **{row["id"]: "its shard is missing" for row in rows[16:]},
    }


def test_a_shard_cut_short_gives_what_lies_before_the_cut(tmp_path) -> None:
    folder = write(tmp_path / "data", bad=())
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    stream = ShardStream(folder, on_corrupt="skip")
    assert 0 < len(stream.damaged) < 8 and all(8 <= row < 16 for row in stream.damaged)
    for row in set(range(24)) - set(stream.damaged):
        assert stream.read(row).pixels(32).shape == (32, 32, 3)


def test_a_manifest_that_lies_and_a_set_without_a_whole_sample_are_refused_all_the_same(tiny_models, tmp_path) -> None:
    folder = write(tmp_path / "data", bad=tuple(range(24)))
    stream = MixedStream([Source(folder)], 5, max_corrupt_share=1)
    with pytest.raises(CorruptShard, match="samples in a row cannot be read"):
        stream.read_draw(0, 32)
    with pytest.raises(CorruptSample, match="cannot be decoded"):
        stream.read(0).pixels()
    (folder / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptShard, match="manifest"):
        loop.train(recipe(tiny_models, on_corrupt="skip"), folder, tmp_path / "out", seed=1)


def test_zero_samples_after_filters_are_refused_with_the_remedy(tiny_models, tmp_path) -> None:
    pack([], tmp_path / "data")
    with pytest.raises(EdgeFusionError, match=r"the data set is empty.*min_clip"):
        loop.train(recipe(tiny_models), tmp_path / "data", tmp_path / "out", seed=1)
