"""One writer a folder: of several at the same moment, after deaths, across machines, without hard links."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster import claim
from cluster.claim import claimed, is_claim, refuse_second_driver
from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.heartbeat import HEARTBEAT, heartbeat
from cluster.machine import born, every, this_machine
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe, OnRay, stop_ray
from cluster.stage import PENDING, Row, Stage, Unit
from cluster.training import launch

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


def test_a_stopped_driver_keeps_its_folder(tmp_path: Path) -> None:
    holder = python(HOLDER, str(tmp_path))
    assert holder.stdout is not None and holder.stdout.readline() == b"mine\n"
    holder.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
    (name,) = claims(tmp_path)
    facts = claims(tmp_path)[name]
    for silent_s in (0, 3600):  # at once, and after an hour
        (tmp_path / name).write_text(json.dumps({**facts, "when": time.time() - silent_s}))
        with pytest.raises(LedgerConflict, match=f"process {holder.pid} on .* is stopped or stuck"):
            refuse_second_driver(tmp_path, print)
    holder.kill()
    holder.communicate()
    with claimed(tmp_path, "edgefusion run", print):
        pass


def test_a_process_that_has_the_number_of_a_dead_one_keeps_nothing(tmp_path: Path) -> None:
    here = {"machine": this_machine(), "pid": os.getppid()}
    claims_by_hand(tmp_path, 3, **here, born=born(os.getppid()))
    with pytest.raises(LedgerConflict, match=f"process {os.getppid()} on elsewhere"):
        refuse_second_driver(tmp_path, print)
    claims_by_hand(tmp_path, 3, **here, born=1.5)
    with claimed(tmp_path, "edgefusion run", print):
        assert list(claims(tmp_path)) == ["claim-000004.json"]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim is looked at all the time."""
    monkeypatch.setattr(claim, "EVERY_S", 0.05)


def taken_over(folder: Path) -> None:
    """As another machine does that took this process for gone."""
    claims_by_hand(folder, 2)
    (folder / "claim-000001.json").unlink()


@pytest.mark.usefixtures("often")
def test_one_that_was_silent_for_too_long_is_told_whatever_it_does_and_writes_no_more(tmp_path: Path) -> None:
    with (
        pytest.raises(LedgerConflict, match="process 1 on elsewhere"),
        claimed(tmp_path, "edgefusion run", print),
        heartbeat(tmp_path, lambda: None) as begin,
    ):
        begin("train")
        taken_over(tmp_path)
        time.sleep(300)
        raise AssertionError("nothing woke it")
    assert list(claims(tmp_path)) == ["claim-000002.json"] and claims(tmp_path)["claim-000002.json"]["pid"] == 1
    signal.raise_signal(signal.SIGUSR2)  # one that was on its way ends nobody


@pytest.mark.usefixtures("often")
def test_the_heartbeat_of_whoever_took_over_is_not_written_over(tmp_path: Path) -> None:
    theirs = json.dumps({"pid": 1, "host": "elsewhere", "state": "running", "when": time.time()})
    with (
        pytest.raises(LedgerConflict),
        claimed(tmp_path, "edgefusion run", print) as still_mine,
        heartbeat(tmp_path, still_mine) as begin,
    ):
        begin("train")
        taken_over(tmp_path)
        (tmp_path / HEARTBEAT).write_text(theirs)
        time.sleep(300)
    assert (tmp_path / HEARTBEAT).read_text() == theirs


@pytest.mark.usefixtures("often")
def test_ctrl_c_is_no_loss_and_a_loss_that_a_library_kept_to_itself_is_told_in_the_end(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what is in the background ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "one", "edgefusion run", print):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(LedgerConflict), claimed(tmp_path / "two", "edgefusion run", print):
        taken_over(tmp_path / "two")
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(300)


def test_what_runs_in_another_thread_is_told_when_it_asks(tmp_path: Path) -> None:
    def lose() -> None:
        with claimed(tmp_path, "edgefusion run", print) as still_mine:
            taken_over(tmp_path)
            still_mine()

    with ThreadPoolExecutor(1) as pool, pytest.raises(LedgerConflict, match="process 1 on elsewhere"):
        pool.submit(lose).result()


@pytest.mark.ray
@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("work", ["make", pytest.param("train", marks=pytest.mark.long)])
def test_one_that_waits_for_ray_is_told_too(tmp_path: Path, work: str) -> None:
    cluster = build_recipe(ClusterRecipe, {"cpus": 1, "train_gpu": False}, "test")

    def wait_long(mark: Path) -> None:
        mark.touch()
        time.sleep(300)
        mark.with_name("ended").touch()

    def look() -> None:
        if (tmp_path / "begun").exists() and (tmp_path / "claim-000001.json").exists():
            taken_over(tmp_path)

    class Slow:
        def __call__(self, rows: list[Row]) -> list[Row]:
            wait_long(tmp_path / "begun")
            return rows

    unit = Unit("unit-00000", [{"id": "a", "outcome": PENDING}])
    try:
        with (
            pytest.raises(LedgerConflict, match="process 1 on elsewhere"),
            every(0.2, look),
            claimed(tmp_path, "edgefusion run", print),
        ):
            if work == "make":
                list(OnRay(cluster).run([Stage("slow", Slow)], [unit]))
            else:
                launch(lambda: wait_long(tmp_path / "begun"), cluster, tmp_path / "training", 1, use_gpu=False)
        assert not (tmp_path / "ended").exists(), "it waited to the end"
    finally:
        stop_ray()


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
