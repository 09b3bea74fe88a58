"""What a person opens after a run: bundles side by side, a page that draws in the browser, and the lines to type. Asks no network."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import EdgeFusionError
from export import ort_web
from export.bundle import read_bundle
from export.compare import write_compare
from export.demo import write_demo
from export.pages import serve_line
from export.recipe import ExportRecipe
from export.targets.registry import find_target, target_of

COMPARE, DEMO = "compare.html", "demo"


def write_pages(out: Path, recipe: ExportRecipe, progress: Callable[[str], None] = lambda what: None) -> None:
    """Write `out/compare.html` of the bundles that run on this machine and, where onnxruntime-web lies in the cache, `out/demo`."""
    onnx = out / "export" / "onnx"
    if "onnx" in recipe.targets and not (out / DEMO).exists() and ort_web.is_cached():
        progress("the browser's page")
        try:
            write_demo(onnx, out / DEMO, _first_build(onnx))
        except EdgeFusionError as error:
            # A student that browsers cannot run ends no run: its bundles are proven.
            progress(f"no page for the browser: {error.what}")
    if here := _runs_here(out):
        write_compare(here, out / COMPARE, runs=recipe.latency_runs, threads=recipe.threads, progress=progress)


def has_pages(out: Path, recipe: ExportRecipe) -> bool:
    """Whether nothing is left to write: no page wanted, compare.html there, or no bundle that this machine could measure."""
    if not recipe.pages or (out / COMPARE).exists():
        return True
    return all(find_target(name, recipe.openvino_device).not_here() for name in recipe.targets)


def doors(out: Path) -> dict[str, Any] | None:
    """For the report: which pages there are, and a command line for each way to use the bundles; None without a bundle."""
    places = _bundles(out)
    if not places:
        return None
    lines: list[tuple[str, str]] = []
    if here := _runs_here(out):
        build, prompt = _first_build(here[0]), shlex.quote((read_bundle(here[0])["prompts"] or ["a red apple"])[0])
        words = f"{prompt} --seed 3 --out picture.png"
        lines += [
            ("draw a picture", f"edgefusion export try {_word(here[0])} {words} --precision {build}"),
            ("the same without this project", f"python {_word(here[0] / 'sample.py')} {words} --build {build}"),
        ]
        lines += [(f"prove {place.name} again", f"edgefusion export verify {_word(place)}") for place in here]
        if not (out / COMPARE).exists():
            every = " ".join(map(_word, here))
            lines.append(("side by side", f"edgefusion export compare {every} --out {_word(out / COMPARE)}"))
    onnx = out / "export" / "onnx"
    if onnx in places:
        if not (out / DEMO).exists():
            fetch = f"edgefusion export demo {_word(onnx)} --out {_word(out / DEMO)}"
            lines.append(("make the browser's page (npm and the network, once)", fetch))
        lines.append(("open it at http://localhost:8000", serve_line(out / DEMO)))
    return {"compare": (out / COMPARE).exists(), "demo": (out / DEMO).exists(), "lines": lines}


def _word(path: Path) -> str:
    """As a shell takes it, spaces and all."""
    return shlex.quote(str(path))


def _bundles(out: Path) -> list[Path]:
    return sorted(path.parent for path in (out / "export").glob("*/bundle.json"))


def _runs_here(out: Path) -> list[Path]:
    return [place for place in _bundles(out) if not target_of(read_bundle(place)).not_here()]


def _first_build(bundle: Path) -> str:
    return next(iter(read_bundle(bundle)["builds"]))
