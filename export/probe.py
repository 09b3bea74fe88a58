"""One cold start of a build in a process of its own: time to open, time to the first picture, peak memory. Prints one line of JSON.

Imports no PyTorch, so that what it measures is the build and its runtime (of which ExecuTorch's brings PyTorch itself). `python -m export.probe BUNDLE BUILD THREADS`
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def peak_bytes() -> int:
    """Of this process since it began. (Linux's ru_maxrss would count the parent's memory from before exec.)"""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    began = time.perf_counter()
    from export.runtime import Build
    from export.targets.registry import target_of
    from export.words import tokenize

    folder, name, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    facts = json.loads((folder / "bundle.json").read_text())
    row = tokenize(folder, facts["tokenizer"], facts["prompts"][:1])[0]
    libraries = time.perf_counter()
    calls = target_of(facts).open(folder, facts["builds"][name]["graphs"], threads)
    opened = time.perf_counter()
    Build(calls, facts["scheduler"], facts["latent_shape"]).picture(row, 0)
    told = {
        "libraries_s": libraries - began,
        "open_s": opened - libraries,
        "first_picture_s": time.perf_counter() - opened,
        "cold_start_s": time.perf_counter() - began,
    }
    print(json.dumps({**{key: round(value, 3) for key, value in told.items()}, "peak_memory_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
