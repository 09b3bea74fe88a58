"""The overlay: nothing acknowledged is lost, whoever writes and whatever is killed."""

import json
import threading
from pathlib import Path

import pytest

from cluster.errors import CorruptShard, EdgeFusionError
from factory.decisions import DECISIONS, Changed, Decision, Overlay, digest_decisions, read_decisions

A, B = "a" * 64, "b" * 64


def test_the_last_line_wins_and_undo_restores_the_digest(tmp_path: Path) -> None:
    overlay = Overlay(tmp_path)
    overlay.decide(A, {"verdict": "keep"}, "ada")
    before = digest_decisions(overlay.state())
    overlay.decide(A, {"verdict": "reject", "reason": "  blurred\n a lot "}, "bob")
    found = read_decisions(tmp_path)[A]
    assert (found.verdict, found.reason, found.who) == ("reject", "blurred a lot", "bob")
    assert digest_decisions(overlay.state()) != before
    overlay.decide(A, {"verdict": "keep"}, "bob")
    assert digest_decisions(read_decisions(tmp_path)) == before
    overlay.decide(A, {"verdict": None}, "bob")
    assert read_decisions(tmp_path) == {} and digest_decisions({}) == ""
    lines = [json.loads(line) for line in (tmp_path / DECISIONS).read_text().splitlines()]
    assert len(lines) == 4 and set(lines[0]) == {"id", "verdict", "reason", "caption", "who", "when"}


def test_a_caption_and_a_verdict_of_two_people_go_together(tmp_path: Path) -> None:
    ada, bob = Overlay(tmp_path), Overlay(tmp_path)
    ada.decide(A, {"caption": "a red fox"}, "ada")
    bob.decide(A, {"verdict": "keep"}, "bob")
    found = read_decisions(tmp_path)[A]
    assert (found.caption, found.verdict) == ("a red fox", "keep")
    assert ada.catch_up() == 2 and ada.of(A)[0] == found


def test_undo_never_wipes_out_what_someone_else_did_since(tmp_path: Path) -> None:
    ada, bob = Overlay(tmp_path), Overlay(tmp_path)
    mine = ada.decide(A, {"verdict": "keep"}, "ada")
    bob.decide(A, {"verdict": "reject", "reason": "odd"}, "bob")
    with pytest.raises(Changed) as caught:
        ada.decide(A, {"verdict": None}, "ada", expect=mine.number)
    assert caught.value.now is not None and caught.value.now.who == "bob"
    assert read_decisions(tmp_path)[A].verdict == "reject"


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    def write(who: int) -> None:
        overlay = Overlay(tmp_path)
        for i in range(10):
            overlay.decide(f"{who}{i}" * 32, {"verdict": "keep"}, f"person {who}")

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_decisions(tmp_path)) == 40


def test_a_torn_last_line_at_any_byte_costs_that_line_alone(tmp_path: Path) -> None:
    overlay = Overlay(tmp_path)
    overlay.decide(A, {"verdict": "keep"}, "ada")
    whole = (tmp_path / DECISIONS).stat().st_size
    overlay.decide(B, {"caption": "ein Füchschen"}, "ada")
    data = (tmp_path / DECISIONS).read_bytes()
    for cut in range(whole, len(data) - 1):
        (tmp_path / DECISIONS).write_bytes(data[:cut])
        assert list(read_decisions(tmp_path)) == [A]
        Overlay(tmp_path).decide("c" * 64, {"verdict": "keep"}, "bob")
        assert sorted(read_decisions(tmp_path)) == [A, "c" * 64]
    (tmp_path / DECISIONS).write_bytes(data[:-1])  # an editor that writes no last line end
    Overlay(tmp_path).decide("c" * 64, {"verdict": "keep"}, "bob")
    assert sorted(read_decisions(tmp_path)) == [A, B, "c" * 64]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    Overlay(tmp_path).decide(A, {"verdict": "keep"}, "ada")
    with (tmp_path / DECISIONS).open("a") as file:
        file.write('{"id": "no"}\n')
    with pytest.raises(CorruptShard, match="line 2 is no decision"):
        read_decisions(tmp_path)


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    overlay = Overlay(tmp_path)
    overlay.decide(A, {"verdict": "keep"}, "ada")
    (tmp_path / "other").write_text("")
    (tmp_path / "other").replace(tmp_path / DECISIONS)
    overlay.catch_up()
    assert overlay.state() == {} and overlay.counts() == {"kept": 0, "rejected": 0, "captions": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": "maybe"},
        {"verdict": "reject"},
        {"verdict": "reject", "reason": "   "},
        {"verdict": "keep", "reason": "why not"},
        {"verdict": ["keep"]},
        {"caption": 5},
        {"caption": "x" * 2001},
        {"caption": "bell\x07"},
        {"caption": "half \ud800"},
        {"who": "me"},
    ],
)
def test_what_is_no_decision_is_refused_and_nothing_is_written(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ValueError):
        Overlay(tmp_path).decide(A, changes, "ada")
    assert read_decisions(tmp_path) == {}


@pytest.mark.parametrize("key", ["", "A" * 64, "a" * 63, "../" + "a" * 61, 7])
def test_an_id_is_64_hex_digits(key) -> None:
    with pytest.raises(ValueError, match="hex"):
        Decision(key)


def test_a_full_disk_is_told_and_leaves_no_half_line(tmp_path: Path, monkeypatch) -> None:
    import os

    overlay = Overlay(tmp_path)
    overlay.decide(A, {"verdict": "keep"}, "ada")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgeFusionError, match="No space left"):
        overlay.decide(B, {"verdict": "keep"}, "ada")
    monkeypatch.undo()
    assert list(read_decisions(tmp_path)) == [A] == list(overlay.state())
