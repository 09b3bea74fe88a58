"""What the integers of a quantised UNet cost in pictures: the shipped student's W8A16, W8A8 and W8 builds beside PyTorch in float32.

    PYTHONPATH=. python tests/bench/quantised.py [FOLDER] [--prompts 512]

ONNX Runtime and OpenVINO on the CPU, 2 steps, prompts of the zoo's evaluation set (other ones calibrate), picture i from seed i, R@1 by the
zoo's judge, which filtered nothing. Pictures of a w8a16 build are emulated in ONNX Runtime: the arithmetic is a chip's, played by the CPU.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from export.bundle import export_student, read_bundle
from export.recipe import ExportRecipe
from export.targets.registry import find_target
from factory.models import ZOO, quiet, resolve

CALIBRATE = 8


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", nargs="?", type=Path, help="where the bundles stay; a temporary folder if left out")
    ask.add_argument("--prompts", type=int, default=512)
    asked = ask.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure(asked.folder or Path(place), asked.prompts)


def measure(folder: Path, count: int) -> None:
    quiet()
    captions = pq.read_table(ZOO / "evalset.parquet", columns=["caption"])["caption"].to_pylist()
    prompts = [*captions[-CALIBRATE:], *captions[:count]]
    recipe = ExportRecipe.model_validate(
        {
            "precisions": ["fp32", "w8a16", "w8a8", "w8"],
            "calibration_prompts": CALIBRATE,
            "parity_prompts": count,
            # Nothing is refused: what it costs is what is asked.
            "gates": {
                **{"judge": {"kind": "open_clip", "model": "zoo:judge"}, "clip_margin": 1, "recall_margin": 1},
                **{"quantised_psnr_db": 0, "worst_psnr_db": 0, "block_snr_db": None, "ssim": None},
            },
        }
    )
    began = time.perf_counter()
    export_student(Path(resolve("zoo:student-fewstep")), prompts, recipe, folder, lambda what: print(what, flush=True))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = Table(
        *(
            "build",
            "arithmetic",
            "UNet SNR dB",
            "least block",
            "PSNR dB",
            "worst",
            "SSIM",
            "CLIP",
            "R@1",
            "points lost",
        ),
        title=f"pocket student, {count} prompts, 2 steps \u00b7 {platform.machine()} \u00b7 commit {commit} \u00b7 {time.perf_counter() - began:.0f} s",
    )
    for name in recipe.targets:
        for build, facts in read_bundle(folder / name)["builds"].items():
            proof, judged = facts["parity"], facts["parity"]["judge"]
            blocks, kind = proof.get("block_snr_db"), find_target(name).times_kind(facts["precisions"])
            lost = 100 * (judged["pytorch"]["recall_at_1"] - judged["build"]["recall_at_1"])
            table.add_row(
                f"{name} {build}",
                kind,
                str(proof["graph_snr_db"]["unet"]),
                "" if not blocks else f"{min(blocks.values())} ({min(blocks, key=lambda one: blocks[one])})",
                str(proof["psnr_db"]),
                str(proof["psnr_db_min"]),
                f"{proof['ssim_mean']:.4f}",
                f"{judged['build']['clip_mean']:.4f}",
                f"{judged['build']['recall_at_1']:.4f}",
                f"{lost:.2f}",
            )
    Console(width=150).print(table)
    print(
        f"PyTorch's own pictures: CLIP {judged['pytorch']['clip_mean']:.4f}, R@1 {judged['pytorch']['recall_at_1']:.4f}"
    )


if __name__ == "__main__":
    main()
