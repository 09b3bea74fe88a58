"""A run over several real nodes gives the bytes of one process, whatever happens to the nodes and to the driver; a training goes on
on what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PAUSE_S = 60.0
SHORT_CUT_S = 1.5
"""A node without a cable is given up within about 3 s here (conftest.py: three checks, a second apart, that fail at once); one that is silent within about 10 s."""


def words(folder: Path, where: str) -> list[str]:
    return [sys.executable, str(Path(__file__).parent / "slow_make.py"), str(folder), where]


def data_bytes(data: Path) -> dict[str, bytes]:
    """Every file of the data set but the index, a copy of the ledger's columns that notes when each entry was written."""
    files = [p for p in sorted(data.rglob("*")) if p.is_file() and p.parent.name != "index"]
    return {str(p.relative_to(data)): p.read_bytes() for p in files}


class Run:
    """A driver on the head node, and how far its output folder is."""

    def __init__(self, nodes: Any, out: Path, total: int) -> None:
        self.nodes, self.out, self.total = nodes, out, total
        self.said = out.parent / "driver.log"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.said.open("ab") as log:
            return self.nodes.popen(words(self.out, self.nodes.address), stdout=log, stderr=log)

    def units(self) -> int:
        return len(list((self.out / "ledger").glob("unit-*.parquet")))

    def reach(self, units: int) -> None:
        """Wait until so many units are committed; the run must not be over by then."""
        end = time.monotonic() + 300
        while self.units() < units:
            assert self.process.poll() is None, f"the driver ended early:\n{self.said.read_text()[-3000:]}"
            assert time.monotonic() < end, (
                f"{self.units()} of {units} units after 300 s:\n{self.said.read_text()[-3000:]}"
            )
            time.sleep(0.1)
        assert self.units() < self.total, "the run was over before anything could be done to it"
        print(f"{time.strftime('%X')} {self.units()} units", flush=True)

    def lost(self, node: int) -> None:
        """Wait until the head has given the node up."""
        end = time.monotonic() + 60
        while node in self.nodes.alive():
            assert time.monotonic() < end, f"node {node} is silent and still counts as alive"
            time.sleep(0.2)


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_run_survives_lost_paused_and_cut_off_nodes_and_a_killed_driver(nodes: Any, tmp_path: Path) -> None:
    subprocess.run(
        words(tmp_path / "alone", "in-process"),
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert nodes.alive() == {0, 1, 2, 3}
    run = Run(nodes, tmp_path / "out", len(list((tmp_path / "alone" / "ledger").iterdir())))

    run.reach(4)
    nodes.kill(1)
    run.lost(1)

    run.reach(run.units() + 4)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert not (run.out / "manifest.parquet").exists()
    run.process = run.start()

    run.reach(run.units() + 2)
    nodes.pause(2)
    paused = time.monotonic()
    run.lost(2)
    nodes.start(1)
    run.reach(run.units() + 4)
    time.sleep(max(0.0, PAUSE_S - (time.monotonic() - paused)))
    run.reach(run.units() + 1)
    nodes.resume(2)

    # A cut that is mended before Ray gives the node up is no loss at all.
    run.reach(run.units() + 2)
    for _ in range(2):
        nodes.cut(3)
        time.sleep(SHORT_CUT_S)
        nodes.heal(3)
        run.reach(run.units() + 2)
        assert 3 in nodes.alive()

    run.reach(run.units() + 2)
    nodes.cut(3)
    run.lost(3)
    run.reach(run.units() + 2)
    nodes.heal(3)

    assert run.process.wait(timeout=300) == 0, run.said.read_text()[-3000:]
    print(run.said.read_text()[-2000:])
    mine, theirs = data_bytes(run.out), data_bytes(tmp_path / "alone")
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
