"""What is said of this checkout."""

import subprocess
from pathlib import Path

import pytest

from cluster import machine


def test_a_copy_below_another_checkout_is_not_of_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        own = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(own, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "machine.py").touch()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    git("commit", "-q", "--allow-empty", "-m", "of another project")
    assert machine.commit() == "unknown"
    git("add", "machine.py")
    git("commit", "-q", "-m", "ours")
    assert machine.commit() == git("rev-parse", "HEAD")
