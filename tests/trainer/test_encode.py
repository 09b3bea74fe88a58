"""Encodings beside the shards: the same numbers as encoding in training, used and told, bound to their encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from typer.testing import CliRunner

import trainer.encode as encode_module
import trainer.loop as loop
from cluster.errors import CorruptShard
from cluster.runner import InProcess
from cluster.storage import digest_file
from factory.pack import read_manifest
from factory.verify import verify
from trainer.cli import app
from trainer.encode import encode
from trainer.encodings import ENCODINGS, INDEX, encoders_digest
from trainer.latents import Encoder
from trainer.mix import Source
from trainer.recipe import AdaptRecipe, DistillRecipe, EncodeRecipe, TrainerRecipe
from trainer.stream import ShardStream


@pytest.fixture
def own(data: Path, tmp_path: Path) -> Path:
    """A copy of the data set in three shards."""
    from factory.pack import Sample, pack, read_shard

    samples = [
        Sample(key, members["png"], "png", members["txt"].decode(), json.loads(members["json"]))
        for key, members in read_shard(data / "shard-000000.tar")
    ]
    pack(samples, tmp_path / "own", samples_per_shard=5)
    return tmp_path / "own"


def settings(models: Path, data: Path, **changes: object) -> EncodeRecipe:
    keys = {"data": str(data), "teacher": str(models / "teacher"), "size_px": 32, "threads": 1, **changes}
    return EncodeRecipe.model_validate(keys)


def recipe(models: Path, **changes: object) -> TrainerRecipe:
    phase = {"batch_images": 4, "learning_rate": 1e-3, "steps": 3}
    keys = {"teacher": str(models / "teacher"), "size_px": 32, "threads": 1}
    return TrainerRecipe.model_validate(
        {**keys, "adapt": AdaptRecipe(**phase, empty_prompt_share=0.5), "distill": DistillRecipe(**phase), **changes}
    )


def test_encodings_are_what_training_would_have_made(tiny_models: Path, own: Path) -> None:
    before = {path.name: digest_file(path) for path in own.iterdir()}
    index = encode(settings(tiny_models, own), InProcess())
    assert {path.name: digest_file(path) for path in own.iterdir() if path.is_file()} == before and verify(own) == 12
    assert len(index["files"]) == 3
    pipeline = loop.open_pipeline(str(tiny_models / "teacher"))
    encoder = Encoder(pipeline, 32, torch.device("cpu"), cache=False)
    stream = ShardStream(own, encoders=encoders_digest(pipeline, 32))
    live = ShardStream(own)
    kept, made = ([s.read(row) for row in (11, 0, 6)] for s in (stream, live))
    assert all(e.encoded and not e.picture for e in kept) and [e.id for e in kept] == [e.id for e in made]
    torch.testing.assert_close(encoder.latents(kept), encoder.latents(made), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.texts_of(kept), encoder.texts_of(made), rtol=1e-5, atol=1e-5)
    drop = [False, True, False]
    torch.testing.assert_close(encoder.texts_of(kept, drop), encoder.texts_of(made, drop), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(encoder.texts_of(kept, drop)[1], encoder.texts_of(kept)[1])
    stream.close()


def test_training_reads_them_says_so_and_touches_no_picture(
    tiny_models: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(recipe(tiny_models), own, tmp_path / "live", seed=1)
    assert "cached encodings" not in capsys.readouterr().out
    encode(settings(tiny_models, own), InProcess())
    monkeypatch.setattr(ShardStream, "_bytes", lambda *_: pytest.fail("a picture was read"))
    loop.train(recipe(tiny_models), own, tmp_path / "cached", seed=1)
    assert "cached encodings (float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "cached" / "data.json").read_text())[0]["encodings"]["dtype"] == "float32"
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "distill" / "metrics.jsonl").read_text().splitlines()]
        for name in ("live", "cached")
    ]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3) and len(logs[0]) == 3


def test_a_mixture_of_encoded_and_plain_sets_trains(tiny_models: Path, own: Path, data: Path, tmp_path: Path) -> None:
    encode(settings(tiny_models, own), InProcess())
    loop.train(recipe(tiny_models), [Source(own), Source(data)], tmp_path / "mix", seed=1)
    facts = json.loads((tmp_path / "mix" / "data.json").read_text())
    assert facts[0]["encodings"] and facts[1]["encodings"] is None


def test_stale_encodings_are_refused(tiny_models: Path, own: Path, tmp_path: Path) -> None:
    from factory.pack import Sample, pack, read_shard

    encode(settings(tiny_models, own), InProcess())
    other = tmp_path / "teacher"
    shutil.copytree(tiny_models / "teacher", other)
    pipeline = loop.open_pipeline(str(other))
    with torch.no_grad():
        next(pipeline.vae.encoder.parameters()).mul_(1.01)
    pipeline.vae.save_pretrained(other / "vae")
    with pytest.raises(CorruptShard, match="other encoders or at another size"):
        loop.train(recipe(tiny_models, teacher=str(other)), own, tmp_path / "a", seed=1)
    with pytest.raises(CorruptShard, match="other encoders or at another size"):
        loop.train(recipe(tiny_models, size_px=64), own, tmp_path / "b", seed=1)
    loop.train(recipe(tiny_models, teacher=str(other), encodings="ignore"), own, tmp_path / "c", seed=1)

    members = dict(read_shard(own / "shard-000000.tar"))
    pack([Sample(key, m["png"], "png", "another caption") for key, m in members.items()], own)
    with pytest.raises(CorruptShard, match="another packing"):
        loop.train(recipe(tiny_models), own, tmp_path / "d", seed=1)
    encode(settings(tiny_models, own), InProcess())  # replaced, and what no shard has any more is gone
    assert len(list((own / ENCODINGS).iterdir())) == 2
    loop.train(recipe(tiny_models), own, tmp_path / "d", seed=1)


def test_a_damaged_file_and_a_damaged_index_are_refused(tiny_models: Path, own: Path, tmp_path: Path) -> None:
    encode(settings(tiny_models, own), InProcess())
    file = own / ENCODINGS / "shard-000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptShard, match="shard-000001"):
        loop.train(recipe(tiny_models), own, tmp_path / "a", seed=1)
    before = bytes(content)
    encode(settings(tiny_models, own), InProcess())
    assert file.read_bytes() != before, "the damaged file was made anew, not vouched for"
    ShardStream(own, encoders=json.loads((own / ENCODINGS / INDEX).read_text())["encoders"])
    (own / ENCODINGS / INDEX).write_text("{")
    with pytest.raises(CorruptShard, match="cannot be read"):
        loop.train(recipe(tiny_models), own, tmp_path / "a", seed=1)


def test_interrupted_it_goes_on_and_ends_in_the_same_bytes(
    tiny_models: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = encode(settings(tiny_models, own), InProcess())
    shutil.rmtree(own / ENCODINGS)
    publish, count = encode_module.publish_bytes, []

    def die(path: Path, content: bytes) -> str:
        count.append(path.name)
        if len(count) == 2:
            raise KeyboardInterrupt
        return publish(path, content)

    monkeypatch.setattr(encode_module, "publish_bytes", die)
    with pytest.raises(KeyboardInterrupt):
        encode(settings(tiny_models, own), InProcess())
    assert not (own / ENCODINGS / INDEX).exists()
    assert encode(settings(tiny_models, own), InProcess()) == wanted
    assert times_written(count) == {
        "shard-000000.safetensors": 1,
        "shard-000001.safetensors": 2,
        "shard-000002.safetensors": 1,
    }


def test_a_file_that_no_index_vouches_for_is_read_before_it_is_trusted(tiny_models: Path, own: Path) -> None:
    """A kill came before the index: zeros in the middle of a file, behind a whole header, are not taken for encodings."""
    wanted = encode(settings(tiny_models, own), InProcess())
    whole, torn, older = (own / ENCODINGS / f"shard-{i:06d}.safetensors" for i in range(3))
    (own / ENCODINGS / INDEX).unlink()
    torn.write_bytes((content := torn.read_bytes())[:-2000] + bytes(2000))
    with safe_open(older, "pt") as file:  # as a version without digests wrote it
        tensors, bound = {name: file.get_tensor(name) for name in ("latents", "text")}, file.metadata()["binding"]
    older.write_bytes(save(tensors, {"binding": bound.split()[0]}))
    before = whole.stat().st_mtime_ns
    assert encode(settings(tiny_models, own), InProcess()) == wanted
    assert whole.stat().st_mtime_ns == before and torn.read_bytes() == content


def times_written(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in names}


def test_the_command(tiny_models: Path, own: Path) -> None:
    words = ["encode", str(own), "--teacher", str(tiny_models / "teacher"), "--size", "32", "--half"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "3 shards" in said.output and len(read_manifest(own)) == 12
    index = json.loads((own / ENCODINGS / INDEX).read_text())
    assert index["dtype"] == "float16"
