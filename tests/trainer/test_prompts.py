"""Prompts from files and from a stand-in for the hub, and what cannot be one."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer.prompts as prompts_module
from cluster.errors import RecipeError, TargetUnavailable
from trainer.prompts import open_hub, read_prompts


def test_coco_captions_are_read_one_a_picture(tmp_path) -> None:
    rows = [
        {"image_id": 2, "id": 7, "caption": "a dog "},
        {"image_id": 1, "id": 9, "caption": "second"},
        {"image_id": 1, "id": 3, "caption": "first"},
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": rows}))
    assert read_prompts(str(path)) == ["a dog", "first"]


def test_a_table_says_its_prompts_in_a_column(tmp_path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_text('file_name,text\n1.jpg,"a fox, running"\n2.jpg,an owl\n')
    assert read_prompts(str(path)) == ["a fox, running", "an owl"]


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.json", "{}", "cannot be read as prompts"),
        ("a.json", '{"annotations": [{"image_id": 1, "id": 1, "caption": 3}]}', "cannot be read as prompts"),
        ("a.csv", "file,size\n1,2\n", "has no column caption or captions"),
        ("a.txt", "\n \n", "holds no prompts"),
    ],
)
def test_what_holds_no_prompts_is_refused(name, text, word, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    try:
        found = read_prompts(str(tmp_path / name))
    except RecipeError as error:
        assert word in str(error) and str(tmp_path / name) in str(error) and error.remedy
    else:
        pytest.fail(f"read {found}")


class Hub:
    """A folder under the hub's names; keeps count of the columns that were fetched."""

    def __init__(self, folder: Path) -> None:
        self.files, self.folder = fsspec.filesystem("file"), folder

    def glob(self, pattern: str) -> list[str]:
        return self.files.glob(f"{self.folder}/{pattern}")

    def open(self, path: str, mode: str) -> Any:
        return self.files.open(path, mode)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(prompts_module, "open_hub", lambda: Hub(tmp_path))
    return tmp_path / "datasets" / "some"


def put(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_captions_come_from_the_hub_by_name(hub) -> None:
    put(hub / "coco@main/data/train-00000-of-00002.parquet", image=[b"x", b"y"], caption=["a dog", "a cat"])
    put(hub / "coco@main/data/train-00001-of-00002.parquet", image=[b"z"], caption=["a bus"])
    assert read_prompts("hub:some/coco") == ["a dog", "a cat", "a bus"]


def test_of_several_splits_none_is_guessed_and_lists_give_their_first(hub) -> None:
    put(hub / "coco@main/data/train-0.parquet", sentences=[["one", "two"]])
    put(hub / "coco@main/data/test-0.parquet", sentences=[["three", "four"], []], other=["a", "b"])
    with pytest.raises(RecipeError, match=r"has the splits train, test\. Add \?split=test"):
        read_prompts("hub:some/coco")
    assert read_prompts("hub:some/coco?split=test") == ["three"]
    assert read_prompts("hub:some/coco?split=test&column=other") == ["a", "b"]


def test_the_hubs_own_parquet_copy_is_read_where_there_is_no_other(hub) -> None:
    put(hub / "csv@refs%2Fconvert%2Fparquet/default/validation/0000.parquet", text=["a fox"])
    assert read_prompts("hub:some/csv") == ["a fox"]
    assert read_prompts("hub:some/csv?split=validation") == ["a fox"]


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("hub:some/nothing", "has no Parquet files, or is not there"),
        ("hub:some/coco?split=val", "has no split val. There is train"),
        ("hub:some/coco?column=words", "has no column words; it has caption"),
        ("hub:some/coco?spilt=val", "spilt is nothing that can be said"),
        ("hub:some/broken", "cannot be read from the hub (ArrowInvalid"),
    ],
)
def test_what_the_hub_has_not_is_refused_in_words(source, word, hub) -> None:
    put(hub / "coco@main/train.parquet", caption=["a dog"])
    (hub / "broken@main").mkdir(parents=True)
    (hub / "broken@main/train.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(RecipeError) as caught:
        read_prompts(source)
    assert word in str(caught.value) and source in str(caught.value) and caught.value.remedy


def test_without_a_network_the_hub_is_refused_in_words(monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="cannot be read from the hub"):
        read_prompts("hub:some/coco")


def test_without_its_package_the_hub_is_refused_with_the_line_that_installs_it(monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TargetUnavailable, match="pip install huggingface_hub"):
        open_hub()
