"""Training on a data set that lies on S3 (a stand-in on loopback): the student is that of the same data set on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import trainer.loop as loop
from cluster.cache import CacheRecipe, RemoteFolder
from cluster.errors import CorruptShard, RecipeError
from factory.pack import MANIFEST
from tests.s3 import s3_bucket
from trainer.mix import MixedStream, Source, sources_of
from trainer.recipe import TrainerRecipe
from trainer.stream import ShardStream


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, data: Path) -> Iterator[str]:
    """The twelve pictures of `data` in a bucket."""
    with s3_bucket(monkeypatch, "sets") as bucket:
        fsspec.filesystem("s3").put(f"{data}/", f"{bucket}/foxes/", recursive=True)
        yield f"{bucket}/foxes"


def recipe(models: Path, url: str) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 3}
    return TrainerRecipe.model_validate(
        {
            **{"teacher": str(models / "teacher"), "size_px": 32, "threads": 1, "adapt": phase, "distill": phase},
            **{"own_weight": 0, "more_data": [{"data": url}]},
        }
    )


def students(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("unet/*.safetensors"))}


def test_training_by_url_gives_the_bytes_of_training_from_disk(
    url: str, data: Path, tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(tiny_models, url)
    cache = CacheRecipe(folder=str(tmp_path / "cache"))
    loop.train(settings, sources_of(settings, data, cache), tmp_path / "remote", seed=1)
    loop.train(settings, [Source(data)], tmp_path / "local", seed=1)
    assert students(tmp_path / "remote") == students(tmp_path / "local") != {}
    assert f"{url}: 12 samples, by way of the cache" in capsys.readouterr().out
    # The same digest: what was begun on disk may go on by URL.
    remote = RemoteFolder(url, cache)
    assert ShardStream(remote).digest() == ShardStream(data).digest()
    # With the bucket gone, what is cached still trains; only the manifest is asked for.
    files = fsspec.filesystem("s3")
    for path in files.ls(url, refresh=True):
        if not path.endswith(MANIFEST):
            files.rm(path)
    stream = ShardStream(remote, check=False)
    assert [stream.read(row).id for row in range(12)] == [row["id"] for row in stream.rows]
    files.invalidate_cache()
    with pytest.raises(CorruptShard, match=r"s3://sets/foxes/shard-000000\.tar: is missing"):
        ShardStream(remote)


def test_what_is_not_there_or_was_changed_is_refused(url: str, data: Path, tiny_models: Path, tmp_path: Path) -> None:
    cache = CacheRecipe(folder=str(tmp_path / "cache"))
    with pytest.raises(RecipeError, match=r"more_data\.0\.data: there is no packed data set in s3://sets/owls"):
        sources_of(recipe(tiny_models, "s3://sets/owls"), data, cache)
    files = fsspec.filesystem("s3")
    shard = files.cat_file(f"{url}/shard-000000.tar")
    files.pipe_file(f"{url}/shard-000000.tar", shard[:-1] + b"!")
    stream = MixedStream([Source(RemoteFolder(url, cache))])
    with pytest.raises(CorruptShard, match="has another checksum than the manifest says"):
        stream.read(0)


def test_a_cache_that_cannot_hold_the_data_set_is_warned_of(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "edgefusion"):
        ShardStream(RemoteFolder(url, CacheRecipe(folder=str(tmp_path), limit_gib=1e-6)))
    assert "Raise cluster.cache.limit_gib" in caplog.text
