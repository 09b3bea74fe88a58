"""Several data sets as one stream: shares, order, resume, world sizes, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trainer.loop as loop
from cluster.errors import CorruptShard, RecipeError
from cluster.runner import InProcess
from cluster.storage import digest_file
from factory.pack import MANIFEST, Sample, pack
from factory.stages import encode_picture
from trainer.encode import encode
from trainer.latents import Encoder
from trainer.mix import CYCLE, MixedStream, Source, quotas, sources_of
from trainer.recipe import AdaptRecipe, DistillRecipe, EncodeRecipe, TrainerRecipe
from trainer.stream import ShardStream


def write(folder: Path, name: str, count: int) -> Path:
    rng = np.random.default_rng(len(name))
    samples = [
        Sample(
            hashlib.sha256(f"{name}/{i}".encode()).hexdigest(),
            encode_picture(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), "png"),
            "png",
            f"{name} {i}",
        )
        for i in range(count)
    ]
    pack(samples, folder / name, samples_per_shard=8)
    return folder / name


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, "wild", 30), write(tmp_path, "drawn", 10)


def recipe(models: Path, **changes: object) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 3, "checkpoint_s": 1e-9}
    settings = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1}
    return TrainerRecipe.model_validate(
        {**settings, "adapt": AdaptRecipe(**phase), "distill": DistillRecipe(**phase), **changes}
    )


def batch_rows(stream: MixedStream | ShardStream, step: int, batch: int) -> list[int]:
    """Row numbers of the global batch at `step`."""
    return [stream.row_at(draw) for draw in range(step * batch, (step + 1) * batch)]


def test_shares_are_kept_and_each_set_shows_all_before_any_twice(two: tuple[Path, Path]) -> None:
    stream = MixedStream([Source(two[0], 3.0), Source(two[1], 1.0)], seed=5)
    rows = [row for step in range(2 * CYCLE // 4) for row in batch_rows(stream, step, 4)]
    for start in (0, CYCLE):
        assert sum(row >= 30 for row in rows[start : start + CYCLE]) == CYCLE // 4
    for own, count in (([r for r in rows if r < 30], 30), ([r for r in rows if r >= 30], 10)):
        for epoch in range(len(own) // count):
            assert len(set(own[epoch * count : (epoch + 1) * count])) == count
    assert Counter(r >= 30 for r in rows[:128])[True] > 8, "the shares are mixed, not one set after the other"


def test_a_batch_is_a_function_of_the_draw_and_any_world_size_sees_it(two: tuple[Path, Path]) -> None:
    sources = [Source(two[0]), Source(two[1])]
    whole, other = MixedStream(sources, 5), MixedStream(sources, 5)
    wanted = {step: batch_rows(whole, step, 8) for step in range(300)}
    assert all(batch_rows(other, step, 8) == wanted[step] for step in reversed(range(300)))
    # A rank takes its slice of the same global batch (loop.py); batches of half the size are the same draws, too.
    assert all(batch_rows(other, 2 * s, 4) + batch_rows(other, 2 * s + 1, 4) == wanted[s] for s in range(300))
    assert batch_rows(MixedStream(sources, 6), 0, 64) != batch_rows(MixedStream(sources, 5), 0, 64)


def test_without_weights_all_samples_count_alike_and_one_set_keeps_its_order(two: tuple[Path, Path]) -> None:
    assert MixedStream([Source(two[0]), Source(two[1])]).quotas == [768, 256]
    alone = ShardStream(two[0], seed=9)
    assert [batch_rows(MixedStream([Source(two[0])], 9), s, 7) for s in range(9)] == [
        batch_rows(alone, s, 7) for s in range(9)
    ]


def test_rows_are_read_from_their_own_set(two: tuple[Path, Path]) -> None:
    stream = MixedStream([Source(two[0]), Source(two[1])])
    assert {stream.read(row).prompt.split()[0] for row in range(30)} == {"wild"}
    assert {stream.read(row).prompt.split()[0] for row in range(30, 40)} == {"drawn"}
    stream.close()


def test_what_cannot_be_mixed_is_refused_in_words(tiny_models: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    def sources(**keys: object) -> list[Source]:
        return sources_of(recipe(tiny_models, **keys), two[0])

    assert sources(more_data=[{"data": str(two[1]), "weight": 0}]) == [Source(two[0])]
    assert sources(own_weight=0, more_data=[{"data": str(two[1])}]) == [Source(two[1])]
    with pytest.raises(RecipeError, match=r"trainer\.more_data\.0\.data: there is no packed data set"):
        sources(more_data=[{"data": str(tmp_path / "nowhere")}])
    with pytest.raises(RecipeError, match="there twice"):
        sources(more_data=[{"data": str(two[0])}])
    with pytest.raises(RecipeError, match="every weight is 0"):
        sources(own_weight=0)
    with pytest.raises(RecipeError, match="would never be drawn"):
        quotas([1e6, 1.0], ["a", "b"])


def test_a_view_can_stand_in_for_the_main_selection(tiny_models: Path, two: tuple[Path, Path]) -> None:
    write(two[0] / "views", "synt-cur", 5)
    found = sources_of(recipe(tiny_models, own_view="synt-cur", own_weight=2.0), two[0])
    assert found == [Source(two[0] / "views" / "synt-cur", 2.0)]
    stream = MixedStream(found, seed=3)
    assert {stream.read(row).prompt for row in batch_rows(stream, 0, 10)} == {f"synt-cur {i}" for i in range(5)}
    stream.close()
    with pytest.raises(ValueError, match="own_view"):
        recipe(tiny_models, own_view="../elsewhere")
    # Another run's view, and one beside the run's own, are folders like any other.
    more = [{"data": str(two[0])}, {"data": str(write(two[1] / "views", "best", 3)), "weight": 1}]
    found = sources_of(recipe(tiny_models, own_view="synt-cur", more_data=more), two[0])
    assert [len(part) for part in MixedStream(found).parts] == [5, 30, 3]


def test_encodings_of_a_view_lie_beside_its_own_shards(
    tiny_models: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    view, settings = write(two[0] / "views", "few", 5), recipe(tiny_models, own_view="few")
    keys = {"teacher": str(tiny_models / "teacher"), "size_px": 32, "threads": 1}
    for folder in (two[0], view):
        encode(EncodeRecipe(data=str(folder), **keys), InProcess())
    loop.train(settings, sources_of(settings, two[0]), tmp_path / "run", seed=1)
    (fact,) = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (fact["data"], fact["samples"], fact["encodings"]["dtype"]) == (str(view.resolve()), 5, "float32")


def test_a_missing_member_and_a_disagreeing_manifest_are_refused(two: tuple[Path, Path]) -> None:
    path = two[1] / MANIFEST
    table = pq.read_table(path)
    kinds = ["webp", *table["picture_kind"].to_pylist()[1:]]
    pq.write_table(table.set_column(3, "picture_kind", [kinds]), path)
    with pytest.raises(CorruptShard, match="another prompt or kind of picture"):
        MixedStream([Source(two[0]), Source(two[1])])
    pq.write_table(table.set_column(2, "prompt", [[None] * 10]), path)
    with pytest.raises(CorruptShard, match="has no prompt"):
        MixedStream([Source(two[0]), Source(two[1])])
    pq.write_table(table.slice(0, 8), path)
    with pytest.raises(CorruptShard, match=r"not in manifest\.parquet"):
        MixedStream([Source(two[0]), Source(two[1])])


def test_one_id_in_two_pictures_is_encoded_as_two(tiny_models: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        picture = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        pack([Sample("0" * 64, encode_picture(picture, "png"), "png", name)], tmp_path / name)
    stream = MixedStream([Source(tmp_path / "a"), Source(tmp_path / "b")])
    pipeline = loop.open_pipeline(str(tiny_models / "teacher"))
    encoder = Encoder(pipeline, 32, torch.device("cpu"), cache=True)
    first, second = (encoder.latents([stream.read(row)]) for row in (0, 1))
    assert not torch.equal(first, second)


def test_training_on_a_mixture_resumes_exactly_and_refuses_another_mixture(
    tiny_models: Path, two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.fit as fit

    settings, sources = recipe(tiny_models), [Source(two[0], 1.0), Source(two[1], 1.0)]
    loop.train(settings, sources, tmp_path / "whole", seed=1)
    saved, count = fit.save_state, []

    def kill_after_save(*args: Any) -> None:
        saved(*args)
        count.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_state", kill_after_save)
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings, sources, tmp_path / "broken", seed=1)
    with pytest.raises(CorruptShard, match="another recipe or data set"):
        loop.train(settings, [Source(two[0], 3.0), Source(two[1], 1.0)], tmp_path / "broken", seed=1)
    monkeypatch.setattr(fit, "save_state", saved)
    loop.train(settings, sources, tmp_path / "broken", seed=1)
    unet = Path("distill") / "unet" / "diffusion_pytorch_model.safetensors"
    assert count and digest_file(tmp_path / "broken" / unet) == digest_file(tmp_path / "whole" / unet)
    facts = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert [(fact["samples"], fact["share"]) for fact in facts] == [(30, 0.5), (10, 0.5)]
