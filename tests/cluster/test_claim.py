"""One writer a folder: of several at the same moment, after deaths, across machines, without hard links."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import claim
from cluster.claim import claimed, is_claim, refuse_second_driver
from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.machine import every, this_machine

ROOT = Path(__file__).parent.parent.parent


def claims(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / name).read_text()) for name in sorted(os.listdir(folder)) if is_claim(name)}


def claims_by_hand(folder: Path, number: int, **facts: Any) -> None:
    known = {"pid": 1, "host": "elsewhere", "machine": "another", "state": "running", "when": round(time.time(), 1)}
    (folder / f"claim-{number:06d}.json").write_text(json.dumps(known | facts))


def python(code: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE)


HOLDER = """
import sys, time
from pathlib import Path
from cluster.claim import claimed
with claimed(Path(sys.argv[1]), "edgefusion run", print):
    print("mine", flush=True)
    time.sleep(600)
"""

AT_ONCE = """
import os, sys, time
from pathlib import Path
from cluster import claim
from cluster.errors import LedgerConflict
folder, honest = Path(sys.argv[1]), claim.refuse_second_driver
def refuse_second_driver(out, wait):
    honest(out, wait)
    (folder / f"looked-{os.getpid()}").touch()
    while len(list(folder.glob("looked-*"))) < int(sys.argv[2]):  # nobody claims before all have seen that nobody has
        time.sleep(0.01)
claim.refuse_second_driver = refuse_second_driver
try:
    with claim.claimed(folder, "edgefusion run", print):
        print("mine", flush=True)
        time.sleep(1)
except LedgerConflict as error:
    print(error)
"""


@pytest.mark.parametrize("links", [True, False])
def test_of_drivers_that_start_at_the_same_moment_one_has_the_folder(tmp_path: Path, links: bool) -> None:
    code = AT_ONCE
    if not links:
        code = "import errno, os\ndef link(*_): raise OSError(errno.EPERM, 'no')\nos.link = link\n" + AT_ONCE
    drivers = [python(code, str(tmp_path), "3") for _ in range(3)]
    said = [driver.communicate(timeout=300)[0].decode().strip() for driver in drivers]
    (winner,) = [driver.pid for driver, words in zip(drivers, said, strict=True) if words == "mine"]
    assert sum(words.startswith(f"{tmp_path}: process {winner} on ") for words in said) == 2, said
    assert [facts["state"] for facts in claims(tmp_path).values()] == ["ended"]


def test_after_a_kill_the_same_host_goes_on_at_once(tmp_path: Path) -> None:
    words: list[str] = []
    for _ in range(2):
        holder = python(HOLDER, str(tmp_path))
        assert holder.stdout is not None and holder.stdout.readline() == b"mine\n"
        with pytest.raises(LedgerConflict, match=f"process {holder.pid} on .* \\(edgefusion run\\) runs into"):
            refuse_second_driver(tmp_path, words.append)
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and its number not yet taken back
        with claimed(tmp_path, "edgefusion factory select", words.append) as still_mine:
            still_mine()
            (facts,) = claims(tmp_path).values()
            assert (facts["pid"], facts["state"]) == (os.getpid(), "running")
        holder.wait()
        holder.stdout.close()
    assert list(claims(tmp_path)) == ["claim-000004.json"] and not words, "nobody waited for a clock"


def test_a_driver_of_another_machine_counts_while_its_claim_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.heartbeat._LOOK_AGAIN_S", 2.0)
    words: list[str] = []
    with every(0.5, lambda: claims_by_hand(tmp_path, 3)), pytest.raises(LedgerConflict, match="process 1 on elsewhere"):
        claims_by_hand(tmp_path, 3)
        with claimed(tmp_path, "edgefusion run", words.append):
            pass
    # Silent, whatever its clock said.
    for when in (time.time(), time.time() + 300, time.time() - 300):
        claims_by_hand(tmp_path, 9, when=when)
        with claimed(tmp_path, "edgefusion run", words.append):
            assert list(claims(tmp_path)) == ["claim-000010.json"]
        (tmp_path / "claim-000010.json").unlink()
    assert len(words) == 4
    # One that ended, and said so while it was watched.
    claims_by_hand(tmp_path, 9)
    with every(0.5, lambda: claims_by_hand(tmp_path, 9, state="ended")):
        refuse_second_driver(tmp_path, words.append)


def test_a_number_that_was_given_long_ago_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the claim two others came, and the first of them went."""
    claims_by_hand(tmp_path, 4, machine=this_machine(), pid=2**22 + 1)
    honest = claim.refuse_second_driver

    def slow(folder: Path, wait: Any) -> None:
        honest(folder, wait)
        claims_by_hand(tmp_path, 6)
        (tmp_path / "claim-000004.json").unlink()

    monkeypatch.setattr(claim, "refuse_second_driver", slow)
    with pytest.raises(LedgerConflict, match="process 1 on elsewhere"), claimed(tmp_path, "edgefusion run", print):
        pass
    assert list(claims(tmp_path)) == ["claim-000006.json"]


def test_one_that_was_silent_for_too_long_is_told_and_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "EVERY_S", 0.05)
    with claimed(tmp_path, "edgefusion run", print) as still_mine:
        claims_by_hand(tmp_path, 2)
        (tmp_path / "claim-000001.json").unlink()  # as the other one does
        with pytest.raises(LedgerConflict, match="process 1 on elsewhere"):
            still_mine()
        time.sleep(0.3)
    assert list(claims(tmp_path)) == ["claim-000002.json"] and claims(tmp_path)["claim-000002.json"]["pid"] == 1


def test_a_place_that_cannot_be_looked_at_or_written_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EdgeFusionError, match="could not be written"), claimed(place, "edgefusion run", print):
            pass

    def listdir(place: Path) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(EdgeFusionError, match="cannot be listed"), claimed(tmp_path, "edgefusion run", print):
        pass


def test_without_hard_links_a_folder_is_held_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        with claimed(tmp_path, "edgefusion run", print):
            pass
    assert list(claims(tmp_path)) == ["claim-000002.json"]
