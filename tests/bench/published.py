"""Phase 2 beside diffusers' published LCM script, both as their users run them: samples per CPU-second and peak memory.

    PYTHONPATH=. python tests/bench/published.py train_lcm_distill_sd_wds.py [--steps 8] [--rounds 2] [--batch 16]

Take the script, unchanged, from examples/consistency_distillation of diffusers' repository. Each way is a process of its own on one thread; it
runs once for a few steps and once for many, and the difference is what counts, so that opening and saving do not. CPU time is the process's and
its children's. The teacher has zoo:teacher's UNet and autoencoder and a text encoder of 77 tokens, for which the script asks, with random weights.

Two things about the script on a CPU. Its teacher runs under `torch.autocast`, which on CPUs means bfloat16: slow where bfloat16 is emulated. The
second row therefore gives the script an environment in which that autocast is off (a sitecustomize.py, written here; the script stays as it is).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cluster.runner import InProcess
from factory.models import ZOO, quiet
from factory.pack import Sample, pack
from factory.stages import encode_picture
from trainer.encode import encode
from trainer.models import open_pipeline
from trainer.recipe import EncodeRecipe

SIZE_PX, SAMPLES, W = 64, 512, (5.0, 15.0)
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
NO_AUTOCAST = """
import torch
kind = torch.autocast
class autocast(kind):
    def __init__(self, device_type, *rest, **more):
        super().__init__(device_type, *rest, **{**more, "enabled": False})
torch.autocast = autocast
"""
OURS = """
import json, sys
from pathlib import Path
from trainer.loop import train
from trainer.recipe import TrainerRecipe
train(TrainerRecipe.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), seed=0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument(
        "--steps", type=int, default=8, help="steps that count; the short run has 2, the long one so many more"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    asked = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        teacher, plain, encoded = (
            write_teacher(place / "teacher"),
            write_data(place / "plain"),
            write_data(place / "encoded"),
        )
        encode(EncodeRecipe(data=str(encoded), teacher=str(teacher), size_px=SIZE_PX, threads=1), InProcess())
        (place / "off").mkdir()
        (place / "off" / "sitecustomize.py").write_text(NO_AUTOCAST)
        ways: dict[str, Any] = {
            "the script": lambda n, out: theirs(asked, teacher, plain, n, out),
            "the script, its teacher in float32": lambda n, out: theirs(asked, teacher, plain, n, out, place / "off"),
            "ours, student as large, encoding each time": lambda n, out: ours("whole", asked, teacher, plain, n, out),
            "ours, student as large, encodings beside the shards": lambda n, out: ours(
                "whole", asked, teacher, encoded, n, out
            ),
            "ours, BK-SDM-Tiny, encodings beside the shards": lambda n, out: ours(
                "tiny", asked, teacher, encoded, n, out
            ),
        }
        seconds: dict[str, list[float]] = {what: [] for what in ways}
        peaks: dict[str, float] = dict.fromkeys(ways, 0.0)
        for turn in range(asked.rounds):
            for number, (what, run) in enumerate(ways.items()):
                short, _ = run(2, place / f"{number}-{turn}-short")
                long, peak = run(2 + asked.steps, place / f"{number}-{turn}-long")
                seconds[what].append(long - short)
                peaks[what] = max(peaks[what], peak)
                print(f"{what}: {short:.0f} and {long:.0f} CPU-seconds", file=sys.stderr, flush=True)
    show(asked, seconds, peaks)


def write_teacher(folder: Path) -> Path:
    """The zoo's teacher in float32, with a tokenizer and a text encoder of 77 tokens."""
    torch.manual_seed(0)
    pipeline = open_pipeline("zoo:teacher")
    tokenizer = CLIPTokenizer.from_pretrained(ZOO / "teacher" / "tokenizer", model_max_length=77)
    small = pipeline.text_encoder.config.to_dict()
    pipeline.register_modules(
        text_encoder=CLIPTextModel(CLIPTextConfig(**{**small, "max_position_embeddings": 77})), tokenizer=tokenizer
    )
    pipeline.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    pictures = np.random.default_rng(0).integers(0, 256, (SAMPLES, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    pack(
        [
            Sample(hashlib.sha256(str(i).encode()).hexdigest(), encode_picture(p, "png"), "png", f"a red apple {i}")
            for i, p in enumerate(pictures)
        ],
        folder,
    )
    return folder


def theirs(
    asked: argparse.Namespace, teacher: Path, data: Path, steps: int, out: Path, first: Path | None = None
) -> tuple[float, float]:
    shards = sorted(data.glob("*.tar"))
    options = {
        "pretrained_teacher_model": teacher,
        "output_dir": out,
        "train_shards_path_or_url": shards[0],
        "resolution": SIZE_PX,
        "train_batch_size": asked.batch,
        "max_train_steps": steps,
        "max_train_samples": SAMPLES,
        "dataloader_num_workers": 1,
        "learning_rate": 1e-6,
        "adam_weight_decay": 0,
        "loss_type": "huber",
        "checkpointing_steps": 10**9,
        "validation_steps": 10**9,
        "mixed_precision": "no",
        "w_min": W[0],
        "w_max": W[1],
        "seed": 0,
    }
    line = [sys.executable, str(asked.script), *(f"--{name}={value}" for name, value in options.items())]
    return measured(line, {"PYTHONPATH": str(first)} if first else {})


def ours(
    student: str, asked: argparse.Namespace, teacher: Path, data: Path, steps: int, out: Path
) -> tuple[float, float]:
    phase = {"batch_images": asked.batch, "learning_rate": 1e-6, "checkpoint_s": 1e9}
    guidance = {"guidance_min": W[0], "guidance_max": W[1], "guidance_input": True}
    recipe = {
        "teacher": str(teacher),
        "student": student,
        "size_px": SIZE_PX,
        "threads": 1,
        "adapt": phase | {"steps": 0},
        "distill": phase | guidance | {"steps": steps},
    }
    return measured([sys.executable, "-c", OURS, json.dumps(recipe), str(data), str(out)], {"PYTHONPATH": "."})


def measured(line: list[str], more: dict[str, str]) -> tuple[float, float]:
    """CPU-seconds of a process and its children, and the most memory that one of them held, GiB."""
    environment = {**os.environ, **THREADS, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(line[:3])} ended with status {status}:\n{said[-3000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def show(asked: argparse.Namespace, seconds: dict[str, list[float]], peaks: dict[str, float]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = Table(
        "phase 2",
        "samples per CPU-second (median)",
        "spread",
        "of the script",
        "of it in float32",
        "peak GiB",
        title=f"{SIZE_PX} px, batch {asked.batch}, {asked.steps} steps, {asked.rounds} rounds, one thread · commit {commit} · "
        f"{platform.machine()}, {os.cpu_count()} cores, bf16 {'in hardware' if hardware_bf16() else 'emulated'}",
    )
    count = asked.batch * asked.steps
    rate = {what: count / statistics.median(found) for what, found in seconds.items()}
    for what, found in seconds.items():
        table.add_row(
            what,
            f"{rate[what]:.2f}",
            f"{count / max(found):.2f} to {count / min(found):.2f}",
            f"{rate[what] / rate['the script']:.2f} x",
            f"{rate[what] / rate['the script, its teacher in float32']:.2f} x",
            f"{peaks[what]:.2f}",
        )
    Console(width=160).print(table)


def hardware_bf16() -> bool:
    from factory.pocket.fit import half_is_fast

    return half_is_fast()


if __name__ == "__main__":
    main()
