"""The raw-picture path beside its peers, in samples a CPU second: PYTHONPATH=. python tests/bench/raw.py [PICTURES] --img2dataset PYTHON --data-juicer PYTHON

Each PYTHON is the interpreter of an environment that has the peer (img2dataset 1.47, py-data-juicer 1.6.1); one that is left out is not run:

    python -m venv i2d && i2d/bin/pip install img2dataset
    python -m venv dj && dj/bin/pip install py-data-juicer imagededup "transformers<6" torch aiohttp

All read the same JPEG files from the same disk with one worker and one thread each, and write crops of 256 px as JPEG of quality 95. Each way runs
in processes of its own, twice: over few pictures and over all. The difference is the cost of a picture; what the few cost beyond is start-up.
img2dataset reads `file://` URLs, so no network is measured. Data-Juicer reads what img2dataset wrote, since it has no operator that crops.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import raw_work
from PIL import Image
from rich.console import Console
from rich.table import Table

FEW = 64
_IMG2DATASET = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1] + "/list.parquet", input_format="parquet", url_col="url", caption_col="caption", output_folder=sys.argv[2],
        output_format="webdataset", image_size={size}, resize_mode="center_crop", min_image_size={least}, encode_quality={quality},
        number_sample_per_shard={shard}, processes_count=1, thread_count=1, enable_wandb=False)
"""
_DATA_JUICER = """
import sys
sys.argv = ["dj-process", "--config", sys.argv[1]]
from data_juicer.tools.process_data import main
main()
"""
DOES = (
    # what, ours, img2dataset, Data-Juicer
    (
        "decode, least size, centre crop, JPEG",
        "yes",
        "yes (area filter; ours bicubic)",
        "least size only; crops nothing",
    ),
    ("best of three crops by CLIP", "`all` only", "no", "no"),
    ("text and picture in tar shards, a table beside", "yes", "yes", "writes JSON lines that name the files"),
    ("SHA-256 of what came in", "at the plan and again when read", "yes", "no"),
    ("every shard proven by checksums, resumable to the byte", "yes", "by shard", "no"),
    ("CLIP similarity", "yes, batches of 64", "no", "yes, one at a time"),
    ("perceptual hash", "yes, and within 2 bits", "no", "yes, equal hashes"),
    ("duplicates by meaning", "cosine of at least 0.98", "no", "no"),
    ("embeddings, hashes, scores stored", "yes", "no", "similarity only"),
    ("EXIF read", "no", "yes", "no"),
)


@dataclass(frozen=True)
class Cost:
    """What a way used of the machine."""

    cpu_s: float
    start_s: float
    """CPU seconds beyond what so many pictures cost: imports, opening models."""
    per_picture_ms: float
    out: str

    def rate(self) -> float:
        return 1000 / self.per_picture_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pictures", type=int, nargs="?", default=5000)
    parser.add_argument("--img2dataset", metavar="PYTHON", help="interpreter of an environment with img2dataset")
    parser.add_argument("--data-juicer", metavar="PYTHON", help="interpreter of an environment with py-data-juicer")
    asked = parser.parse_args()
    if asked.pictures <= FEW:
        parser.error(f"PICTURES must be more than the {FEW} that show what start-up costs")
    load, costs = os.getloadavg()[0], dict[str, Cost]()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, count in (("few", FEW), ("all", asked.pictures)):
            raw_work.write_pictures(root / name, count)
        for way in ("resize", "centre", "all"):
            words = [sys.executable, raw_work.__file__, way]
            costs[f"ours: {way}"] = measured(root, asked.pictures, way, lambda i, o, w=words: [*w, str(i), str(o)])
        if asked.img2dataset:
            costs["img2dataset"] = img2dataset(root, asked.pictures, asked.img2dataset)
            if asked.data_juicer:
                costs["Data-Juicer"] = data_juicer(root, asked.pictures, asked.data_juicer)
        likeness = alike(root / "out-resize-all", root / "out-img2dataset-all") if asked.img2dataset else ""
    show(costs, asked.pictures, load)
    if likeness:
        Console(width=140).print(likeness)


def measured(root: Path, pictures: int, name: str, words: Callable[[Path, Path], list[str]]) -> Cost:
    """Run over the few and over all; `words(input, output)` is the command."""
    used, told = [], ""
    for part in ("few", "all"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = run(words(root / part, root / f"out-{name}-{part}"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    each = (used[1] - used[0]) / (pictures - FEW)
    Console(stderr=True).print(f"{name}: {used[0]:.1f} and {used[1]:.1f} CPU s")
    return Cost(used[1], used[0] - each * FEW, each * 1000, told.strip().splitlines()[-1] if told.strip() else "")


def run(words: list[str]) -> str:
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **quiet, **threads})
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])[:200]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def img2dataset(root: Path, pictures: int, python: str) -> Cost:
    script = _IMG2DATASET.format(
        size=raw_work.SIZE_PX, least=raw_work.MIN_SIZE_PX, shard=raw_work.SHARD, quality=raw_work.QUALITY
    )
    (root / "i2d.py").write_text(script)
    cost = measured(root, pictures, "img2dataset", lambda i, o: [python, str(root / "i2d.py"), str(i), str(o)])
    kept = sum(name.endswith(".jpg") for _, name in members(root / "out-img2dataset-all"))
    return Cost(cost.cpu_s, cost.start_s, cost.per_picture_ms, str(kept))


def data_juicer(root: Path, pictures: int, python: str) -> Cost:
    """Over img2dataset's crops, unpacked before the clock runs; the cost is of each picture that came in, as for the others."""
    raw_work.write_transformers_clip(root / "clip")
    (root / "dj.py").write_text(_DATA_JUICER)
    for part in ("few", "all"):
        crops = root / f"crops-{part}"
        crops.mkdir()
        rows = []
        for archive in sorted((root / f"out-img2dataset-{part}").glob("*.tar")):
            with tarfile.open(archive) as opened:
                opened.extractall(crops, filter="data")
        for path in sorted(crops.glob("*.jpg")):
            rows.append({"text": f"<__dj__image> {path.with_suffix('.txt').read_text()}", "images": [str(path)]})
        (root / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = [
            {"image_shape_filter": {"min_width": raw_work.SIZE_PX, "min_height": raw_work.SIZE_PX}},
            {"image_deduplicator": {"method": "phash"}},
            {"image_text_similarity_filter": {"hf_clip": str(root / "clip"), "min_score": 0.2}},
        ]
        paths = {
            "dataset_path": str(root / f"{part}.jsonl"),
            "export_path": str(root / f"out-juicer-{part}" / "x.jsonl"),
        }
        recipe = {"project_name": "raw", **paths, "np": 1, "use_cache": False, "open_tracer": False, "process": steps}
        (root / f"{part}.yaml").write_text(json.dumps(recipe))
    cost = measured(root, pictures, "juicer", lambda i, o: [python, str(root / "dj.py"), str(root / f"{i.name}.yaml")])
    kept = (root / "out-juicer-all" / "x.jsonl").read_text().count("\n")
    return Cost(cost.cpu_s, cost.start_s, cost.per_picture_ms, str(kept))


def members(folder: Path) -> list[tuple[Path, str]]:
    found = []
    for archive in sorted(folder.glob("*.tar")):
        with tarfile.open(archive) as opened:
            found += [(archive, name) for name in opened.getnames()]
    return found


def alike(ours: Path, theirs: Path) -> str:
    """How near our crops are to img2dataset's, for a way that drew something else would be no faster, only wrong."""
    pictures: list[dict[str, np.ndarray]] = []
    for folder in (ours, theirs):
        found: dict[str, np.ndarray] = {}
        for archive, name in members(folder):
            if name.endswith(".jpg") and len(found) < 200:
                with tarfile.open(archive) as opened:
                    content = opened.extractfile(name)
                    assert content is not None
                    picture = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
                found[name] = picture
        pictures.append(found)
    mine = np.stack([p.reshape(16, 16, 16, 16, 3).mean(axis=(1, 3)).ravel() for p in pictures[0].values()])
    other = np.stack([p.reshape(16, 16, 16, 16, 3).mean(axis=(1, 3)).ravel() for p in pictures[1].values()])
    # Ours are in the order of their digests, theirs in that of the list: each of ours finds its nearest among theirs.
    psnr = []
    theirs_in_order = list(pictures[1].values())
    for small, large in zip(mine, pictures[0].values(), strict=True):
        nearest = int(((other - small) ** 2).sum(axis=1).argmin())
        psnr.append(10 * np.log10(255**2 / max(np.mean((large - theirs_in_order[nearest].astype(float)) ** 2), 1e-9)))
    close = [value for value in psnr if value > 20]
    return f"of 200 of our crops {len(close)} are among 200 of theirs; PSNR to them {np.median(close):.1f} dB (median)"


def show(costs: dict[str, Cost], pictures: int, load: float) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    title = f"{pictures:,} pictures · commit {commit} · {platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before"
    table = Table("way", "pictures / CPU s", "CPU ms a picture", "start-up, CPU s", "all, CPU s", "left", title=title)
    for name, cost in costs.items():
        numbers = (f"{cost.rate():.1f}", f"{cost.per_picture_ms:.1f}", f"{cost.start_s:.1f}", f"{cost.cpu_s:.1f}")
        table.add_row(name, *numbers, cost.out)
    console = Console(width=140)
    console.print(table)
    if "img2dataset" in costs:
        ratio = costs["ours: resize"].rate() / costs["img2dataset"].rate()
        console.print(f"same work, decode to shards: ours {ratio:.2f} x img2dataset")
    if "Data-Juicer" in costs:
        both = costs["img2dataset"].per_picture_ms + costs["Data-Juicer"].per_picture_ms
        for way in ("centre", "all"):
            ratio = both / costs[f"ours: {way}"].per_picture_ms
            console.print(f"ours, {way}: {ratio:.2f} x img2dataset and then Data-Juicer")
    does = Table("what is done", "ours", "img2dataset", "Data-Juicer", title="where the work is not the same")
    for row in DOES:
        does.add_row(*row)
    console.print(does)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    Console().print(f"{time.monotonic() - began:.0f} s in all")
