"""How near making comes to a bare loop of the same models: PYTHONPATH=. python tests/bench/make.py [SAMPLES] [--runner ray|in-process] [--set KEY=VALUE]

The bare loop holds the pocket teacher and the filter CLIP in this process, paints and scores batch by batch, and keeps nothing:
no encoding, hashes, ledger or digests. Half of its batches run before making and half after, for machines drift. Making does the whole
of `factory make`. Its rate is taken between commits: from the last of the workers' first units to the last of all (Ray hands units
out later, and in heaps); what comes before is start-up, reported apart. Both see the
same prompts and batches, in one run; `--set` changes what making does with the cores. The bare loop has as many threads as there are cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.recipe import load_recipe
from cluster.runner import make_runner
from edgefusion import DEFAULT_RECIPE, Recipe
from factory.make import make
from factory.models import quiet, set_threads
from factory.models.clip import Clip
from factory.models.image import Painter
from factory.plan import make_plan
from factory.recipe import FactoryRecipe
from factory.units import plan_files, read_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", type=int, nargs="?", default=1000)
    parser.add_argument("--runner", default="ray")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    quiet()
    recipe = load_recipe(
        Recipe, DEFAULT_RECIPE, [f"factory.plan.prompts={asked.samples}", f"cluster.runner={asked.runner}"]
    )
    changed = load_recipe(Recipe, DEFAULT_RECIPE, [f"cluster.runner={asked.runner}", *asked.changes])
    with tempfile.TemporaryDirectory() as scratch:
        make_plan(recipe.factory, recipe.seed, Path(scratch), lambda n: None)
        before = bare_loop(recipe.factory, Path(scratch), slice(None, None, 2))
        began = time.time()
        runner = make_runner(changed.cluster)
        make(changed.factory, Path(scratch), runner)
        runner.close()
        workers = changed.factory.make.render_workers if asked.runner == "ray" else 1
        done = sorted(path.stat().st_mtime - began for path in (Path(scratch) / "ledger").iterdir())
        after = bare_loop(recipe.factory, Path(scratch), slice(1, None, 2))
    bare = 2 / (1 / before + 1 / after)
    # The last unit may be a short one, so only whole ones are counted.
    whole = asked.samples // recipe.factory.make.unit_images
    rate = (whole - workers) * recipe.factory.make.unit_images / (done[whole - 1] - done[workers - 1])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = Table(
        "what",
        "pictures/s",
        "ratio",
        title=f"{asked.samples} samples · {' '.join([asked.runner, *asked.changes])} · commit {commit} · {platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before",
        caption=f"first unit of {recipe.factory.make.unit_images} committed after {done[0]:.1f} s, the last after {done[-1]:.1f} s",
    )
    table.add_row("factory make", f"{rate:.2f}", f"{rate / bare:.3f}")
    table.add_row("bare loop", f"{bare:.2f}", "1.000")
    table.add_row("  its half before, after", f"{before:.2f}, {after:.2f}", "")
    Console(width=120).print(table)


def bare_loop(recipe: FactoryRecipe, folder: Path, which: slice) -> float:
    """Pictures a second over these of the batches; models' loading and the first batch are left out."""
    assert recipe.make.teacher is not None
    set_threads(os.cpu_count() or 1)
    painter, clip, each = Painter(recipe.make.teacher), Clip(recipe.make.scorer), recipe.make.teacher.batch_images
    rows = [row for path in plan_files(folder) for row in read_table(path).to_pylist() if row["outcome"] == "pending"]
    batches = [rows[i : i + each] for i in range(0, len(rows) // each * each, each)][which]
    began = time.monotonic()
    for number, batch in enumerate(batches):
        if number == 1:
            began = time.monotonic()
        prompts = [row["prompt"] for row in batch]
        pictures = painter.paint(prompts, [row["seed"] for row in batch])
        (clip.pictures(pictures) * clip.texts(prompts)).sum(axis=1)
    return (len(batches) - 1) * each / (time.monotonic() - began)


if __name__ == "__main__":
    main()
