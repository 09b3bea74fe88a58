"""The human study over HTTP: blind pairs, sides by seed, votes saved at once, and an interval that is Wilson's."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from cluster.errors import CorruptShard, EdgeFusionError, LedgerConflict
from trainer.cli import app
from trainer.judging import PreferRecipe
from trainer.models import open_pipeline
from trainer.prefer.server import PreferServer
from trainer.prefer.study import Study, open_study
from trainer.prefer.votes import Vote, VoteFile, tally
from trainer.sample import as_student


@pytest.fixture(scope="module")
def student(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = open_pipeline(str(tiny_models / "teacher"))
    folder = tmp_path_factory.mktemp("student")
    as_student(teacher, teacher.unet).save_pretrained(folder)
    return folder


def recipe(student: Path, data: Path, **changes: Any) -> PreferRecipe:
    keys = {
        "a": str(student),
        "b": str(student),
        "steps_a": 2,
        "steps_b": 1,
        "data": str(data),
        "count": 12,
        "threads": 1,
    }
    return PreferRecipe.model_validate(keys | changes)


@pytest.fixture
def study(student: Path, data: Path, tmp_path: Path) -> Study:
    return open_study(recipe(student, data), tmp_path / "study")


@pytest.fixture
def server(study: Study) -> Iterator[PreferServer]:
    with PreferServer(study) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.close()
        thread.join()


def ask(server: PreferServer, path: str, body: Any = None, token: str | None = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    data = None if body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **headers}
    place = f"/{server.token if token is None else token}/{path}"
    connection.request("GET" if data is None else "POST", place, data, given)
    answer = connection.getresponse()
    content = answer.read()
    kind = answer.getheader("Content-Type", "")
    connection.close()
    return answer.status, json.loads(content) if "json" in kind else content


def lines(server: PreferServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server.study.folder / "votes.jsonl").read_text().splitlines()]


def test_two_raters_vote_on_all_pairs_blind_and_every_vote_is_on_disk_at_once(server: PreferServer) -> None:
    files = {name: [p.read_bytes() for p in server.study.pictures[name]] for name in ("a", "b")}
    orders: dict[str, list[int]] = {}
    for rater in ("ada", "Boże"):
        status, shown = ask(server, f"api/next?rater={quote(rater)}")
        orders[rater] = []
        while shown["pair"] is not None:
            assert set(shown) == {"pair", "prompt", "left", "right", "done", "total"}, "nothing names a model"
            left, right = (ask(server, f"picture/{shown[side]}")[1] for side in ("left", "right"))
            whose = "a" if left == files["a"][shown["pair"]] else "b"
            assert {left, right} == {files["a"][shown["pair"]], files["b"][shown["pair"]]}
            orders[rater].append(shown["pair"])
            number = len(orders[rater])
            choice = ("tie", "left", "right")[number % 3]
            before = len(lines(server)) if (server.study.folder / "votes.jsonl").exists() else 0
            status, shown = ask(server, "api/vote", {"rater": rater, "pair": orders[rater][-1], "choice": choice})
            assert status == 200 and shown["done"] == number
            last = lines(server)[-1]
            assert len(lines(server)) == before + 1 and last["rater"] == rater and last["left"] == whose
            other = "b" if whose == "a" else "a"
            assert last["winner"] == {"tie": "tie", "left": whose, "right": other}[choice]
    assert sorted(orders["ada"]) == sorted(orders["Boże"]) == list(range(12)) and orders["ada"] != orders["Boże"]
    sides = [vote["left"] for vote in lines(server)]
    assert 4 < sides.count("a") < 20, "sides are mixed"
    found = server.study.result()
    assert (found["votes"], found["raters"], found["ties"], found["left_share"]) == (24, 2, 8, 0.5)
    assert found["wins_a"] + found["wins_b"] == 16 and found["low"] < found["win_rate"] < found["high"]


def test_back_shows_the_last_pair_again_and_the_new_vote_replaces_the_old(server: PreferServer) -> None:
    first = ask(server, "api/next?rater=ada")[1]
    ask(server, "api/vote", {"rater": "ada", "pair": first["pair"], "choice": "left"})
    again = ask(server, "api/back", {"rater": "ada"})[1]
    assert (again["pair"], again["left"], again["right"]) == (first["pair"], first["left"], first["right"])
    ask(server, "api/vote", {"rater": "ada", "pair": again["pair"], "choice": "right"})
    found = server.study.result()
    assert len(lines(server)) == 2 and found["votes"] == 1
    assert ask(server, "api/back", {"rater": "nobody yet"})[1]["pair"] is None


def test_a_restart_goes_on_and_sides_depend_on_the_seed_alone(server: PreferServer, student: Path, data: Path) -> None:
    first = ask(server, "api/next?rater=ada")[1]["pair"]
    ask(server, "api/vote", {"rater": "ada", "pair": first, "choice": "tie"})
    votes = server.study.folder / "votes.jsonl"
    with votes.open("ab") as file:
        file.write(b'{"pair": 3, "ra')  # a writer killed in the middle
    again = open_study(recipe(student, data), server.study.folder)
    assert again.result()["votes"] == 1
    assert all(again.left("ada", i) == server.study.left("ada", i) for i in range(12))
    again.votes.add(Vote(5, "eve", "a", "a", "now"))
    assert [vote.pair for vote in VoteFile(votes).standing()] == [first, 5]
    with pytest.raises(LedgerConflict, match="other models, prompts or steps"):
        open_study(recipe(student, data, steps_a=1), server.study.folder)
    votes.write_text('{"pair": 1}\n')
    with pytest.raises(CorruptShard, match="line 1 is no vote"):
        VoteFile(votes)


def test_strangers_and_malformed_votes_are_refused(server: PreferServer) -> None:
    vote = {"rater": "ada", "pair": 0, "choice": "left"}
    assert ask(server, "api/vote", vote, token="guess")[0] == 403
    assert ask(server, "api/vote", vote, Origin="http://evil.example")[0] == 403
    assert ask(server, "api/vote", vote, Host="evil.example")[0] == 403
    for bad in (
        {"pair": 99},
        {"pair": -1},
        {"choice": "a"},
        {"rater": ""},
        {"rater": " "},
        {"rater": "x" * 65},
        {"winner": "a"},
    ):
        status, answer = ask(server, "api/vote", vote | bad)
        assert status in (400, 404) and answer["error"], bad
    for path in ("api/next", "api/votes", "picture/../study.json", "votes.jsonl", "picture/x", "study.json"):
        assert ask(server, path)[0] in (400, 404), path
    assert not (server.study.folder / "votes.jsonl").exists()
    assert b"page.js" in ask(server, "")[1] and ask(server, "page.js")[0] == ask(server, "page.css")[0] == 200


def test_ties_are_counted_and_decide_nothing() -> None:
    votes = [Vote(i, "ada", "a", winner, "now") for i, winner in enumerate(("a", "a", "b", "tie", "tie"))]
    found = tally(votes)
    assert found["win_rate"] == pytest.approx(2 / 3) and found["ties"] == 2
    assert (found["low"], found["high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert tally([])["win_rate"] is None


def test_the_command_counts(student: Path, data: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("counting needs no model")

    monkeypatch.setattr("trainer.prefer.study.prepare", opened)
    monkeypatch.setattr("trainer.prefer.study.fingerprint", opened)
    study.votes.add(Vote(0, "ada", "a", "a", "now"))
    words = ["prefer", str(student), str(student), "--data", str(data), "--steps", "2,1", "--count", "12", "--report"]
    said = CliRunner().invoke(app, [*words, "--out", str(study.folder), "--set", "threads=1"])
    assert said.exit_code == 0, said.output
    assert "A wins 100.0%" in said.output and "1 raters" in said.output
    words[2] = "another"
    with pytest.raises(LedgerConflict, match="holds a study of"):
        CliRunner().invoke(app, [*words, "--out", str(study.folder)], catch_exceptions=False)
    with pytest.raises(EdgeFusionError, match="holds no study"):
        CliRunner().invoke(app, [*words, "--out", str(study.folder / "none")], catch_exceptions=False)
