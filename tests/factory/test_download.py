"""Pictures by URL: what comes arrives whole, what does not is a dead letter with its reason, and the net is asked once."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import RecipeError, StageError
from cluster.runner import InProcess
from factory.address import is_public
from factory.download import _listed, download_all
from factory.ingest import fetch
from factory.make import make, select_and_pack
from factory.plan import make_plan
from factory.recipe import FactoryRecipe
from factory.retry import reopen_urls
from tests.factory.site import Site, drawing, plan_of, rows_of, write_list

pytest.importorskip("aiohttp", reason="extra urls is not installed")


def test_every_failure_is_a_dead_letter_with_its_reason(site: Site, tmp_path: Path) -> None:
    names = ["1.png", "nowhere", "slow", "cut", "large", "endless", "busy", "to/2", "to/1", "inward", "html"]
    rows = rows_of(plan_of(write_list(tmp_path / "u.txt", site, *names)), tmp_path / "data")
    why = dict(zip(names, (row["reason"] for row in rows), strict=True))
    assert {name for name in names if not why[name]} == {"1.png", "busy", "to/1", "html"}
    assert why["nowhere"] == "plan: HTTP 404" and site.asked["nowhere"] == 1
    assert why["slow"] == "plan: no whole answer within 1 s, 3 tries" and site.asked["slow"] == 3
    assert "ClientPayloadError" in why["cut"] and site.asked["cut"] == 3
    assert why["large"] == "plan: 200000 bytes, over the limit"
    assert why["endless"] == "plan: more than 100000 bytes"
    assert why["to/2"] == "plan: more than 2 redirects"
    assert why["inward"] == "plan: not an http or https URL"
    assert site.asked["busy"] == 3
    got = {name: row for name, row in zip(names, rows, strict=True) if not row["reason"]}
    assert fetch(got["1.png"]["source"], got["1.png"]["picture_sha256"], tmp_path / "data") == drawing(1)
    assert json.loads(got["busy"]["source"])["url"] == f"{site.root}/busy"


def test_a_status_that_only_cdns_know_is_asked_again(site: Site, tmp_path: Path) -> None:
    (row,) = rows_of(plan_of(write_list(tmp_path / "u.txt", site, "520")), tmp_path / "data")
    assert (row["reason"], site.asked["520"]) == ("", 2)


def test_from_urls_to_a_packed_data_set_and_again_without_the_net(
    site: Site, tiny_models: Path, tmp_path: Path
) -> None:
    names = [f"{i}.png" for i in range(6)]
    recipe = FactoryRecipe.model_validate(
        {
            "plan": plan_of(
                write_list(tmp_path / "u.txt", site, *names, "html", "bomb", "nowhere", "0.png")
            ).model_dump(),
            "make": {
                "crop": {"size_px": 64},
                "scorer": {"kind": "open_clip", "model": str(tiny_models / "clip")},
                "unit_images": 8,
            },
            "select": {"min_clip": -1},
        }
    )
    written = []
    for name in ("a", "b"):
        out = tmp_path / name
        make_plan(recipe, 0, out)
        make(recipe, out, InProcess())
        counts = select_and_pack(recipe, out)
        assert counts["planned"] == 9 and counts["kept"] == 6 and counts["dead"] == 3, counts
        assert {k: v for k, v in counts["reasons"].items() if "crop" in k} == {"dead: crop": 2}
        written.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*.*") if "index" not in p.parts})
    assert written[0] == written[1]
    asked = site.asked.copy()
    (tmp_path / "a" / "plan.parquet").unlink()
    make_plan(recipe, 0, tmp_path / "a")
    assert (tmp_path / "a" / "plan.parquet").read_bytes() == written[0][Path("plan.parquet")]
    assert site.asked == asked and asked["0.png"] == 2


def test_a_killed_download_goes_on_and_another_list_is_refused(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.download.PART_URLS", 3)
    plan = plan_of(write_list(tmp_path / "u.txt", site, *(f"{i}.png" for i in range(5))))
    first = rows_of(plan, tmp_path / "data")
    (tmp_path / "data" / "downloads" / "part-00001.parquet").unlink()
    assert rows_of(plan, tmp_path / "data") == first
    assert [site.asked[f"{i}.png"] for i in range(5)] == [1, 1, 1, 2, 2]
    write_list(tmp_path / "u.txt", site, "9.png")
    with pytest.raises(StageError, match="another list of URLs"):
        rows_of(plan, tmp_path / "data")


def test_a_slow_url_holds_up_no_part_but_its_own(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.download.PART_URLS", 2)
    names = [name for i in range(4) for name in (f"together/{i}", f"{i}.png")]
    plan = plan_of(write_list(tmp_path / "u.txt", site, *names), tries=1, timeout_s=10)
    assert [row["reason"] for row in rows_of(plan, tmp_path / "data")] == [""] * 8
    assert len(list((tmp_path / "data" / "downloads").iterdir())) == 4, "no other file is left there"


def test_who_waits_for_another_try_lets_others_go_first(site: Site, tmp_path: Path) -> None:
    plan = plan_of(write_list(tmp_path / "u.txt", site, "after/1.png", "1.png"), concurrent=1, tries=2, back_off_s=0.5)
    assert [row["reason"] for row in rows_of(plan, tmp_path / "data")] == ["", ""]


def by_hand(part: Path) -> bytes:
    """The part as it would be written in one go."""
    table, sink = pq.read_table(part), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table.to_pylist(), schema=table.schema), sink, compression="zstd")
    return sink.getvalue()


def test_parts_are_the_same_bytes_whatever_is_fetched_ahead(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.download.PART_URLS", 3)
    names = [*(f"{i}.png" for i in range(7)), "nowhere", "0.png", "nowhere", "9.png"]
    plan = plan_of(write_list(tmp_path / "u.txt", site, *names))
    written = []
    for ahead_parts, ahead_bytes in ((1, 1 << 30), (64, 1), (64, 1 << 30)):
        monkeypatch.setattr("factory.download.AHEAD_PARTS", ahead_parts)
        monkeypatch.setattr("factory.download._AHEAD_BYTES", ahead_bytes)
        parts = download_all(plan, [tmp_path / "u.txt"], tmp_path / f"{ahead_parts}-{ahead_bytes}")
        written.append([part.read_bytes() for part in parts])
        assert written[-1] == [by_hand(part) for part in parts]
    assert written[0] == written[1] == written[2] and len(written[0]) == 4


def test_a_part_too_large_for_memory_holds_the_same_rows_in_one_group(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(write_list(tmp_path / "u.txt", site, "0.png", "nowhere", "2.png", "down/3.png"), tries=1)
    usual = rows_of(plan, tmp_path / "usual")
    monkeypatch.setattr("factory.download._PLAIN_BYTES", 0)
    site.down = True
    rows_of(plan, tmp_path / "large")
    assert reopen_urls(tmp_path / "large") == 1
    site.down = False
    assert rows_of(plan, tmp_path / "large") == usual, "also when it is asked again"
    file = pq.ParquetFile(tmp_path / "large" / "downloads" / "part-00000.parquet")
    assert file.num_row_groups == 1
    assert "RLE_DICTIONARY" not in file.metadata.row_group(0).column(2).encodings


def test_answers_on_disk_are_bounded(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bound reached only URLs of the first part are asked, so none of a later one before it is through."""
    monkeypatch.setattr("factory.download.PART_URLS", 2)
    monkeypatch.setattr("factory.download._AHEAD_BYTES", 0)
    names = ["after/3.png", "2.png", "3.png", "4.png"]
    plan = plan_of(write_list(tmp_path / "u.txt", site, *names), tries=2, back_off_s=0.1)
    assert [bool(row["reason"]) for row in rows_of(plan, tmp_path / "data")] == [True, False, False, False]


KILLED = """
import os, signal, sys
from pathlib import Path
import factory.download as download
from factory.recipe import PicturePlan
download.PART_URLS = 2
publish, left = download._Part.publish, [int(sys.argv[3])]
def then_die(part):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(part)
download._Part.publish = then_die
download.download_all(PicturePlan.model_validate_json(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[4]))
"""


def test_killed_at_any_part_it_goes_on_to_the_same_bytes(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.download.PART_URLS", 2)
    plan = plan_of(urls := write_list(tmp_path / "u.txt", site, *(f"{i}.png" for i in range(6))))
    whole = [part.read_bytes() for part in download_all(plan, [urls], tmp_path / "whole")]
    out = tmp_path / "killed"
    for through in (0, 1, 1):
        words = [sys.executable, "-c", KILLED, plan.model_dump_json(), str(urls), str(through), str(out)]
        assert subprocess.run(words, timeout=300).returncode == -signal.SIGKILL
    assert [p.read_bytes() for p in sorted((out / "downloads").iterdir())] == whole[:2], "nothing else is left there"
    assert [part.read_bytes() for part in download_all(plan, [urls], out)] == whole


def test_at_most_so_many_at_once_from_a_host(site: Site, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(24)]
    rows = rows_of(plan_of(write_list(tmp_path / "u.txt", site, *names), per_host=2), tmp_path / "data")
    assert not any(row["reason"] for row in rows) and 1 <= site.most <= 2


def test_private_addresses_are_refused_however_they_are_written(site: Site, tmp_path: Path) -> None:
    port = site.server_address[1]
    hosts = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
    hosts += ["１２７.0.0.1", "127。0。0。1", "①27.0.0.1"]  # aiohttp reads these as the first
    lines = [f"http://{host}:{port}/1.png" for host in hosts]
    lines += ["http://10.0.0.1/x", "http://169.254.169.254/latest/meta-data", "ftp://example.org/x", "http://u:p@h/x"]
    (tmp_path / "u.txt").write_text("\n".join(lines))
    rows = rows_of(plan_of(tmp_path / "u.txt", allow_private=False, tries=1), tmp_path / "data")
    assert len(rows) == len(lines) and all(row["reason"] for row in rows), [row["reason"] for row in rows]
    assert not site.asked
    assert [row["reason"] for row in rows[:2]] == ["plan: the address is not public"] * 2


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1", True),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("fe80::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_lists_are_txt_csv_or_parquet(tmp_path: Path) -> None:
    pairs = [("http://a/1", "one, two"), ("http://a/2", "")]
    (tmp_path / "u.txt").write_text("http://a/1\tone, two\n\nhttp://a/2\n")
    (tmp_path / "u.csv").write_text('text,link\n"one, two",http://a/1\n,http://a/2\n')
    pq.write_table(pa.table({"link": [u for u, _ in pairs], "text": ["one, two", None]}), tmp_path / "u.parquet")
    for name in ("u.txt", "u.csv", "u.parquet"):
        assert [one[:2] for one in _listed(tmp_path / name, plan_of(tmp_path, url_column="link"))] == pairs
    with pytest.raises(RecipeError, match="has no column url; there are"):
        list(_listed(tmp_path / "u.csv", plan_of(tmp_path)))
    (tmp_path / "u.zip").write_bytes(b"")
    with pytest.raises(RecipeError, match="is no list of URLs"):
        list(_listed(tmp_path / "u.zip", plan_of(tmp_path)))


def test_a_name_whose_answer_turns_private_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver itself is guarded, so no second look-up can lead elsewhere."""
    import socket

    def inward(*_: object, **__: object) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", inward)
    (tmp_path / "u.txt").write_text("http://pictures.example.org/1.png")
    rows = rows_of(plan_of(tmp_path / "u.txt", allow_private=False), tmp_path / "data")
    assert [row["reason"] for row in rows] == ["plan: the address is not public"]


def test_columns_of_a_list_become_attributes(site: Site, tmp_path: Path) -> None:
    (tmp_path / "u.csv").write_text(f"url,text,tone\n{site.root}/1.png,one,warm\n{site.root}/nowhere,two,\n")
    plan = plan_of(tmp_path / "u.csv").model_copy(update={"attribute_columns": ["tone"]})
    rows = rows_of(plan, tmp_path / "data")
    assert [json.loads(row["attributes"]) for row in rows] == [{"tone": "warm"}, {"tone": ""}]
    plain = rows_of(plan_of(tmp_path / "u.csv"), tmp_path / "plain")
    assert [row["id"] for row in rows] == [row["id"] for row in plain] and plain[0]["attributes"] == "{}"
    with pytest.raises(RecipeError, match="has no column mood"):
        list(_listed(tmp_path / "u.csv", plan.model_copy(update={"attribute_columns": ["mood"]})))


def test_columns_of_a_list_become_metadata(site: Site, tmp_path: Path) -> None:
    """Beside attributes or alone, from CSV and Parquet, and a list that lacks one is refused; without any the parts are as they were."""
    rows = [{"url": f"{site.root}/{name}", "text": "t", "site": "s", "n": n} for n, name in enumerate(["1.png", "no"])]
    (tmp_path / "u.csv").write_text("url,text,site,n\n" + "".join(",".join(map(str, r.values())) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "u.parquet")
    for name, number, more in (("u.csv", str, {}), ("u.parquet", int, {"attribute_columns": ["n"]})):
        plan = plan_of(tmp_path / name).model_copy(update={"metadata_columns": ["site", "n"], **more})
        found = rows_of(plan, tmp_path / f"data-{name}")
        told = [json.loads(row["source"])["metadata"] for row in found]
        assert told == [{"site": "s", "n": number(0)}, {"site": "s", "n": number(1)}]
        assert fetch(found[0]["source"], found[0]["picture_sha256"], tmp_path / f"data-{name}") == drawing(1)
        assert [row["attributes"] for row in found] == (['{"n": "0"}', '{"n": "1"}'] if more else ["{}"] * 2)
    rows_of(plan_of(tmp_path / "u.csv"), tmp_path / "plain")
    part = pq.read_schema(tmp_path / "plain" / "downloads" / "part-00000.parquet")
    assert part.names == ["url", "text", "picture", "wrong"]
    lacking = plan_of(tmp_path / "u.csv").model_copy(update={"metadata_columns": ["place"]})
    with pytest.raises(RecipeError, match=r"has no column place; there are .*factory\.plan\.metadata_columns"):
        list(_listed(tmp_path / "u.csv", lacking))
    write_list(tmp_path / "u.txt", site, "1.png")
    with pytest.raises(RecipeError, match=r"has no column place; as a \.txt it has only URLs and texts"):
        list(_listed(tmp_path / "u.txt", lacking))


def test_a_text_column_that_the_recipe_names_must_be_there(site: Site, tmp_path: Path) -> None:
    """Left out, a list may have no texts at all."""
    (tmp_path / "u.csv").write_text(f"url,TEXT\n{site.root}/1.png,a fox\n")
    pq.write_table(pa.table({"url": [f"{site.root}/1.png"], "TEXT": ["a fox"]}), tmp_path / "u.parquet")
    for name in ("u.csv", "u.parquet"):
        plan = plan_of(tmp_path / name)
        assert [text for _, text, _ in _listed(tmp_path / name, plan)] == [""]
        right = plan.model_copy(update={"text_column": "TEXT"})
        assert [text for _, text, _ in _listed(tmp_path / name, right)] == ["a fox"]
        with pytest.raises(RecipeError, match=r"has no column TXET; there are .*factory\.plan\.text_column"):
            list(_listed(tmp_path / name, plan.model_copy(update={"text_column": "TXET"})))
    write_list(tmp_path / "u.txt", site, "1.png")
    assert list(_listed(tmp_path / "u.txt", plan_of(tmp_path / "u.txt").model_copy(update={"text_column": "TEXT"})))
