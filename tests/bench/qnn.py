"""A UNet for Qualcomm's HTP: W8A16, compiled offline to a context binary with CPU fallback disabled. Needs the `qnn` extra.

    PYTHONPATH=. python tests/bench/qnn.py FOLDER [--model zoo:student-fewstep] [--size-px N]

`--model bk-sdm-tiny --size-px 512` is the full-size student with random weights (19 GB of memory, 4 GB of disk). Steps whose files lie in
FOLDER are not done again. Compile time and size are the compiler's on this machine; nothing is run on a phone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from cluster.errors import EdgeFusionError
from export.blocks import ARCHITECTURES, read_architecture
from export.graph import Graph, _Unet, graphs_of, to_onnx
from export.parity import snr_db
from export.targets.qnn import SM8650, TARGETS, compile_context, quantise_qnn
from factory.models import quiet
from trainer.models import open_pipeline


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path)
    ask.add_argument("--model", default="zoo:student-fewstep")
    ask.add_argument("--size-px", type=int, default=None, help="of an architecture without weights")
    ask.add_argument("--rows", type=int, default=2, help="inputs that calibrate")
    ask.add_argument("--compile-only", action="store_true", help="do not compare with PyTorch")
    asked = ask.parse_args()
    quiet()
    TARGETS["qnn"].require()
    place = asked.folder / f"{asked.model.replace(':', '-').replace('/', '-')}{asked.size_px or ''}"
    place.mkdir(parents=True, exist_ok=True)
    notes, plain = place / "seconds.json", place / "unet.onnx"
    spent: dict[str, float] = json.loads(notes.read_text()) if notes.exists() else {}

    def timed(what: str, made: Path, work: Any) -> None:
        if made.exists():
            return
        began = time.perf_counter()
        work()
        spent[what] = round(time.perf_counter() - began, 1)
        notes.write_text(json.dumps(spent))
        print(f"{what}: {spent[what]} s", flush=True)

    graph = unet_graph(asked.model, asked.size_px)
    rows = [inputs_like(graph, seed) for seed in range(asked.rows)]
    target, origin = place / "unet.w8a16.onnx", place / "unet.w8a16.source.onnx"
    binary = place / "unet.w8a16_qnn.bin"
    timed("lower", plain, lambda: to_onnx(graph, plain))
    timed("quantise", origin, lambda: quantise_qnn(plain, origin, "w8a16", rows, []))
    try:
        timed("compile", binary, lambda: compile_context(origin, target))
    except EdgeFusionError as error:
        raise SystemExit(str(error)) from error
    fallback = TARGETS["qnn"].fallback(target) or {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = Table(
        "what",
        "value",
        title=f"{asked.model} for {SM8650.name} · onnxruntime-qnn {metadata.version('onnxruntime-qnn')} · commit {commit}",
    )
    table.add_row("latent", " x ".join(map(str, graph.inputs["latent"].shape)))
    table.add_row("operators on the NPU", str(fallback["accelerated"]))
    table.add_row("operators on the CPU", str(sum(Counter(fallback["not_accelerated"]).values())))
    table.add_row("context binary", f"{binary.stat().st_size / 1e6:.1f} MB")
    table.add_row("seconds to " + ", ".join(spent), ", ".join(map(str, spent.values())))
    if not asked.compile_only:
        import onnxruntime

        wanted = graph.module(*graph.inputs.values()).detach().numpy()
        session = onnxruntime.InferenceSession(str(origin), providers=["CPUExecutionProvider"])
        got = np.asarray(session.run(None, {name: tensor.numpy() for name, tensor in graph.inputs.items()})[0])
        table.add_row(
            "SNR against PyTorch fp32, integers played by ONNX Runtime's CPU", f"{snr_db(wanted, got):.1f} dB"
        )
    Console(width=120).print(table)


def unet_graph(model: str, size_px: int | None) -> Graph:
    if model not in ARCHITECTURES:
        return graphs_of(open_pipeline(model))[1]
    config, side, tokens = read_architecture(model, size_px)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(config | {"sample_size": side})
    latent, text = (
        torch.randn(1, config["in_channels"], side, side),
        torch.randn(1, tokens, config["cross_attention_dim"]),
    )
    inputs = {"latent": latent, "timestep": torch.tensor([999.0]), "text": text}
    return Graph("unet", _Unet(unet).eval(), inputs, "prediction")


def inputs_like(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """The example inputs first, then noise of their shapes at other timesteps."""
    if seed == 0:
        return {name: tensor.numpy() for name, tensor in graph.inputs.items()}
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(tensor.shape).astype(np.float32) for name, tensor in graph.inputs.items()}
    return drawn | {"timestep": np.array([rng.integers(1000)], np.float32)}


if __name__ == "__main__":
    with torch.no_grad():
        main()
