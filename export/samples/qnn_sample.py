"""Draws a picture with this bundle. Needs only: pip install numpy onnxruntime-qnn tokenizers pillow. Without the NPU the CPU plays it. Then:
python sample.py "a red apple" --seed 0 --out apple.png [--build fp32]"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn  # pyright: ignore[reportMissingImports]
import tokenizers
from PIL import Image

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "bundle.json").read_text())
ask, LOOP = argparse.ArgumentParser(), FACTS["scheduler"]
ask.add_argument("prompt")
for name, default in (("--seed", 0), ("--build", next(iter(FACTS["builds"]))), ("--out", "out.png")):
    ask.add_argument(name, default=default, type=type(default))
if G := LOOP.get("guidance"):
    ask.add_argument("--guidance", type=float, default=G["scale"])
ASKED, MORE, MODELS = ask.parse_args(), {}, {}
if G:  # as an input: sines and cosines of it
    if not G["low"] <= ASKED.guidance <= G["high"]:
        ask.error(f"--guidance goes from {G['low']:g} to {G['high']:g}")
    angles = (ASKED.guidance - 1) * 1000 * 10000.0 ** -np.linspace(0, 1, G["width"] // 2)
    MORE["guidance"] = np.concatenate([np.sin(angles), np.cos(angles)])[None].astype(np.float32)
ort.register_execution_provider_library("QNNExecutionProvider", qnn.get_library_path())
CHIPS = [one for one in ort.get_ep_devices() if one.ep_name == "QNNExecutionProvider" and "NPU" in str(one.device.type)]
for graph, file in FACTS["builds"][ASKED.build]["graphs"].items():
    path, options = HERE / file, ort.SessionOptions()
    if (origin := path.with_suffix(".source.onnx")).exists():
        path = path if CHIPS else origin
        for chip in CHIPS[:1]:
            options.add_provider_for_devices([chip], {"backend_path": qnn.get_qnn_htp_path()})
    MODELS[graph] = ort.InferenceSession(str(path), options)
words, length = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer/tokenizer.json")), FACTS["tokenizer"]["length"]
words.enable_truncation(length)
words.enable_padding(length=length, pad_id=FACTS["tokenizer"]["pad"])
# bundle.json's generator: Philox4x32-10, then Box-Muller, for all steps at once
a, c, b, d = np.indices((len(LOOP["steps"]), np.prod(FACTS["latent_shape"]), 1, 1), np.uint64)  # b, d: 0
for i in range(10):
    p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
    keys = (ASKED.seed + i * 0x9E3779B9) % 2**32, ((ASKED.seed >> 32) + i * 0xBB67AE85) % 2**32
    a, b, c, d = (q >> 32) ^ b ^ keys[0], q % 2**32, (p >> 32) ^ d ^ keys[1], p % 2**32
u, v = (a + 0.5) / 2.0**32, (b + 0.5) / 2.0**32
noise = (np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v)).astype(np.float32).reshape(-1, *FACTS["latent_shape"])
x = noise[0]
text = MODELS["text_encoder"].run(None, {"input_ids": np.array([words.encode(ASKED.prompt).ids] * len(x))})[0]
for i, row in enumerate(LOOP["steps"], 1):
    y = MODELS["unet"].run(None, {"latent": x, "timestep": np.array([row["t"]], np.float32), "text": text, **MORE})[0]
    kind, a, s = LOOP["prediction_type"], row["alpha"], row["sigma"]
    x = row["c_skip"] * x + row["c_out"] * ((x - s * y) / a if kind == "epsilon" else a * x - s * y)
    x = row["next_alpha"] * x + row["next_sigma"] * noise[i] if "next_alpha" in row else x
rgb = np.concatenate(np.asarray(MODELS["vae_decoder"].run(None, {"latent": x})[0]), 1).transpose(1, 2, 0) * 255
Image.fromarray(rgb.round().astype(np.uint8)).save(ASKED.out)
