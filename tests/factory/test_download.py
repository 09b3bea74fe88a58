"""Pictures by URL: what comes arrives whole, what does not is a dead letter with its reason, and the net is asked once."""

from __future__ import annotations

import io
import json
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import RecipeError, StageError
from cluster.runner import InProcess
from factory.address import is_public
from factory.dead import attempts
from factory.download import _Latest, _listed, download_all, may_pass, wants_again
from factory.ingest import downloaded_rows, fetch
from factory.make import make, select_and_pack
from factory.picture_plan import plan_pictures
from factory.plan import make_plan
from factory.recipe import DownloadRecipe, FactoryRecipe, PicturePlan
from factory.retry import reopen_urls

pytest.importorskip("aiohttp", reason="extra urls is not installed")


def drawing(seed: int) -> bytes:
    sink = io.BytesIO()
    cells = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((80, 64), Image.Resampling.NEAREST).save(sink, format="PNG")
    return sink.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.here = self.most = 0
        self.down = False
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.meet = threading.Barrier(4)
        self.root = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        site, path = self.server, self.path.lstrip("/")
        with site.lock:
            site.asked[path] += 1
            site.here += 1
            site.most = max(site.most, site.here)
            self.here = True
        try:
            self.reply(path, site.asked[path])
        except OSError:
            pass  # the client broke off
        finally:
            self.leave()

    def leave(self) -> None:
        """Once and before the answer goes out: whoever has it may ask again before this thread is heard of."""
        with self.server.lock:
            self.server.here -= self.here
            self.here = False

    def reply(self, path: str, count: int) -> None:
        site = self.server
        if path.startswith("to/"):
            left = int(path.removeprefix("to/"))
            self.send(b"", 302, Location=f"/to/{left - 1}" if left else "/1.png")
        elif path == "inward":
            self.send(b"", 302, Location="file:///etc/passwd")
        elif path == "slow":
            site.stop.wait(20)
        elif path.startswith("together/"):
            # All of them at once or none: whoever asks for a few and waits for these gets no answer.
            site.meet.wait(20)
            self.send(drawing(int(path.removeprefix("together/"))))
        elif path.startswith("after/"):
            first = path.removeprefix("after/")
            self.send(drawing(3), 200 if site.asked[first] else 503)
        elif path == "cut":
            self.send(drawing(1)[:100], length=5000)
        elif path == "html":
            self.send(b"<html>not here</html>", kind="image/png")
        elif path == "bomb":
            self.send(bomb())
        elif path == "large":
            self.send(b"x" * 200_000)
        elif path == "endless":
            self.send_response(200)
            self.end_headers()
            while not site.stop.is_set():
                self.wfile.write(b"x" * 65536)
        elif path.startswith("down/"):
            if site.down:
                self.send(b"", 503)
            else:
                self.send(drawing(int(path.removeprefix("down/").removesuffix(".png"))))
        elif path == "520":
            self.send(drawing(4), 200 if count > 1 else 520)
        elif path == "busy":
            self.send(drawing(2), 200 if count > 2 else 503)
        elif path.endswith(".png"):
            site.stop.wait(0.02)
            self.send(drawing(int(path.removesuffix(".png"))), kind="text/plain")
        else:
            self.send(b"gone", 404)

    def send(
        self, body: bytes, status: int = 200, kind: str = "image/png", length: int | None = None, **more: str
    ) -> None:
        self.leave()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


def plan_of(path: Path, **keys: object) -> PicturePlan:
    given = {"timeout_s": 1.0, "back_off_s": 0.01, "max_bytes": 100_000, "redirects": 2, "allow_private": True, **keys}
    return PicturePlan(paths=[str(path)], download=DownloadRecipe.model_validate(given))


def rows_of(plan: PicturePlan, out: Path) -> list[dict]:
    return list(downloaded_rows(download_all(plan, [Path(p) for p in plan.paths], out)))


def write_list(path: Path, site: Site, *names: str) -> Path:
    path.write_text("".join(f"{site.root}/{name}\ta text of {name}\n" for name in names))
    return path


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


def outage_names() -> list[str]:
    return ["0.png", *(f"down/{i}.png" for i in range(1, 6)), "nowhere", "7.png"]


def test_urls_that_failed_in_an_outage_are_asked_again_and_the_plan_is_as_without_it(
    site: Site, tmp_path: Path
) -> None:
    plan = plan_of(write_list(tmp_path / "u.txt", site, *outage_names()), tries=1)
    calm, out = tmp_path / "calm" / "plan.parquet", tmp_path / "out" / "dataset" / "plan.parquet"
    plan_pictures(plan, 4, calm)
    assert reopen_urls(tmp_path / "calm") == 0, "404 is final"
    site.down = True
    plan_pictures(plan, 4, out)
    before = pq.read_table(out).to_pylist()
    assert [row["outcome"] for row in before].count("dead") == 6
    data = out.parent
    (data / "ledger").mkdir()
    for unit in range(2):
        (data / "ledger" / f"unit-0000{unit}.parquet").write_bytes(b"a unit of four rows")
    (data / "manifest.parquet").write_bytes(b"any")

    assert reopen_urls(data.parent) == 5 and reopen_urls(data.parent) == 5, (
        "asked twice before the next run, tried once"
    )
    assert wants_again(data) and not (data / "manifest.parquet").exists()
    asked = site.asked.copy()
    plan_pictures(plan, 4, out)  # the net is still away: nothing changes, and only what failed is asked
    assert pq.read_table(out).to_pylist() == before and not wants_again(data)
    assert set(site.asked - asked) == {f"down/{i}.png" for i in range(1, 6)}
    assert len(list((data / "ledger").iterdir())) == 2

    site.down = False
    assert reopen_urls(data) == 5
    plan_pictures(plan, 4, out)
    assert out.read_bytes() == calm.read_bytes()
    parts = [sorted((place.parent / "downloads").iterdir()) for place in (out, calm)]
    assert [p.read_bytes() for p in parts[0]] == [p.read_bytes() for p in parts[1]]
    assert not list((data / "ledger").iterdir()) and len(list((data / "reopened").iterdir())) == 2
    assert attempts(data)[before[1]["id"]] == 2
    plan_pictures(plan, 4, out)
    assert reopen_urls(data) == 0


def test_only_units_whose_urls_answered_now_are_made_anew(site: Site, tmp_path: Path) -> None:
    names = ["0.png", "1.png", "down/2.png", "down/0.png", "4.png", "nowhere"]
    plan, out = plan_of(write_list(tmp_path / "u.txt", site, *names), tries=1), tmp_path / "plan.parquet"
    site.down = True
    plan_pictures(plan, 2, out)
    (tmp_path / "ledger").mkdir()
    for unit in range(3):
        (tmp_path / "ledger" / f"unit-0000{unit}.parquet").write_bytes(b"x")
    later = tmp_path / "scores" / "bright"
    later.mkdir(parents=True)
    (later / "scorer.json").write_text(json.dumps({"scorer": {}, "mark": "", "columns": ["bright"]}))
    for unit in range(3):
        (later / f"unit-0000{unit}.parquet").write_bytes(b"x")
    site.down = False
    reopen_urls(tmp_path)
    plan_pictures(plan, 2, out)
    assert sorted(p.name for p in (tmp_path / "ledger").iterdir()) == ["unit-00000.parquet", "unit-00002.parquet"]
    assert not (later / "unit-00001.parquet").exists(), "scores of other pictures"
    assert (later / "unit-00000.parquet").exists() and (later / "unit-00002.parquet").exists()


def test_an_outage_stops_the_download_and_what_it_spoilt_is_fetched_anew(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.download.PART_URLS", 2)
    names = ["0.png", "nowhere", *(f"down/{i}.png" for i in range(1, 9))]
    keys = {"tries": 1, "max_failed_share": 0.7, "failed_after": 4}
    plan, out = plan_of(write_list(tmp_path / "u.txt", site, *names), **keys), tmp_path / "data"
    site.down = True
    with pytest.raises(
        StageError, match=r"3 of the last 4 URLs failed.*max_failed_share \(0.7\); most often: HTTP 503"
    ):
        rows_of(plan, out)
    assert [p.name for p in (out / "downloads").iterdir()] == ["part-00000.parquet"]
    site.down = False
    rows = rows_of(plan, out)
    assert [bool(row["reason"]) for row in rows] == [name == "nowhere" for name in names]
    assert site.asked["0.png"] == 1 and site.asked["down/1.png"] == 2
    few = plan_of(write_list(tmp_path / "f.txt", site, "nowhere", "none"), **keys)
    assert len(rows_of(few, tmp_path / "few")) == 2, "two URLs mean nothing"


@pytest.mark.parametrize("still_away", [True, False])
def test_what_an_outage_spoilt_is_not_kept_by_a_crash_in_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still_away: bool
) -> None:
    monkeypatch.setattr("factory.download.PART_URLS", 2)
    names = ["0.png", "1.png", *(f"down/{i}.png" for i in range(1, 5)), "down/6.png", "2.png", "nowhere", "none"]
    monkeypatch.setattr(
        "factory.download.AHEAD_PARTS", 1
    )  # what a kill loses would be asked twice, and is counted below
    keys = {"tries": 1, "max_failed_share": 0.4, "failed_after": 6}
    plan, out = plan_of(write_list(tmp_path / "u.txt", site, *names), **keys), tmp_path / "plan.parquet"
    judge = _Latest.add

    def killed(latest: _Latest, part: Path, wrong: list[str]) -> None:
        if part.name == "part-00002.parquet":
            raise KeyboardInterrupt
        judge(latest, part, wrong)

    def there() -> list[str]:
        return sorted(p.name for p in (tmp_path / "downloads").iterdir())

    site.down = True
    monkeypatch.setattr(_Latest, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        plan_pictures(plan, 4, out)
    monkeypatch.setattr(_Latest, "add", judge)
    assert there() == ["part-00000.parquet", "part-00001.parquet"], "what nobody judged is not there"
    if still_away:
        with pytest.raises(StageError, match=r"5 of the last 6 URLs failed.*most often: HTTP 503"):
            plan_pictures(plan, 4, out)
        assert there() == ["part-00000.parquet"]
    site.down = False
    plan_pictures(plan, 4, out)
    rows = pq.read_table(out).to_pylist()
    assert [bool(row["reason"]) for row in rows] == [name in ("nowhere", "none") for name in names]
    assert site.asked["0.png"] == 1 and site.asked["none"] == 1
    out.unlink()
    asked = site.asked.copy()
    plan_pictures(plan, 4, out)
    assert site.asked == asked, "404 is final"


def test_reasons_that_may_pass() -> None:
    passing = [
        "HTTP 503, 3 tries",
        "HTTP 429",
        *(f"HTTP {status}, 3 tries" for status in (500, 501, 505, 508, 520, 529, 599)),
        "no whole answer within 20 s, 3 tries",
        "ClientConnectorDNSError: x, 3 tries",
    ]
    final = [
        "HTTP 404",
        "HTTP 403",
        "HTTP 600",
        "HTTP 999",
        "the answer is empty",
        "more than 5 redirects",
        "the address is not public",
        "9 bytes, over the limit",
        "",
    ]
    assert all(map(may_pass, passing)) and not any(map(may_pass, final))


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
