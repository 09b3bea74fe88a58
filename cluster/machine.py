"""What this machine is, what is installed on it, and how much memory a run takes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NEEDED = [
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "open_clip_torch",
    "webdataset",
    "ray",
    "pyarrow",
    "fsspec",
    "safetensors",
    "pydantic",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "imagehash",
    "matplotlib",
    "jinja2",
    "duckdb",
    "tensorboardX",
]
OPTIONAL = {
    "resvg_py": "draws the zoo's pictures: pip install 'edgefusion[zoo]'",
    "vllm": "writes prompts faster; it pins torch and so has an environment of its own: edgefusion cluster environment make vllm",
}


def stand_in(folder: str) -> None:
    """In a worker: work in the driver's folder, wherever Ray was started, so that a recipe's relative paths mean what they mean there."""
    with suppress(OSError):  # a node that has no such folder; what is not found there is named by its own error
        os.chdir(folder)


def machine_facts() -> dict[str, str]:
    """Python, cores, memory, disk and GPUs in words."""
    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "Python": f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
        "bf16 on this CPU": ", ".join(fast) or "emulated, very slow: train in fp32",
        "memory": f"{memory / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
        "GPUs": ", ".join(gpus) or "none",
    }


def this_machine() -> str:
    """Names the kernel and the process namespace that this process lives in: a number of a process means something there only, and two hosts
    or containers may well have one name."""
    try:
        where = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        where = f"{platform.node()} {uuid.getnode()}"
    return hashlib.sha256(where.encode()).hexdigest()[:16]


def born(pid: int) -> float | None:
    """When the process of this number on this machine began, seconds by a clock of its own; None if nothing can be known of one.

    Numbers are given again once their process is gone; a number and its birth are not."""
    try:  # since the kernel began: no setting of the clock moves it. The program's name, in brackets, may hold anything
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        if Path("/proc/self/stat").exists():
            return None
    import psutil

    try:  # not Linux
        return round(psutil.Process(pid).create_time(), 1)
    except psutil.Error:
        return None


def load_per_core() -> float:
    """Processes that wanted a core in the last minute, our own included, for each core there is: far above 1, times taken now are too long."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def cache_folder() -> Path:
    """Where this user keeps what can be made again: EDGEFUSION_CACHE, else `edgefusion` below XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("EDGEFUSION_CACHE")
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(above) / "edgefusion").expanduser().absolute()


def version_of(package: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def provided_by(package: str) -> tuple[str, str] | None:
    """The distribution that brings what `package` does, and its version: itself, or one that brings the module of its name in its place
    (onnxruntime-gpu, which is not installed beside onnxruntime)."""
    if version := version_of(package):
        return package, version
    others = metadata.packages_distributions().get(package, ())
    return next(((name, version) for name in others if (version := version_of(name))), None)


def pins(package: str, extras: Sequence[str] = ()) -> dict[str, str]:
    """Every distribution that `package` with `extras` brings, as installed here, by the version without what was built locally (`+cpu`)."""
    found: dict[str, str] = {}
    todo: list[tuple[str, tuple[str, ...]]] = [(package, tuple(extras))]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while todo:
        if (one := todo.pop()) in seen:
            continue
        seen.add(one)
        name, wanted = one
        try:
            about = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name != package:
            found[canonicalize_name(name)] = about.version.partition("+")[0]
        for text in about.requires or ():
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                todo.append((need.name, tuple(sorted(need.extras))))
    return dict(sorted(found.items()))


def commit() -> str:
    """The commit of this checkout, or `unknown`: a package installed below another project's checkout is not of its commit."""
    own = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=own.parent, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", own.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@contextmanager
def watch_memory() -> Generator[Callable[[], int]]:
    """Yields a function that says the peak so far of this process tree's memory, bytes (shared pages counted once)."""
    import psutil

    peak, own = 0, psutil.Process()

    def look() -> None:
        nonlocal peak
        total = 0
        for process in [own, *own.children(recursive=True)]:
            try:
                total += (
                    process.memory_full_info().pss
                    if hasattr(process.memory_full_info(), "pss")
                    else process.memory_info().rss
                )
            except psutil.Error:
                continue
        peak = max(peak, total)

    with every(2.0, look):
        yield lambda: peak


def give_back_memory() -> None:
    """Hand the system what this process has freed: glibc keeps it, and so what a long run holds creeps up. Costs milliseconds; nothing elsewhere."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def every(seconds: float, do: Callable[[], None]) -> Generator[None]:
    """Call `do` from a thread until the block ends, and once more then."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            do()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        do()
