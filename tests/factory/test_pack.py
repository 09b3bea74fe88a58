import hashlib
import io
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from cluster.errors import CorruptShard, EdgeFusionError
from cluster.storage import publish_bytes
from factory.pack import MANIFEST, Sample, first_prompts, pack, read_manifest, read_shard, shard_bytes
from factory.verify import find_damage, verify


def some(count: int) -> list[Sample]:
    rng = random.Random(count)
    return [
        Sample(hashlib.sha256(bytes([i])).hexdigest(), rng.randbytes(900), "png", f"prompt é {i}", {"seed": i})
        for i in range(count)
    ]


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_same_samples_in_any_order_give_the_same_bytes(tmp_path) -> None:
    samples = some(25)
    pack(samples, tmp_path / "a", samples_per_shard=10)
    pack(reversed(samples), tmp_path / "b", samples_per_shard=10)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == [MANIFEST, *(f"shard-{i:06d}.tar" for i in range(3))]
    assert verify(tmp_path / "a") == 25
    prompts = [row["prompt"] for row in read_manifest(tmp_path / "a")]
    assert first_prompts(tmp_path / "a", 12) == prompts[:12] and first_prompts(tmp_path / "a", 99) == prompts


def test_webdataset_reads_what_we_pack(tmp_path) -> None:
    samples = some(7)
    pack(samples, tmp_path, samples_per_shard=10)
    read = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False).decode())
    assert {r["__key__"]: (r["txt"], r["json"]) for r in read} == {
        s.id: (s.prompt, {"seed": s.facts["seed"]}) for s in samples
    }


def test_packing_fewer_samples_again_leaves_no_stale_shard(tmp_path) -> None:
    pack(some(25), tmp_path, samples_per_shard=10)
    pack(some(25)[:5], tmp_path, samples_per_shard=10)
    assert verify(tmp_path) == 5


def test_after_a_kill_only_what_is_missing_or_damaged_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(some(45), tmp_path, samples_per_shard=10)
    whole = contents(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "shard-000000.tar").unlink()
    flipped = bytearray(whole["shard-000001.tar"])
    flipped[900] ^= 1
    (tmp_path / "shard-000001.tar").write_bytes(flipped)
    (tmp_path / "shard-000002.tar").write_bytes(whole["shard-000002.tar"][:-512])
    (tmp_path / "elsewhere").write_bytes((tmp_path / "shard-000003.tar").read_bytes())
    (tmp_path / "shard-000003.tar").unlink()
    (tmp_path / "shard-000003.tar").symlink_to("elsewhere")
    written: list[str] = []
    monkeypatch.setattr(
        "factory.pack.publish_bytes", lambda path, data: (written.append(path.name), publish_bytes(path, data))[1]
    )
    pack(some(45), tmp_path, samples_per_shard=10)
    assert written == [*(f"shard-{i:06d}.tar" for i in range(4)), MANIFEST], "the fifth is right"
    (tmp_path / "elsewhere").unlink()
    assert contents(tmp_path) == whole and not (tmp_path / "shard-000003.tar").is_symlink()
    written.clear()
    pack(some(45), tmp_path, samples_per_shard=10)
    assert written == [MANIFEST] and contents(tmp_path) == whole


@pytest.mark.parametrize("count", [25, 7, 0])
@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_killed_while_it_packs_other_samples_it_is_whole_or_says_that_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, writes: int
) -> None:
    left = [writes]

    def publish(path: Path, data: bytes) -> str:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return publish_bytes(path, data)

    pack(some(25), tmp_path, samples_per_shard=10)
    other = [Sample(s.id, s.picture, s.picture_kind, "another prompt", s.facts) for s in some(25)[:count]]
    monkeypatch.setattr("factory.pack.publish_bytes", publish)
    try:
        pack(other, tmp_path, samples_per_shard=10)
        assert verify(tmp_path) == count
    except KeyboardInterrupt:
        with pytest.raises(EdgeFusionError, match=r"there is no manifest|is no data set folder"):
            verify(tmp_path)


@pytest.mark.parametrize("position", [10, 600, 1500, 4000, -600])
def test_one_flipped_bit_is_found(tmp_path, position) -> None:
    pack(some(5), tmp_path)
    shard = tmp_path / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[position] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptShard, match=r"shard-000000\.tar"):
        verify(tmp_path)


def test_a_changed_sample_is_named(tmp_path) -> None:
    samples = some(3)
    pack(samples, tmp_path)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"prompt \xc3\xa9 1", b"prompt \xc3\xa9 7"))
    with pytest.raises(CorruptShard, match=samples[1].id):
        verify(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_truncated_missing_and_stray_shards_are_found(tmp_path, share) -> None:
    pack(some(9), tmp_path, samples_per_shard=3)
    shard = tmp_path / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CorruptShard, match=r"shard-000001\.tar"):
        verify(tmp_path)
    shard.unlink()
    with pytest.raises(CorruptShard, match="missing"):
        verify(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "shard-000009.tar").write_bytes(whole)
    with pytest.raises(CorruptShard, match="not in manifest"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a.txt", "0" * 64 + "/x.txt"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name) -> None:
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(CorruptShard, match="no shard of ours"):
        list(read_shard(tmp_path / "shard-000000.tar"))


def test_links_are_refused(tmp_path) -> None:
    entry = tarfile.TarInfo("0" * 64 + ".txt")
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        archive.addfile(entry)
    with pytest.raises(CorruptShard, match="no shard of ours"):
        list(read_shard(tmp_path / "shard-000000.tar"))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"id": "../x"}, "64 hex"), ({"prompt": " "}, "empty prompt"), ({"picture_kind": "exe"}, "exe")],
)
def test_bad_samples_are_refused_before_anything_is_written(tmp_path, change, word) -> None:
    good = some(1)[0]
    bad = Sample(**{"id": good.id, "picture": b"x", "picture_kind": "png", "prompt": "a cat", **change})
    with pytest.raises(ValueError, match=word):
        pack([bad], tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="twice"):
        pack([good, good], tmp_path)


def rewritten(folder, change) -> None:
    """The manifest with changed rows, as valid Parquet."""
    rows = pq.read_table(folder / MANIFEST).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / MANIFEST)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[3].update(prompt="another"), "another prompt"),
        (lambda rows: rows[3].update(picture_kind="jpg"), "another prompt or kind"),
        (lambda rows: rows[3].update(sample_sha256="0" * 64), "another checksum"),
        (lambda rows: rows[3].update(shard_sha256="0" * 64), "wrong checksum though its samples are whole"),
        (lambda rows: rows[3].update(shard="shard-000000.tar"), "stands out of order|not in manifest|lacks sample"),
        (lambda rows: rows[3].update(shard="../shard-000000.tar"), "no data set of ours has"),
        (lambda rows: rows[3].update(prompt=None), "has no prompt"),
        (lambda rows: rows[3].update(id="f" * 64), "stands out of order|lacks sample|not in manifest"),
        (lambda rows: rows.insert(3, rows[3]), "is there twice"),
        (lambda rows: rows.append({**rows[3], "shard": "shard-000002.tar"}), "stands out of order"),
        (lambda rows: rows.pop(3), "not in manifest"),
    ],
)
def test_every_wrong_row_of_the_manifest_is_found(tmp_path, change, told) -> None:
    pack(some(9), tmp_path, samples_per_shard=3)
    rewritten(tmp_path, change)
    with pytest.raises(CorruptShard, match=told):
        verify(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_a_doubled_key_in_a_shard_is_found_though_every_checksum_fits(tmp_path, beside) -> None:
    samples = sorted(some(4), key=lambda sample: sample.id)
    pack(samples, tmp_path)
    doubled = [samples[0], samples[0], *samples[1:]] if beside else [*samples, samples[0]]
    digest = publish_bytes(tmp_path / "shard-000000.tar", shard_bytes(doubled))
    rewritten(tmp_path, lambda rows: [row.update(shard_sha256=digest) for row in rows])
    with pytest.raises(CorruptShard, match=r"twice|doubled"):
        verify(tmp_path)


def test_everything_that_is_wrong_is_listed(tmp_path) -> None:
    pack(some(12), tmp_path, samples_per_shard=3)
    (tmp_path / "shard-000000.tar").unlink()
    (tmp_path / "shard-000002.tar").write_bytes(b"x" * 700)
    (tmp_path / "shard-000007.tar").write_bytes(b"")
    found = sorted(Path(error.where).name for error in find_damage(tmp_path))
    assert found == ["shard-000000.tar", "shard-000002.tar", "shard-000007.tar"]
