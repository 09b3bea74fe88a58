"""The page's server as a stranger sees it, and as two people use it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import EdgeFusionError
from cluster.storage import publish_bytes
from factory.curate.catalogue import Catalogue, Filter
from factory.curate.pictures import _Bounded
from factory.curate.server import MAX_BODY_BYTES, Server
from factory.decisions import Decision, Overlay, read_decisions
from factory.ledger import commit_unit
from factory.plan import table_bytes


@pytest.fixture
def server(dataset: Path) -> Iterator[Server]:
    with Server(dataset, who="ada") as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.close()
        thread.join()


def ask(
    server: Server, path: str, body: Any = None, token: str | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """(status, body as JSON or bytes, headers) of one request; `body` is sent as it is if it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(
        "GET" if data is None else "POST", f"/{server.token if token is None else token}/{path}", data, given
    )
    answer = connection.getresponse()
    content = answer.read()
    found = dict(answer.getheaders())
    connection.close()
    return answer.status, json.loads(content) if "json" in found["Content-Type"] else content, found


def first_rows(server: Server, **wanted: Any) -> list[dict[str, Any]]:
    status, view, _ = ask(server, "api/view", wanted)
    assert status == 200
    return ask(server, f"api/rows?view={view['view']}&start=0&count=100")[1]["rows"]


def test_without_the_token_or_under_another_name_nothing_answers(server: Server, ids: list[str]) -> None:
    for path in ("", "page.js", "api/about", f"thumb/{ids[0]}", f"picture/{ids[0]}"):
        assert ask(server, path)[0] == 200
        assert ask(server, path, token="x" * len(server.token))[0] == 403
        assert ask(server, path, token=server.token + "x")[0] == 403
        assert ask(server, path, token="")[0] == 403
        assert ask(server, path, Host="evil.example")[0] == 403
        assert ask(server, path, Host=f"evil.example:{server.port}")[0] == 403
    mark = {"id": ids[0], "changes": {"verdict": "keep"}}
    assert ask(server, "api/decide", mark, token="guess")[0] == 403
    assert ask(server, "api/decide", mark, Origin="http://evil.example")[0] == 403
    assert ask(server, "api/decide", mark, Content_Type="text/plain")[0] == 415
    assert ask(server, "api/decide", mark, Content_Type="application/x-www-form-urlencoded")[0] == 415
    assert read_decisions(server.folder) == {}
    headers = ask(server, "")[2]
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "../../plan.parquet",
        "..%2f..%2fplan.parquet",
        "page.py",
        "server.py",
        "thumb/../../plan.parquet",
        "thumb/..%2F..%2Fplan.parquet",
        "picture/" + "f" * 64,
        "picture/" + "A" * 64,
        "thumb/",
        "api/",
        "api/nothing",
        "api/rows/extra",
    ],
)
def test_no_path_leads_out_of_the_page_and_the_ledger(server: Server, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("decide", b""),
        ("decide", b"not json"),
        ("decide", b"\xff\xfe"),
        ("decide", b"[" * 5000),
        ("decide", []),
        ("decide", {"id": "a", "changes": {}}),
        ("decide", {"id": "A" * 64, "changes": {"verdict": "keep"}}),
        ("decide", {"id": "ROW0", "changes": {"verdict": "perhaps"}}),
        ("decide", {"id": "ROW0", "changes": {"verdict": "reject", "reason": ""}}),
        ("decide", {"id": "ROW0", "changes": {"caption": "x" * 3000}}),
        ("decide", {"id": "ROW0", "changes": {"prompt": "x"}}),
        ("decide", {"id": "ROW0", "changes": {"verdict": "keep"}, "who": "x" * 65}),
        ("decide", {"id": "ROW0", "changes": {"verdict": "keep"}, "extra": 1}),
        ("decide", {"id": "ROW5", "changes": {"verdict": "keep"}}),
        ("view", {"sort": "id; DROP TABLE e"}),
        ("view", {"scores": {"clip_score) OR (1=1": [0, 1]}}),
        ("view", {"scores": {"clip_score": ["0", "1; --"]}}),
        ("view", {"unknown": 1}),
        ("view", {"people": "everyone"}),
    ],
)
def test_a_malformed_body_is_refused_in_words(server: Server, ids: list[str], what: str, body: Any) -> None:
    if isinstance(body, dict) and str(body.get("id", "")).startswith("ROW"):
        body = {**body, "id": ids[int(body["id"][3:])]}
    status, answer, _ = ask(server, f"api/{what}", body)
    assert status == 400 and answer["error"]
    assert read_decisions(server.folder) == {}


def test_too_large_a_body_and_odd_numbers_are_refused(server: Server) -> None:
    assert ask(server, "api/decide", b"x" * (MAX_BODY_BYTES + 1))[0] == 413
    key = ask(server, "api/view", {})[1]["view"]
    for query in ("start=-1&count=5", "start=0&count=100000", "start=0", "start=x&count=5", "start=0&count=٣"):
        assert (
            ask(
                server, f"api/rows?view={key}&{query.encode().decode('latin-1') if query.isascii() else 'start=%D9%A3'}"
            )[0]
            == 400
        )
    assert ask(server, "api/rows?view=gone&start=0&count=5")[0] == 410


def test_filters_and_orders_agree_with_the_ledger(server: Server, ids: list[str]) -> None:
    assert [row["id"] for row in first_rows(server)] == [key for i, key in enumerate(ids) if i != 5]
    assert [row["seed"] for row in first_rows(server, sort="clip_score", descending=True)][:3] == [23, 22, 21]
    assert [row["seed"] for row in first_rows(server, outcome="dead")] == [5]
    assert [row["seed"] for row in first_rows(server, scores={"clip_score": [0.5, 0.6]})] == [12, 13]
    assert {row["seed"] % 3 for row in first_rows(server, attributes={"subject": ["key"]})} == {1}
    assert len(first_rows(server, attributes={"it's": ['a "quoted" value']})) == 23
    assert first_rows(server, attributes={"subject": ["' OR 1=1 --"]}) == []
    assert [row["seed"] for row in first_rows(server, text="KEY 22")] == [22]
    assert [row["seed"] for row in first_rows(server, text=ids[7][:12])] == [7]
    assert first_rows(server, text="100% _") == []
    assert sorted(row["seed"] for row in first_rows(server, sort="shuffle")) == [i for i in range(24) if i != 5]
    about = ask(server, "api/about")[1]
    assert about["total"] == 23 and dict(map(tuple, about["attributes"]["subject"]))["fox"] == 8


def test_marks_are_seen_by_filters_and_by_the_other_person(server: Server, ids: list[str]) -> None:
    bob = Overlay(server.folder)  # another process on the same folder
    answer = ask(server, "api/decide", {"id": ids[0], "changes": {"verdict": "keep"}})[1]
    assert answer["decision"]["who"] == "ada" and answer["before"] is None and answer["progress"]["kept"] == 1
    bob.decide(ids[0], {"caption": "ein Füchschen"}, "bob")
    bob.decide(ids[1], {"verdict": "reject", "reason": "odd"}, "bob")
    since = ask(server, f"api/since?number={answer['decision']['number']}")[1]
    assert [(d["id"], d["who"]) for d in since["decisions"]] == [(ids[0], "bob"), (ids[1], "bob")]
    assert since["decisions"][0]["verdict"] == "keep"
    assert [row["id"] for row in first_rows(server, people="reject")] == [ids[1]]
    assert [row["id"] for row in first_rows(server, people="caption")] == [ids[0]]
    assert [row["id"] for row in first_rows(server, text="füchschen")] == [ids[0]]
    assert len(first_rows(server, people="open")) == 21
    undo = {"id": ids[0], "changes": {"verdict": None}, "expect": answer["decision"]["number"]}
    status, refusal, _ = ask(server, "api/decide", undo)
    assert status == 409 and refusal["decision"]["caption"] == "ein Füchschen" and "bob" in refusal["error"]


def test_many_decisions_at_once_reach_the_filters_too(dataset: Path, ids: list[str]) -> None:
    catalogue = Catalogue(dataset)
    strangers = [Decision(f"{i:064x}", "keep") for i in range(60)]
    catalogue.note(
        [*strangers, Decision(ids[1], "keep"), Decision(ids[1], "reject", "odd"), Decision(ids[2], None, "", "x")]
    )
    seeds = {
        people: [
            row["seed"] for row in catalogue.page(catalogue.view(Filter.model_validate({"people": people})), 0, 99)
        ]
        for people in ("keep", "reject", "caption")
    }
    assert seeds == {"keep": [], "reject": [1], "caption": [2]}


def test_the_prompt_itself_is_no_other_caption(server: Server, ids: list[str]) -> None:
    prompt = first_rows(server)[0]["prompt"]
    ask(server, "api/decide", {"id": ids[0], "changes": {"caption": f"  {prompt} "}})
    assert read_decisions(server.folder) == {}


def test_two_people_at_once_lose_nothing(server: Server, ids: list[str]) -> None:
    def work(who: str, field: dict[str, Any]) -> None:
        for i, key in enumerate(ids):
            if i != 5:
                assert ask(server, "api/decide", {"id": key, "changes": field, "who": who})[0] == 200

    people = [
        threading.Thread(target=work, args=("ada", {"verdict": "reject", "reason": "odd"})),
        threading.Thread(target=work, args=("bob", {"caption": "better words"})),
    ]
    for person in people:
        person.start()
    for person in people:
        person.join()
    found = read_decisions(server.folder)
    assert len(found) == 23 and all(d.verdict == "reject" and d.caption == "better words" for d in found.values())


def test_pictures_are_served_as_pictures_only(server: Server, ids: list[str]) -> None:
    status, data, headers = ask(server, f"picture/{ids[3]}")
    assert status == 200 and data.startswith(b"\x89PNG") and headers["Content-Type"] == "image/png"
    assert ask(server, f"thumb/{ids[3]}")[1] == data  # small enough as it is
    assert ask(server, f"picture/{ids[5]}")[0] == 404  # a dead row
    (server.folder / "pictures" / "unit-00002.parquet").unlink()
    assert ask(server, f"picture/{ids[20]}")[0] == 404


def test_before_select_and_with_a_selection_of_part_of_the_ledger(dataset: Path, ids: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    before = Catalogue(dataset)
    assert dict(before.choices()["outcomes"]) == {"made": 23, "dead": 1}
    part = [{"id": key, "outcome": "rejected", "reason": "near duplicate"} for key in ids[3:1:-1]]
    pq.write_table(pa.Table.from_pylist(part), dataset / "selection.parquet")
    after = Catalogue(dataset)
    view = after.view(Filter(reason="near duplicate"))
    assert {row["id"] for row in after.page(view, 0, 10)} == set(ids[2:4]) and after.total == 24


def test_an_empty_folder_and_a_taken_port_are_told(dataset: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(EdgeFusionError, match="nothing is made yet"):
        Server(tmp_path)
    with pytest.raises(EdgeFusionError, match="cannot be used"):
        Server(dataset, server.port)


def test_the_cache_stays_within_its_bytes() -> None:
    cache = _Bounded(100)
    for i in range(50):
        cache.put(str(i), i, 30)
        cache.get("47")
    assert cache.used_bytes <= 100 and cache.get("0") is None and cache.get("49") == 49 and cache.get("47") == 47
    cache.put("huge", 0, 101)
    assert cache.get("huge") is None


@pytest.fixture
def taken_in(tmp_path: Path) -> Path:
    """Three taken-in pictures, one unit; a view `l-pp` that keeps the second alone."""
    folder, rows = tmp_path / "run" / "dataset", []
    for i, name in enumerate(["a/Holiday.jpg", "b/2.jpg", None]):
        source = {"file": "s3://bucket/x.tar?key=secret", "at": 512 * i, "size": 9}
        source |= {"name": name, "metadata": {"site": f"site {i}"}} if name else {"url": "http://x.org/3.jpg"}
        row = {
            "id": f"{i:064x}",
            "unit": "unit-00000",
            "prompt": f"caption {i}",
            "group": "pictures",
            "attributes": "{}",
        }
        row |= {
            "seed": 0,
            "outcome": "pending",
            "reason": "",
            "source": json.dumps(source),
            "raw_caption": f"Raw words {i}",
        }
        rows.append(
            row
            | {
                "crop": ("centre", "end", "end")[i],
                "width_px": 640,
                "height_px": 480,
                "picture": b"x",
                "clip_score": 0.5,
            }
        )
    commit_unit(folder, rows)
    view = {
        "id": [row["id"] for row in rows],
        "outcome": ["rejected", "kept", "rejected"],
        "reason": ["too small", "", "too small"],
    }
    publish_bytes(folder / "views" / "l-pp" / "selection.parquet", table_bytes(pa.table(view)))
    return folder


def test_what_a_picture_came_with_is_shown_and_found(taken_in: Path) -> None:
    found = Catalogue(taken_in)

    def ids_of(**wanted: Any) -> list[int]:
        view = found.view(Filter.model_validate(wanted))
        return [int(row["id"], 16) for row in found.page(view, 0, 10)]

    assert ids_of() == [0, 1, 2]
    assert ids_of(text="raw words 1") == [1] and ids_of(text="holiday") == [0] and ids_of(text="x.org") == [2]
    assert ids_of(crop="end") == [1, 2] and ids_of(crop="end", text="b/2") == [1]
    row = found.row(f"{0:064x}")
    assert row is not None and (row["raw_caption"], row["crop"], row["original_path"]) == (
        "Raw words 0",
        "centre",
        "a/Holiday.jpg",
    )
    assert found.more(f"{0:064x}") == {
        "size": [640, 480],
        "source": "s3://bucket/x.tar#0",
        "metadata": {"site": "site 0"},
    }
    assert found.more(f"{2:064x}") == {"size": [640, 480], "source": "http://x.org/3.jpg", "metadata": {}}
    assert found.more("f" * 64) is None
    assert found.choices()["crops"] == [("end", 2), ("centre", 1)]


def test_a_view_is_curated_by_its_own_verdicts(taken_in: Path) -> None:
    with Server(taken_in, view="l-pp") as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        assert [row["outcome"] for row in first_rows(server)] == ["rejected", "kept", "rejected"]
        assert ask(server, "api/about")[1]["name"] == "run/dataset/l-pp"
        assert ask(server, f"api/more?id={1:064x}")[1]["metadata"] == {"site": "site 1"}
        assert ask(server, "api/more?id=..")[0] == 404
        server.close()
        thread.join()
    assert {row["outcome"] for row in Catalogue(taken_in)._fetch("true", [])} == {"made"}
    with pytest.raises(EdgeFusionError, match="there is no selection l-pq"):
        Catalogue(taken_in, "l-pq")


def test_drawn_pictures_came_with_nothing(server: Server, ids: list[str]) -> None:
    about = ask(server, "api/about")[1]
    assert about["crops"] == [] and not server.catalogue.taken_in
    assert ask(server, f"api/more?id={ids[0]}")[1] == {"size": [None, None], "source": "", "metadata": {}}
