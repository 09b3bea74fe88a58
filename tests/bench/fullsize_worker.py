"""One rival in a process of its own: opens, draws one picture to warm up, times others, prints one line of JSON.

`python fullsize_worker.py RIVAL FOLDER SIZE_PX THREADS RUNS`. Times in seconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, SD_STEPS, TOKENS = 2, 25, 77
PROMPT = "a red apple on a white table"


def median_s(work: Callable[[], Any], runs: int, warm: bool = True) -> float:
    if warm:
        work()
    times: list[float] = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    rival, folder, size_px, threads, runs = sys.argv[1], Path(sys.argv[2]), *(int(v) for v in sys.argv[3:6])
    began = time.perf_counter()
    if rival == "diffusers":
        told = run_diffusers(size_px, threads, runs)
    elif rival.startswith("genai"):
        told = run_genai(folder, size_px, threads, runs)
    else:
        told = run_build(rival, folder, threads, runs)
    from export.probe import peak_bytes

    print(json.dumps({**told, "peak_bytes": peak_bytes(), "process_s": time.perf_counter() - began}))


def run_build(rival: str, folder: Path, threads: int, runs: int) -> dict[str, float]:
    """`BUILD`, `BUILD+small` of our bundle, `ort`, `ort+small`: the same loop over each runtime's graphs."""
    import numpy as np

    from export.runtime import Build
    from export.targets.registry import find_target
    from export.words import tokenize

    bundle = folder / "bundle" / "openvino"
    facts = json.loads((bundle / "bundle.json").read_text())
    name, small = rival.removesuffix("+small"), rival.endswith("+small")
    began = time.perf_counter()
    if name == "ort":
        calls = open_ort(folder / "ort", small)
    else:
        names = dict(facts["builds"][name]["graphs"])
        if small:
            (path,) = (folder / "small").glob(f"{name}.*.xml")
            names["vae_decoder"] = f"../../small/{path.name}"
        calls = find_target("openvino").open(bundle, names, threads)
    opened = time.perf_counter() - began
    spent: dict[str, list[float]] = {}

    def timed(graph: str) -> Callable[[dict[str, Any]], Any]:
        def call(inputs: dict[str, Any]) -> Any:
            began = time.perf_counter()
            out = calls[graph](inputs)
            spent.setdefault(graph, []).append(time.perf_counter() - began)
            return out

        return call

    build = Build({graph: timed(graph) for graph in calls}, facts["scheduler"], facts["latent_shape"])
    row = tokenize(bundle, facts["tokenizer"], [PROMPT])[0]
    picture_s = median_s(lambda: build.picture(row, 0), runs)
    parts = {graph: float(np.median(times[len(times) // (runs + 1) :])) for graph, times in spent.items()}
    return {
        "open_s": opened,
        "text_s": parts["text_encoder"],
        "step_s": parts["unet"],
        "decode_s": parts["vae_decoder"],
        "picture_s": picture_s,
    }


def open_ort(place: Path, small: bool) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """ONNX Runtime as it comes: no option set."""
    import numpy as np
    import onnxruntime

    files = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "small" if small else "vae_decoder"}
    sessions = {
        graph: onnxruntime.InferenceSession(str(place / f"{file}.onnx"), providers=["CPUExecutionProvider"])
        for graph, file in files.items()
    }

    def call(graph: str) -> Callable[[dict[str, Any]], Any]:
        return lambda inputs: np.asarray(sessions[graph].run(None, inputs)[0])

    def decode(inputs: dict[str, Any]) -> Any:
        scale = 1.0 if small else 0.18215
        drawn = np.asarray(
            sessions["vae_decoder"].run(None, {"latent": (inputs["latent"] / scale).astype(np.float32)})[0]
        )
        return np.clip(drawn / 2 + 0.5, 0, 1)

    return {"text_encoder": call("text_encoder"), "unet": call("unet"), "vae_decoder": decode}


def run_genai(folder: Path, size_px: int, threads: int, runs: int) -> dict[str, float]:
    """OpenVINO GenAI's pipeline as it comes, but for the number of threads."""
    import openvino_genai

    began = time.perf_counter()
    pipe = openvino_genai.Text2ImagePipeline(str(folder / "genai"), "CPU", INFERENCE_NUM_THREADS=threads)
    opened = time.perf_counter() - began
    size = {"width": size_px, "height": size_px, "num_images_per_prompt": 1}

    def draw() -> Any:
        return pipe.generate(PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, rng_seed=0, **size)

    picture_s = median_s(draw, runs)
    metrics = pipe.get_performance_metrics()
    step_ms, decode_ms = metrics.get_unet_infer_duration().mean, metrics.get_vae_decoder_infer_duration()
    return {"open_s": opened, "step_s": step_ms / 1e3, "decode_s": decode_ms / 1e3, "picture_s": picture_s}


def run_diffusers(size_px: int, threads: int, runs: int) -> dict[str, float]:
    """Stable Diffusion 1.5's shapes in PyTorch eager float32: one guided step measured, 25 of them by multiplication."""
    import torch
    from fullsize_models import autoencoder, text_encoder, unet

    torch.set_num_threads(threads)
    began = time.perf_counter()
    torch.manual_seed(0)
    encoder, net, vae = text_encoder(), unet("sd15", size_px), autoencoder()
    vae.encoder = None
    opened = time.perf_counter() - began
    side = size_px // 8
    latent, words = torch.randn(1, 4, side, side), torch.randint(0, 1000, (2, TOKENS))
    with torch.inference_mode():
        text = encoder(words)[0]

        def step() -> Any:
            blank, worded = net(torch.cat([latent] * 2), torch.tensor([500, 500]), text, return_dict=False)[0].chunk(2)
            return blank + 7.5 * (worded - blank)

        text_s = median_s(lambda: encoder(words)[0], 1)
        step_s = median_s(step, runs)
        decode_s = median_s(lambda: vae.decode(latent / 0.18215, return_dict=False)[0], runs)
    total = text_s + SD_STEPS * step_s + decode_s
    return {"open_s": opened, "text_s": text_s, "step_s": step_s, "decode_s": decode_s, "picture_s": total}


if __name__ == "__main__":
    main()
