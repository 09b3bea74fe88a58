"""Training on a data set that lies on S3 (a stand-in on loopback): the student is that of the same data set on disk."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from typer.testing import CliRunner

import trainer.loop as loop
from cluster.cache import CacheRecipe, RemoteFolder
from cluster.errors import CorruptShard, RecipeError
from cluster.runner import InProcess
from factory.pack import MANIFEST, Sample, pack
from factory.stages import encode_picture
from tests.s3 import s3_bucket
from trainer.cli import app
from trainer.encode import encode, publish_encodings
from trainer.encodings import read_index
from trainer.mix import MixedStream, Source, sources_of
from trainer.recipe import EncodeRecipe, TrainerRecipe
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


def test_encodings_beside_a_remote_data_set_train_as_those_on_disk(
    url: str, data: Path, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, cache = tmp_path / "own", CacheRecipe(folder=str(tmp_path / "cache"))
    shutil.copytree(data, own)
    words = ["encode", str(own), "--teacher", str(tiny_models / "teacher"), "--size", "32", "--to", url]
    for sent in (1, 0):  # the second time all is there
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert f"sent {sent} of 1 files to {url}/encodings" in done.output
    settings = recipe(tiny_models, url)
    loop.train(settings, [Source(own)], tmp_path / "local", seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(ShardStream, "_bytes", lambda *_: pytest.fail("a shard was read"))
        loop.train(settings, sources_of(settings, data, cache), tmp_path / "remote", seed=1)
    assert students(tmp_path / "remote") == students(tmp_path / "local") != {}
    (fact,) = json.loads((tmp_path / "remote" / "data.json").read_text())
    assert fact["data"] == url and fact["encodings"]["dtype"] == "float32"
    encoders = read_index(own)["encoders"]
    remote = RemoteFolder(url, cache)
    assert ShardStream(remote, encoders=encoders).digest() == ShardStream(own, encoders=encoders).digest()

    files = fsspec.filesystem("s3")
    name = f"{url}/encodings/shard-000000.safetensors"
    sound = files.cat_file(name)
    files.pipe_file(name, sound[:-1] + bytes([sound[-1] ^ 1]))
    elsewhere = RemoteFolder(url, CacheRecipe(folder=str(tmp_path / "other")))
    with pytest.raises(CorruptShard, match=r"encodings/shard-000000\.safetensors: has another checksum"):
        ShardStream(elsewhere, encoders=encoders).read(0)
    files.rm(name)
    files.invalidate_cache()
    with pytest.raises(CorruptShard, match=r"shard-000000\.safetensors: is missing.*encode DATA --to s3://sets/foxes"):
        ShardStream(RemoteFolder(url, cache), encoders=encoders)
    with pytest.raises(CorruptShard, match="other encoders"):
        ShardStream(RemoteFolder(url, cache), encoders="others")
    pack([Sample("0" * 64, encode_picture(np.zeros((32, 32, 3), np.uint8), "png"), "png", "a fox")], tmp_path / "else")
    encode(EncodeRecipe(data=str(tmp_path / "else"), teacher=str(tiny_models / "teacher"), size_px=32), InProcess())
    with pytest.raises(CorruptShard, match="there is another data set than in"):
        publish_encodings(tmp_path / "else", url)


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


def test_on_corrupt_skip_leaves_out_no_shard_of_a_data_set_by_url(url: str, tmp_path: Path) -> None:
    """As docs/training.md says."""
    files, shard = fsspec.filesystem("s3"), f"{url}/shard-000000.tar"
    remote = RemoteFolder(url, CacheRecipe(folder=str(tmp_path / "cache")))
    with files.open(shard, "rb") as file:
        whole = file.read()
    files.pipe(shard, whole[:-1] + b"x")
    stream = ShardStream(remote, on_corrupt="skip")
    assert stream.damaged == {}
    with pytest.raises(CorruptShard, match=r"shard-000000\.tar"):
        stream.read(0)
    files.rm(shard)
    files.invalidate_cache()
    with pytest.raises(CorruptShard, match=r"shard-000000\.tar: is missing"):
        ShardStream(remote, on_corrupt="skip")


def test_a_cache_that_cannot_hold_the_data_set_is_warned_of(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "edgefusion"):
        ShardStream(RemoteFolder(url, CacheRecipe(folder=str(tmp_path), limit_gib=1e-6)))
    assert "Raise cluster.cache.limit_gib" in caplog.text
