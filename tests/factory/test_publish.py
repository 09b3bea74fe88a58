"""Packed data sets in an S3 bucket (a stand-in on loopback): the same bytes, whole or not at all, every damage found there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.cache import CacheRecipe, RemoteFolder
from cluster.errors import CorruptShard, EdgeFusionError, LedgerConflict, RecipeError
from cluster.machine import this_machine
from cluster.recipe import build_recipe
from cluster.remote import RemoteStore
from factory.cli import app
from factory.pack import MANIFEST, Sample, manifest_shards, pack
from factory.publish import CLAIM, check_place, publish
from factory.recipe import PackRecipe
from factory.verify import find_damage, verify
from factory.views import publish_all
from tests.s3 import s3_bucket

ROOT = Path(__file__).parent.parent.parent


def some(count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [
        Sample(
            hashlib.sha256(b"%d %d" % (seed, i)).hexdigest(), rng.randbytes(900), "png", f"prompt é {i}", {"seed": i}
        )
        for i in range(count)
    ]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_bucket(monkeypatch, "sets") as url:
        yield url


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Nine samples in three shards, and a card."""
    pack(some(9), tmp_path / "packed", samples_per_shard=3)
    (tmp_path / "packed" / "README.md").write_text("a card")
    return tmp_path / "packed"


def there(url: str) -> dict[str, bytes]:
    store = RemoteStore(url)
    return {name: store.read(name) for name in store.names()}


def test_what_is_published_is_what_was_packed_and_the_trainer_reads_it(
    bucket: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.stream import ShardStream

    url, seen = f"{bucket}/a/b", list[set[str]]()
    honest = RemoteStore.publish_new
    monkeypatch.setattr(
        RemoteStore,
        "publish_new",
        lambda self, name, data: (seen.append({name, *self.names()}), honest(self, name, data)),
    )
    done = publish(packed, url)
    assert (done.sent, done.there, done.removed) == (3, 0, 0)
    assert there(url) == {path.name: path.read_bytes() for path in packed.iterdir()}
    assert seen == [{CLAIM}, {CLAIM, MANIFEST, "README.md", *(f"shard-{i:06d}.tar" for i in range(3))}], (
        "the manifest last"
    )
    assert verify(RemoteStore(url)) == verify(packed) == 9 and list(find_damage(RemoteStore(url))) == []
    near = ShardStream(packed)
    far = ShardStream(RemoteFolder(url, CacheRecipe(folder=str(tmp_path / "cache"))))
    assert far.digest() == near.digest() and [far.read(i) for i in range(9)] == [near.read(i) for i in range(9)]
    again = publish(packed, url)
    assert (again.sent, again.there) == (0, 3)


def test_another_pack_replaces_the_first_and_is_never_mixed_with_it(
    bucket: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(packed, bucket)
    pack(some(5, seed=1), tmp_path / "other", samples_per_shard=3)
    honest = RemoteStore.send

    def send(self: RemoteStore, name: str, local: Path) -> None:
        assert MANIFEST not in self.names(), "the old manifest vouches for shards of the new pack"
        honest(self, name, local)

    monkeypatch.setattr(RemoteStore, "send", send)
    assert publish(tmp_path / "other", bucket).removed == 1
    assert sorted(there(bucket)) == ["README.md", MANIFEST, "shard-000000.tar", "shard-000001.tar"]
    assert verify(RemoteStore(bucket)) == 5


def test_views_go_beside_the_main_selection(bucket: str, packed: Path) -> None:
    pack(some(2, seed=2), packed / "views" / "best")
    assert [place.url for place in publish_all(packed, f"{bucket}/x/")] == [f"{bucket}/x/views/best", f"{bucket}/x"]
    assert verify(RemoteStore(f"{bucket}/x/views/best")) == 2 and verify(RemoteStore(f"{bucket}/x")) == 9


SLOW = """
import sys, time
from pathlib import Path
from cluster.remote import RemoteStore
from factory.publish import publish
honest = RemoteStore.send
def send(self, name, local):
    honest(self, name, local)
    print(name, flush=True)
    time.sleep(0.2)
RemoteStore.send = send
publish(Path(sys.argv[1]), sys.argv[2])
"""


def test_killed_on_the_way_it_goes_on_and_sends_nothing_twice(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(some(24), tmp_path / "packed", samples_per_shard=2)
    command = [sys.executable, "-c", SLOW, str(tmp_path / "packed"), bucket]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline().startswith(b"shard-")
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = set(RemoteStore(bucket).names())
    assert CLAIM in left and MANIFEST not in left and 4 <= len(left) - 1 < 12
    with pytest.raises(CorruptShard, match=r"manifest\.parquet: there is no manifest\. Packing there did not finish"):
        verify(RemoteStore(bucket))
    sent: list[str] = []
    honest = RemoteStore.send
    monkeypatch.setattr(RemoteStore, "send", lambda self, name, local: (sent.append(name), honest(self, name, local)))
    publish(tmp_path / "packed", bucket)
    assert set(sent) == {f"shard-{i:06d}.tar" for i in range(12)} - left
    assert verify(RemoteStore(bucket)) == 24 and CLAIM not in there(bucket)


def test_what_is_damaged_there_is_sent_again(bucket: str, packed: Path) -> None:
    publish(packed, bucket)
    store, name = RemoteStore(bucket), "shard-000001.tar"
    whole = store.read(name)
    store.publish(name, whole[:-1] + b"!")
    store.remove("shard-000002.tar")
    assert publish(packed, bucket).sent == 2 and verify(store) == 9
    (packed / name).write_bytes(whole[:900])
    store.remove(name)
    with pytest.raises(CorruptShard, match=r"missing or damaged here.*factory repair"):
        publish(packed, bucket)
    with pytest.raises(CorruptShard, match="is missing"):
        verify(store)


def changed(data: bytes, change: Callable[[list[dict[str, Any]]], Any]) -> bytes:
    rows, sink = pq.read_table(io.BytesIO(data)).to_pylist(), io.BytesIO()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def test_every_damage_is_found_there_as_it_is_on_disk(bucket: str, packed: Path) -> None:
    publish(packed, bucket)
    store, shard = RemoteStore(bucket), "shard-000001.tar"
    whole = there(bucket)
    flipped = bytearray(whole[shard])
    flipped[515] ^= 4  # in the first member
    damages: list[tuple[dict[str, bytes | None], str]] = [
        ({shard: None}, r"shard-000001\.tar: is missing"),
        ({shard: whole[shard][: len(whole[shard]) // 2]}, r"shard-000001\.tar: (cannot be read|lacks sample)"),
        ({shard: b""}, r"shard-000001\.tar: cannot be read"),
        ({shard: bytes(flipped)}, r"shard-000001\.tar: sample .* is damaged"),
        ({shard: whole["shard-000000.tar"]}, r"shard-000001\.tar: sample .* not in manifest"),
        ({"shard-000007.tar": whole[shard]}, r"shard-000007\.tar: is not in manifest"),
        ({MANIFEST: None}, "there is no manifest"),
        ({MANIFEST: whole[MANIFEST][:-9]}, r"manifest\.parquet: cannot be read"),
        ({MANIFEST: changed(whole[MANIFEST], lambda rows: rows[3].update(prompt="x"))}, "another prompt"),
        ({MANIFEST: changed(whole[MANIFEST], lambda rows: rows[3].update(sample_sha256="0" * 64))}, "another checksum"),
        ({MANIFEST: changed(whole[MANIFEST], lambda rows: rows.pop(3))}, r"damaged, doubled or not in"),
        ({MANIFEST: changed(whole[MANIFEST], lambda rows: rows.insert(3, rows[3]))}, "is there twice"),
    ]
    for damage, told in damages:
        for name, data in damage.items():
            store.remove(name) if data is None else store.publish(name, data)
        with pytest.raises(CorruptShard, match=told) as error:
            verify(store)
        assert bucket in str(error.value), "it says where"
        assert CliRunner().invoke(app, ["verify", bucket]).exit_code != 0
        for name in damage:
            store.publish(name, whole[name]) if name in whole else store.remove(name)
    said = CliRunner().invoke(app, ["verify", bucket])
    assert said.exit_code == 0 and "9 samples" in said.output


def test_two_who_pack_different_sets_to_one_place(bucket: str, packed: Path, tmp_path: Path) -> None:
    store = RemoteStore(bucket)
    claim = {"manifest_sha256": "0" * 64, "host": "elsewhere", "pid": 7, "when": time.time()}
    store.publish(CLAIM, json.dumps(claim).encode())
    with pytest.raises(LedgerConflict, match="process 7 on elsewhere is packing another data set"):
        publish(packed, bucket)
    assert set(store.names()) == {CLAIM}


def test_a_claim_is_as_old_as_the_store_says_whatever_the_clocks_of_the_hosts(
    bucket: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RemoteStore(bucket)
    claim = {"manifest_sha256": "0" * 64, "host": "elsewhere", "machine": "another", "pid": 7}
    # Written just now by a host whose clock is an hour behind: alive.
    store.publish(CLAIM, json.dumps({**claim, "when": time.time() - 3600}).encode())
    with pytest.raises(LedgerConflict, match="process 7 on elsewhere is packing another data set"):
        publish(packed, bucket)
    # Silent for long, by a host whose clock is an hour ahead: dead.
    store.publish(CLAIM, json.dumps({**claim, "when": time.time() + 3600}).encode())
    monkeypatch.setattr("factory.publish._SILENT_S", 1.0)
    time.sleep(3.0)  # S3 dates to the second
    publish(packed, bucket)
    assert set(store.names()) == {MANIFEST, "README.md", *manifest_shards(packed)} and verify(store) == 9


def test_where_a_store_does_not_date_its_files_a_claim_is_watched(
    bucket: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told = RemoteStore(bucket), list[str]()
    claim = {"manifest_sha256": "0" * 64, "host": "elsewhere", "machine": "another", "pid": 7, "when": 0.0}
    store.publish(CLAIM, json.dumps(claim).encode())
    monkeypatch.setattr(RemoteStore, "age_s", lambda self, name: None)
    monkeypatch.setattr("factory.publish._WATCH_S", 1.0)
    monkeypatch.setattr("factory.publish._LOOK_S", 0.2)

    def hear(what: str, done: int, of: int) -> None:
        told.append(what)
        if len(told) == 2:  # it lives: it refreshes
            store.publish(CLAIM, json.dumps({**claim, "when": 1.0}).encode())

    with pytest.raises(LedgerConflict, match="process 7 on elsewhere"):
        publish(packed, bucket, hear)
    assert told[0] == f"waiting to see whether process 7 on elsewhere still packs to {bucket}"
    publish(packed, bucket)
    assert CLAIM not in store.names() and verify(store) == 9


def test_another_packer_that_is_at_work_is_waited_for_though_the_manifest_there_is_ours(
    packed: Path, tmp_path: Path
) -> None:
    """Between its claim and its first change; else what it has sent would go as shards of nobody."""
    url = f"memory://{tmp_path.name}-claimed"
    publish(packed, url)
    claim = {"manifest_sha256": "0" * 64, "host": "here", "machine": this_machine(), "pid": os.getppid()}
    RemoteStore(url).publish(CLAIM, json.dumps(claim).encode())
    RemoteStore(url).publish("shard-000009.tar", b"of the other set")
    with pytest.raises(LedgerConflict, match=f"process {os.getppid()} on here is packing another data set"):
        publish(packed, url)
    assert "shard-000009.tar" in RemoteStore(url).names()


def test_two_packers_of_one_set_do_not_undo_each_other(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, honest, seen = f"memory://{tmp_path.name}-twice", RemoteStore.send, list[bool]()

    def send(self: RemoteStore, name: str, local: Path) -> None:
        if not seen:
            seen.append(True)
            publish(packed, url)  # the other one overtakes this one and ends
        honest(self, name, local)
        seen.append(MANIFEST in self.names())

    monkeypatch.setattr(RemoteStore, "send", send)
    publish(packed, url)
    assert verify(RemoteStore(url)) == 9 and CLAIM not in RemoteStore(url).names() and seen[-1]


def test_a_set_that_is_packed_anew_while_it_is_sent_is_not_vouched_for(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, honest = f"memory://{tmp_path.name}-anew", RemoteStore.send

    def send(self: RemoteStore, name: str, local: Path) -> None:
        if name == "shard-000002.tar":  # it was proven, and is another when it is read
            other = [Sample(s.id, s.picture[::-1], s.picture_kind, s.prompt, s.facts) for s in some(9)]
            pack(other, packed, samples_per_shard=3)
        honest(self, name, local)

    monkeypatch.setattr(RemoteStore, "send", send)
    with pytest.raises(LedgerConflict, match="was packed anew meanwhile"):
        publish(packed, url)
    assert MANIFEST not in RemoteStore(url).names()
    RemoteStore(url).remove(CLAIM)  # as the next process does, for the one that left it is gone
    publish(packed, url)
    assert verify(RemoteStore(url)) == 9


def test_one_whose_claim_is_taken_stops(
    bucket: str, packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = RemoteStore.send

    def send(self: RemoteStore, name: str, local: Path) -> None:
        honest(self, name, local)
        self.publish(CLAIM, json.dumps({"manifest_sha256": "f" * 64, "host": "elsewhere", "pid": 9}).encode())

    monkeypatch.setattr(RemoteStore, "send", send)
    with pytest.raises(LedgerConflict, match="process 9 on elsewhere"):
        publish(packed, bucket)
    assert MANIFEST not in RemoteStore(bucket).names() and len(RemoteStore(bucket).names()) == 2


def test_large_shards_are_compared_by_the_tag_of_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cluster.remote as remote

    monkeypatch.setattr(remote, "_PART_BYTES", 5 << 20)
    parts = [os.urandom(5 << 20), os.urandom(5 << 20), b"rest"]
    for content in (parts, parts[:2], parts[2:]):
        (tmp_path / "file").write_bytes(b"".join(content))
        digests = b"".join(hashlib.md5(part).digest() for part in content)
        assert remote._tag(tmp_path / "file", compound=True) == f"{hashlib.md5(digests).hexdigest()}-{len(content)}"
    assert remote._tag(tmp_path / "file", compound=False) == hashlib.md5(b"rest").hexdigest()


def said_of(url: str, packed: Path) -> list[str]:
    told: list[str] = []
    for attempt in (lambda: publish(packed, url), lambda: verify(RemoteStore(url)), lambda: check_place(url)):
        with pytest.raises(EdgeFusionError) as error:
            attempt()
        told.append(str(error.value))
    return told


def test_a_store_that_refuses_says_why(bucket: str, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for told in said_of("s3://nosuchbucket/x", packed):
        assert "there is no such bucket. Make it, or correct the address" in told
    with pytest.raises(CorruptShard, match="there is nothing"):
        verify(RemoteStore(f"{bucket}/typo"))
    with pytest.raises(EdgeFusionError, match="cannot be opened"):
        publish(packed, "nosuch://bucket/x")
    for url in ("runs/here", "file:///tmp/x"):
        with pytest.raises(RecipeError, match="is no URL of a store"):
            build_recipe(PackRecipe, {"to": url}, "test")
    endpoint = os.environ["AWS_ENDPOINT_URL"]

    def asked_for_keys(after: str) -> None:
        """Let the stand-in look at keys after so many requests."""
        request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", data=after.encode(), method="POST")
        request.add_header("Content-Type", "text/plain")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()

    import boto3

    iam = boto3.client("iam")
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    asked_for_keys("0")
    try:
        for told in said_of(f"{bucket}/x", packed):
            assert "the store does not accept the key" in told and "AWS_ACCESS_KEY_ID" in told
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        for told in said_of(f"{bucket}/x", packed):
            assert "no permission" in told
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped")
        for told in said_of(f"{bucket}/x", packed):
            assert "the store does not accept the key" in told
    finally:
        asked_for_keys("inf")


def test_the_commands(bucket: str, packed: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["pack", str(packed), "--to", f"{bucket}/set"], catch_exceptions=False)
    assert said.exit_code == 0 and f"{bucket}/set: 3 shards sent, 0 were there" in said.output
    with pytest.raises(RecipeError, match="is no URL of a store"):
        CliRunner().invoke(app, ["pack", str(packed), "--to", "elsewhere"], catch_exceptions=False)
    with pytest.raises(EdgeFusionError, match="is no data set folder"):
        CliRunner().invoke(app, ["pack", str(tmp_path), "--to", bucket], catch_exceptions=False)


def test_select_publishes_what_it_packs(bucket: str, dataset: Path) -> None:
    recipe = dataset.parent / "recipe.yaml"
    recipe.write_text(
        f"{recipe.read_text()}".replace("trainer:", f"  pack: {{samples_per_shard: 5, to: {bucket}/by-hand}}\ntrainer:")
    )
    said = CliRunner().invoke(app, ["select", str(dataset), "--recipe", str(recipe)], catch_exceptions=False)
    assert said.exit_code == 0
    names = (
        "README.md",
        "card-samples.png",
        "croissant.json",
        MANIFEST,
        *(p.name for p in dataset.glob("shard-*.tar")),
    )
    assert there(f"{bucket}/by-hand") == {name: (dataset / name).read_bytes() for name in names}
    files = fsspec.filesystem("s3")
    assert files.exists(f"{bucket}/by-hand/{MANIFEST}")
