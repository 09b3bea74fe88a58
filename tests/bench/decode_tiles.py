"""Decoding in tiles beside the whole decoder: how near, what marks the seams, and what memory it takes.

    PYTHONPATH=. python tests/bench/decode_tiles.py [--size-px 512] [--tile 32] [--overlap 4]

The shipped student's VAE on latents of noise whose strength changes across the picture; PyTorch on the CPU, each way in a process of its own.
Memory is the peak above what the process held before it decoded.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table

from export.decode_tiles import TiledDecoder, starts
from factory.models import quiet, resolve


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--size-px", type=int, default=512)
    ask.add_argument("--tile", type=int, default=32)
    ask.add_argument("--overlap", type=int, default=4)
    ask.add_argument("--decode", nargs=2, metavar=("WAY", "FILE"), help="one way, in this process")
    asked = ask.parse_args()
    if asked.decode:
        return decode(asked, asked.decode[0], Path(asked.decode[1]))
    table = Table("way", "PSNR dB", "error at seams / elsewhere", "peak MiB above", "CPU s", title="pocket VAE, CPU")
    drawn: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("whole", "tiled", "own"):
            file = Path(folder) / f"{way}.pt"
            command = [sys.executable, __file__, *sys.argv[1:], "--decode", way, str(file)]
            mib, cpu_s = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
            drawn[way] = torch.load(file, weights_only=True)
            error = float((drawn[way] - drawn["whole"]).square().mean())
            near = f"{-10 * torch.log10(torch.tensor(error / 4)):.1f}" if error else "equal"
            seams = f"{seam_ratio(drawn['whole'], drawn[way], asked.tile, asked.overlap, 8):.2f}"
            table.add_row(way, near, seams if error else "", mib, cpu_s)
    Console(width=110).print(table)
    print("own: with each tile's own statistics in the norms, as tiles are decoded elsewhere")


def decode(asked: Any, way: str, file: Path) -> None:
    quiet()
    vae: Any = AutoencoderKL.from_pretrained(Path(resolve("zoo:student-fewstep")) / "vae")
    side = asked.size_px // 8
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.randn(1, 16, side // 4, side // 4), side, mode="bicubic")
    latent = coarse * torch.linspace(0.3, 1.5, side)
    decoder = vae.decoder.eval() if way == "whole" else TiledDecoder(vae.decoder, asked.tile, asked.overlap).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with torch.inference_mode():
        picture = with_own_statistics(decoder, latent) if way == "own" else decoder(latent)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    torch.save(picture.clamp(-1, 1).clone(), file)
    print(f"{more / 1024:.0f} {time.process_time() - began:.1f}")


def with_own_statistics(decoder: Any, latent: torch.Tensor) -> torch.Tensor:
    """As a TiledDecoder draws, but every tile normalised by itself."""
    x, decoder._noting = decoder._early(latent), True
    drawn = decoder._tiles(x, decoder._later, x.shape[-1] // latent.shape[-1])
    decoder._noting = False
    return drawn


def seam_ratio(whole: torch.Tensor, tiled: torch.Tensor, tile: int, overlap: int, factor: int) -> float:
    """How much larger the error's steps from pixel to pixel are where tiles meet than elsewhere; 1: nothing marks the seams."""
    found: list[float] = []
    for axis in (-1, -2):
        side = whole.shape[axis] // factor
        steps = (tiled - whole).diff(dim=axis).abs().transpose(axis, -1).flatten(0, -2).mean(dim=0)
        begins = starts(side, tile, overlap)
        near = torch.zeros(len(steps), dtype=torch.bool)
        for before, after in pairwise(begins):
            near[after * factor - 1 : (before + tile) * factor] = True
        if near.any() and not near.all() and float(steps[~near].mean()) > 0:
            found.append(float(steps[near].mean() / steps[~near].mean()))
    return max(found, default=1.0)


if __name__ == "__main__":
    main()
