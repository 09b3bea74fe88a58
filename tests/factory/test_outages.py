"""The net away for a while: what failed is asked again, what it spoilt is not kept, and the plan is as without it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.errors import StageError
from factory.dead import attempts
from factory.download import _Latest, may_pass, wants_again
from factory.picture_plan import plan_pictures
from factory.retry import reopen_urls
from tests.factory.site import Site, plan_of, rows_of, write_list

pytest.importorskip("aiohttp", reason="extra urls is not installed")


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
