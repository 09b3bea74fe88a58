"""The packed result in other people's tools: webdataset, HF datasets, DuckDB; and a card that tells the truth about it."""

from __future__ import annotations

import importlib
import io
import json
import re
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.runner import InProcess
from cluster.storage import digest_file
from factory.card import CARD, CROISSANT, GRID, write_card
from factory.make import make, select_and_pack
from factory.pack import MANIFEST, read_manifest, read_shard
from factory.plan import make_plan
from factory.recipe import FactoryRecipe


@pytest.fixture(scope="module")
def data(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "data"
    recipe = recipe_of(tiny_models)
    make_plan(recipe, 3, folder)
    make(recipe, folder, InProcess())
    write_card(folder, recipe, select_and_pack(recipe, folder), "tiny")
    return folder


def recipe_of(models: Path) -> FactoryRecipe:
    return FactoryRecipe.model_validate(
        {
            "plan": {
                "taxonomy": str(models / "taxonomy.yaml"),
                "prompts": 12,
                "writer": {"kind": "transformers", "model": str(models / "writer"), "max_new_tokens": 8},
            },
            "make": {
                "teacher": {
                    "kind": "diffusers",
                    "model": str(models / "teacher"),
                    "steps": 2,
                    "size_px": 32,
                    "batch_images": 4,
                },
                "scorer": {"kind": "open_clip", "model": str(models / "clip")},
                "unit_images": 4,
            },
            "select": {"min_clip": -1, "max_hamming_bits": 0, "max_colour_difference": 0},
            "pack": {"samples_per_shard": 5},
        }
    )


def test_the_card_counts_what_is_there(data: Path, tiny_models: Path) -> None:
    import pyarrow.parquet as pq

    text, kept = (data / CARD).read_text(), pq.read_table(data / MANIFEST).num_rows
    assert f"| kept | {kept} |" in text and f"{kept} AI-generated pictures" in text
    assert str(tiny_models / "teacher") in text and "## Balance" in text and "background" in text
    assert (data / GRID).read_bytes().startswith(b"\x89PNG")
    croissant = json.loads((data / CROISSANT).read_text())
    assert {f["contentUrl"] for f in croissant["distribution"] if f["@type"] == "cr:FileObject"} == {
        MANIFEST,
        *(p.name for p in data.glob("shard-*.tar")),
    }
    before = (data / CARD).read_bytes()
    recipe = recipe_of(tiny_models)
    write_card(data, recipe, select_and_pack(recipe, data), "tiny")
    assert (data / CARD).read_bytes() == before


def test_licences_are_the_recipes_or_the_zoos_or_said_to_lack(data: Path, tiny_models: Path) -> None:
    tree = recipe_of(tiny_models).model_dump(mode="json")
    tree["make"]["scorer"]["model"] = "zoo:clip"
    page = "https://example.org/licence"
    tree["sources"] = [
        {"name": str(tiny_models / "teacher"), "licence": "CC-BY-4.0", "url": page},
        {"name": "emoji pictures", "licence": "MIT"},
    ]
    recipe = FactoryRecipe.model_validate(tree)
    funnel = select_and_pack(recipe, data)
    text = write_card(data, recipe, funnel, "tiny").read_text()
    assert f"[CC-BY-4.0]({page})" in text and "| emoji pictures" not in text and "| `emoji pictures` |  | MIT |" in text
    assert "| filter | `zoo:clip` | `sha256 " in text and "` | Apache-2.0 |" in text
    assert f"Not known is that of `{tiny_models / 'writer'}`: name it in `factory.sources`" in text
    croissant = json.loads((data / CROISSANT).read_text())
    assert croissant["license"] == ["CC-BY-4.0", "Apache-2.0", "MIT"]
    based = {one["name"]: one for one in croissant["isBasedOn"]}
    assert based[str(tiny_models / "teacher")]["url"] == page and "license" not in based[str(tiny_models / "writer")]
    tree["sources"].append({"name": str(tiny_models / "writer"), "licence": "MIT"})
    assert "Not known" not in write_card(data, FactoryRecipe.model_validate(tree), funnel, "tiny").read_text()


def test_croissant_is_what_its_own_library_takes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks by hand hold everywhere; MLCommons' library, where it is installed, checks all of the format."""
    tree = json.loads((data / CROISSANT).read_text())
    assert tree["conformsTo"] == "http://mlcommons.org/croissant/1.0" and tree["@type"] == "sc:Dataset"
    assert tree["@context"]["recordSet"] == "cr:recordSet", "without it readers find no record set"
    objects = {one["@id"]: one for one in tree["distribution"]}
    pictures = objects.pop("picture-files")
    for one in objects.values():
        assert one["@type"] == "cr:FileObject" and one["sha256"] == digest_file(data / one["contentUrl"])
        assert {"@type", "@id", "name", "encodingFormat"} <= set(one)
    for record in tree["recordSet"]:
        for field in record["field"]:
            (place,) = (field["source"][kind]["@id"] for kind in ("fileObject", "fileSet") if kind in field["source"])
            assert place in (*objects, "picture-files") and field["@id"].startswith(f"{record['@id']}/")
    shards = [one["@id"] for one in pictures["containedIn"]]
    assert {*shards, "manifest"} == set(objects) and pictures["encodingFormat"] == "image/png"
    regex = tree["recordSet"][1]["field"][0]["source"]["transform"]["regex"]
    names: list[str] = []
    for shard in shards:
        with tarfile.open(data / shard) as archive:
            names += archive.getnames()
    assert pq.read_table(data / MANIFEST)["id"].to_pylist() == [
        found[1] for name in names if fnmatch(name, pictures["includes"]) and (found := re.search(regex, name))
    ]
    mlcroissant = pytest.importorskip("mlcroissant", reason="pip install mlcroissant")
    # It unpacks shards into the cache of the user and knows them by their names alone: those of another test would be taken for these.
    extract = importlib.import_module("mlcroissant._src.operation_graph.operations.extract")
    monkeypatch.setattr(extract, "EXTRACT_PATH", type(extract.EXTRACT_PATH)(tmp_path))
    found = mlcroissant.Dataset(str(data / CROISSANT))
    assert not found.metadata.ctx.issues.errors
    ids = [row["samples/id"].decode() for row in found.records("samples")]
    manifest = read_manifest(data)
    assert ids == [row["id"] for row in manifest]
    shown = {row["pictures/id"].decode(): row for row in found.records("pictures")}
    assert len(shown) == len(manifest) > 0
    for shard in shards:
        for key, members in read_shard(data / shard):
            assert shown[key]["pictures/text"] == members["txt"]
            wanted = Image.open(io.BytesIO(members["png"]))
            assert shown[key]["pictures/image"].tobytes() == wanted.tobytes()


def test_webdataset_reads_the_shards(data: Path) -> None:
    import pyarrow.parquet as pq
    import webdataset

    shards = [str(p) for p in sorted(data.glob("shard-*.tar"))]
    found = {s["__key__"]: s["txt"].decode() for s in webdataset.WebDataset(shards, shardshuffle=False)}
    rows = pq.read_table(data / MANIFEST).to_pylist()
    assert found == {row["id"]: row["prompt"] for row in rows}


def test_hf_datasets_reads_shards_and_manifest(data: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    shards = [str(p) for p in sorted(data.glob("shard-*.tar"))]
    samples = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path))
    manifest = datasets.load_dataset("parquet", data_files=str(data / MANIFEST), split="train", cache_dir=str(tmp_path))
    assert len(samples) == len(manifest) > 0
    assert samples[0]["png"].size == (32, 32) and samples[0]["txt"] in set(manifest["prompt"])


def test_duckdb_reads_manifest_and_ledger(data: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="pip install duckdb")
    query = f"select count(*) from '{data}/{MANIFEST}' m join '{data}/ledger/*.parquet' l using (id) where l.outcome = 'made'"
    packed = duckdb.sql(f"select count(*) from '{data}/{MANIFEST}'").fetchall()
    assert duckdb.sql(query).fetchall() == packed and packed[0][0] > 0
