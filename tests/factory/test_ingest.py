"""Real pictures in: what is good arrives whole, what is bad ends as a dead letter or a plain error, and nothing is written elsewhere."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import EdgeFusionError, RecipeError, StageError
from cluster.runner import InProcess
from factory.index import to_columns
from factory.ingest import fetch, planned_rows
from factory.ledger import read_entry
from factory.make import make, select_and_pack
from factory.pack import read_manifest, read_shard
from factory.plan import make_plan
from factory.recipe import FactoryRecipe, PicturePlan, SelectRecipe
from factory.repair import repair
from factory.select import select
from factory.stages import decode_picture, encode_picture, open_crops
from factory.units import planned_units
from factory.verify import verify


def drawing(seed: int, kind: str = "PNG", size: tuple[int, int] = (80, 64)) -> bytes:
    rng, sink = np.random.default_rng(seed), io.BytesIO()
    cells = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(sink, format=kind)
    return sink.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def plan_of(*paths: Path, **keys) -> list[dict]:
    return list(planned_rows(PicturePlan(paths=[str(p) for p in paths], **keys)))


def recipe_of(models: Path, *paths: Path, **select) -> FactoryRecipe:
    return FactoryRecipe.model_validate(
        {
            "plan": {"kind": "pictures", "paths": [str(p) for p in paths]},
            "make": {
                "crop": {"size_px": 64},
                "captioner": {"kind": "transformers", "model": str(models / "captioner"), "max_new_tokens": 6},
                "scorer": {"kind": "open_clip", "model": str(models / "clip")},
                "unit_images": 8,
            },
            "select": {"min_clip": -1, **select},
        }
    )


def test_folder_shard_and_parquet_give_the_same_pictures_and_texts(tmp_path: Path) -> None:
    samples = [(drawing(i), f"a picture of {i}") for i in range(5)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, (data, text) in enumerate(samples):
        (folder / f"{i}.png").write_bytes(data)
        (folder / f"{i}.txt").write_text(text)
    tar = write_tar(
        tmp_path / "a.tar",
        [m for i, (data, text) in enumerate(samples) for m in ((f"{i}.png", data), (f"{i}.txt", text.encode()))],
    )
    parquet = tmp_path / "a.parquet"
    table = pa.table({"image": [d for d, _ in samples], "caption": [t for _, t in samples]})
    pq.write_table(table, parquet, row_group_size=2)
    found = [
        plan_of(folder),
        plan_of(tar),
        plan_of(parquet, picture_column="image", text_column="caption"),
    ]
    for rows in found:
        assert [row["prompt"] for row in rows] == [text for _, text in samples]
        assert [fetch(row["source"], row["picture_sha256"]) for row in rows] == [data for data, _ in samples]
    assert len({row["id"] for rows in found for row in rows}) == 15
    assert [r["id"] for r in plan_of(tar)] == [r["id"] for r in found[1]]


def test_a_file_that_may_not_be_read_is_planned_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(drawing(i))
    real = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    rows = plan_of(tmp_path)
    assert [row["outcome"] for row in rows] == ["pending", "dead", "pending"]
    assert rows[1]["reason"] == "plan: the file or the text beside it cannot be read (Permission denied)"


def test_where_a_picture_came_from_and_what_was_known_of_it_are_kept(tmp_path: Path) -> None:
    known = {"caption": "a fox", "url": "http://x/1.png", "size": [80, 64], "odd": float("nan"), "half": "\ud800"}
    files = {"a/1.png": drawing(1), "a/1.json": json.dumps(known).encode(), "a/2.png": drawing(2)}
    files |= {"a/2.txt": b"said", "a/2.json": json.dumps({"caption": "not this"}).encode()}
    files |= {"a/3.png": drawing(3), "a/3.json": b"[" * 9000, "a/4.png": drawing(4), "a/4.json": b"x" * (65 << 10)}
    for name, data in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    tar = write_tar(tmp_path / "a.tar", list(files.items()))
    for rows in (plan_of(tmp_path / "folder"), plan_of(tar)):
        assert [row["prompt"] for row in rows] == ["a fox", "said", "", ""]
        sources = [json.loads(row["source"]) for row in rows]
        assert [source["name"] for source in sources] == [f"a/{i}.png" for i in (1, 2, 3, 4)]
        assert sources[0]["metadata"] == {**known, "odd": None, "half": "?"}
        assert "metadata" in sources[1] and "metadata" not in sources[2] and "metadata" not in sources[3]
    table = pa.table({"picture": [drawing(1)], "text": ["x"], "site": ["s"], "when": [pa.scalar(0, pa.timestamp("s"))]})
    pq.write_table(table, tmp_path / "a.parquet")
    row = plan_of(tmp_path / "a.parquet", metadata_columns=["site", "when"])[0]
    assert json.loads(row["source"])["metadata"] == {"site": "s", "when": "1970-01-01 00:00:00"}


def test_a_source_that_changed_after_planning_stops_the_run(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("1.png", drawing(1)), ("1.txt", b"one")])
    row = plan_of(tar)[0]
    write_tar(tar, [("1.png", drawing(2)), ("1.txt", b"one")])
    with pytest.raises(StageError, match="changed after it was planned"):
        fetch(row["source"], row["picture_sha256"])
    tar.unlink()
    with pytest.raises(StageError, match="gone or damaged"):
        fetch(row["source"], row["picture_sha256"])


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no source"):
        plan_of(tmp_path / "nowhere")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "u.parquet")
    with pytest.raises(RecipeError, match="has no column picture"):
        plan_of(tmp_path / "u.parquet")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(RecipeError, match=r"neither a folder nor a \.tar"):
        plan_of(tmp_path / "x.zip")


def test_recipe_refuses_what_cannot_be_combined(tiny_models: Path, tmp_path: Path) -> None:
    tree = recipe_of(tiny_models, tmp_path).model_dump(mode="json")
    teacher = {"kind": "diffusers", "model": str(tiny_models / "teacher")}
    with pytest.raises(ValueError, match="leave the teacher out"):
        FactoryRecipe.model_validate({**tree, "make": {**tree["make"], "teacher": teacher}})
    with pytest.raises(ValueError, match=r"make\.teacher is missing"):
        FactoryRecipe.model_validate(
            {**tree, "plan": {"taxonomy": "x", "prompts": 1, "writer": {"kind": "transformers", "model": "y"}}}
        )


def test_crops_take_the_centre_and_both_ends() -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, :32], wide[:, 96:] = (255, 0, 0), (0, 0, 255)
    (centre, start, end), size = open_crops(encode_picture(wide, "png"), 64, ends=True)
    assert size == (64, 128) and centre.max() == 0
    assert start[:, 0, 0].min() == 255 and start[..., 2].max() == 0
    assert end[:, -1, 2].min() == 255 and end[..., 0].max() == 0
    tall, _ = open_crops(encode_picture(wide.transpose(1, 0, 2), "png"), 64, ends=True)
    for a, b in zip(tall, (centre, start, end), strict=True):
        assert np.array_equal(a, b.transpose(1, 0, 2))
    assert len(open_crops(encode_picture(wide, "png"), 64, ends=False)[0]) == 1
    assert len(open_crops(encode_picture(wide[:, :64], "png"), 64, ends=True)[0]) == 1


def test_a_large_jpeg_decoded_at_a_fraction_is_the_same_picture() -> None:
    photo = np.asarray(Image.open(io.BytesIO(drawing(3, "PNG", (90, 71)))).resize((901, 709), Image.Resampling.BICUBIC))
    data = encode_picture(photo, "jpg")
    for size_px in (256, 128, 64, 50):
        fast, size = open_crops(data, size_px, ends=True)
        slow, _ = open_crops(encode_picture(decode_picture(data), "png"), size_px, ends=True)
        assert size == (709, 901)
        for a, b in zip(fast, slow, strict=True):
            assert a.shape == (size_px, size_px, 3)
            assert 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)) > 32


def test_from_a_shard_to_a_packed_data_set(tiny_models: Path, tmp_path: Path) -> None:
    """Small pictures and exact copies are rejected, damaged ones dead, the rest packed with a new caption and the old one beside it."""
    members = []
    for i in range(10):
        members += [(f"{i}.png", drawing(i)), (f"{i}.txt", f"raw {i}".encode())]
    members += [("small.png", drawing(50, size=(30, 40))), ("small.txt", b"tiny")]
    members += [("copy.png", drawing(3)), ("copy.txt", b"raw 3")]
    members += [("cut.jpg", drawing(60, "JPEG")[:200]), ("cut.txt", b"cut")]
    members += [("empty.png", b""), ("latin.jpg", drawing(61, "JPEG")), ("latin.txt", b"caf\xe9")]
    tar, out = write_tar(tmp_path / "wild.tar", members), tmp_path / "data"
    recipe = recipe_of(tiny_models, tar, min_size_px=48, max_hamming_bits=0, max_colour_difference=0)
    make_plan(recipe, 0, out)
    make(recipe, out, InProcess())
    counts = select_and_pack(recipe, out)
    assert counts["planned"] == 15 == counts["kept"] + counts["rejected"] + counts["dead"]
    assert counts["dead"] == 3 and counts["reasons"]["rejected: too small"] == 1
    assert counts["reasons"]["rejected: exact duplicate"] >= 1
    assert verify(out) == counts["kept"]
    shard = out / read_manifest(out)[0]["shard"]
    for _, members_of in read_shard(shard):
        facts = json.loads(members_of["json"])
        assert facts["raw_caption"].startswith("raw ") and facts["source"].startswith("wild.tar#")
        assert members_of["txt"].decode() != facts["raw_caption"]
        assert decode_picture(members_of["png"]).shape == (64, 64, 3)

    raw = out / "views" / "l-pp"
    few = recipe.select.model_copy(update={"text": "raw"})
    counts = select_and_pack(recipe, out, few, raw)
    assert verify(raw) == counts["kept"] == 10
    for _, members_of in read_shard(raw / read_manifest(raw)[0]["shard"]):
        facts = json.loads(members_of["json"])
        assert members_of["txt"].decode() == facts["raw_caption"]
        assert facts["clip_score"] == facts["raw_clip_score"]
    shard = next(raw.glob("shard-*.tar"))
    whole = shard.read_bytes()
    shard.unlink()
    assert repair(recipe, out, "wild").rebuilt and shard.read_bytes() == whole  # by the view's own rules

    # L-orig of the same ledger: copies and small ones too, and the centre of the source whichever crop was chosen.
    entries = {row["id"]: row for unit in planned_units(out, 8) for row in read_entry(out, unit.id)}
    assert {row["crop"] for row in entries.values()} >= {"start"} or {row["crop"] for row in entries.values()} >= {
        "end"
    }
    orig = out / "views" / "l-orig"
    changes = {"text": "raw", "crop": "centre", "min_size_px": 0, "same_file": None, "max_hamming_bits": None}
    counts = select_and_pack(recipe, out, recipe.select.model_copy(update=changes), orig)
    assert verify(orig) == counts["kept"] == 12 and counts["rejected"] == 0
    files = {f"raw {i}": drawing(i) for i in range(10)} | {"tiny": drawing(50, size=(30, 40))}
    for key, members_of in read_shard(next(orig.glob("shard-*.tar"))):
        facts = json.loads(members_of["json"])
        centre = open_crops(files[facts["raw_caption"]], 64, ends=False)[0][0]
        assert np.array_equal(decode_picture(members_of["png"]), centre) and facts["crop"] == "centre"
        assert (facts["clip_score"] is None) == (entries[key]["crop"] != "centre")
    shard = next(orig.glob("shard-*.tar"))
    whole = shard.read_bytes()
    shard.unlink()
    assert repair(recipe, out, "wild").rebuilt and shard.read_bytes() == whole
    assert "12 real pictures" in (card := (orig / "README.md").read_text()) and "whose crop was judged" in card


def test_raw_texts_are_for_pictures_that_came_with_some() -> None:
    row = {"id": ["0" * 64], "outcome": ["made"], "reason": [""], "group": [""], "attributes": ["{}"]}
    picture = {
        "hash": pa.array([1], pa.uint64()),
        "colours": pa.array([bytes(12)], pa.binary(12)),
        "made_sha256": ["a"],
    }
    scores = {"clip_score": [0.5], "raw_clip_score": pa.array([None], pa.float64())}
    table = pa.table({**row, **picture, **scores, "has_text": [True], "has_raw_text": [False], "edge_px": [64]})
    with pytest.raises(RecipeError, match=r"factory\.select\.text"):
        select(to_columns(table), SelectRecipe(text="raw"))


def damage(data: bytes, rng: random.Random) -> bytes:
    how = rng.randrange(4)
    if how == 0:
        return data[: rng.randrange(len(data))]
    if how == 1:
        spoilt = bytearray(data)
        for _ in range(rng.randint(1, 40)):
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        return bytes(spoilt)
    if how == 2:
        place = rng.randrange(len(data))
        return data[:place] + rng.randbytes(rng.randint(1, 200)) + data[place:]
    return rng.randbytes(rng.randint(0, 300))


def test_600_damaged_pictures_are_pictures_or_value_errors() -> None:
    found: Counter[str] = Counter()
    for seed in range(600):
        rng = random.Random(seed)
        kind = rng.choice(["PNG", "JPEG", "WEBP"])
        try:
            decode_picture(damage(drawing(seed, kind, (24, 24)), rng))
            found["picture"] += 1
        except ValueError:
            found["refused"] += 1
    assert found["refused"] > 300


def test_200_damaged_archives_end_in_a_plan_or_a_plain_error(tmp_path: Path) -> None:
    """Also names with `..`, absolute names, links and doubled keys: nothing appears outside, nothing crashes."""
    place = tmp_path / "inside" / "w.tar"
    place.parent.mkdir()
    odd = ["../../up.png", "/etc/up.png", "a/../../b.png", "ok.png", "ok.png", "x" * 300 + ".png", ".png", "no-suffix"]
    for seed in range(200):
        rng = random.Random(seed)
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as archive:
            for name in rng.sample(odd, 4):
                data = drawing(seed, size=(8, 8))
                entry = tarfile.TarInfo(name)
                if rng.random() < 0.2:
                    entry.type, entry.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "/etc/passwd"
                    archive.addfile(entry)
                else:
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        place.write_bytes(damage(sink.getvalue(), rng) if seed % 4 else sink.getvalue())
        try:
            rows = plan_of(place)
        except EdgeFusionError:
            continue
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            if row["outcome"] == "pending":
                assert len(fetch(row["source"], row["picture_sha256"])) > 0
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["inside", "w.tar"]


def test_links_out_of_a_folder_are_left_alone(tmp_path: Path) -> None:
    inside, secret = tmp_path / "in", tmp_path / "secret.png"
    inside.mkdir()
    secret.write_bytes(drawing(1))
    (inside / "link.png").symlink_to(secret)
    (inside / "own.png").write_bytes(drawing(2))
    assert [Path(json.loads(r["source"])["file"]).name for r in plan_of(inside)] == ["own.png"]
