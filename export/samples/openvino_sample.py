"""Draws a picture with this bundle. Needs only: pip install numpy openvino tokenizers
Then: python sample.py "a red apple" --seed 0 --out apple.png [--build fp32]"""

import argparse
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import openvino as ov
import tokenizers

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "bundle.json").read_text())
ask, LOOP = argparse.ArgumentParser(), FACTS["scheduler"]
ask.add_argument("prompt")
ask.add_argument("--seed", type=int, default=0)
ask.add_argument("--build", default=next(iter(FACTS["builds"])), choices=list(FACTS["builds"]))
ask.add_argument("--out", default="out.png")
if G := LOOP.get("guidance"):
    ask.add_argument("--guidance", type=float, default=G["scale"])
ASKED, MORE, MODELS = ask.parse_args(), {}, {}
if G:  # as an input: sines and cosines of it
    if not G["low"] <= ASKED.guidance <= G["high"]:
        ask.error(f"--guidance goes from {G['low']:g} to {G['high']:g}")
    angles = (ASKED.guidance - 1) * 1000 * 10000.0 ** -np.linspace(0, 1, G["width"] // 2)
    MORE["guidance"] = np.concatenate([np.sin(angles), np.cos(angles)])[None].astype(np.float32)
for graph, file in FACTS["builds"][ASKED.build]["graphs"].items():
    chip = FACTS.get("device", "CPU")
    hint = "f16" if chip == "NPU" else "bf16" if "bf16." in file else "f32"
    MODELS[graph] = ov.Core().compile_model(str(HERE / file), chip, {"INFERENCE_PRECISION_HINT": hint})
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
text = MODELS["text_encoder"]({"input_ids": np.array([words.encode(ASKED.prompt).ids] * len(x))})[0]
for i, row in enumerate(LOOP["steps"], 1):
    y = MODELS["unet"]({"latent": x, "timestep": np.array([row["t"]], np.float32), "text": text, **MORE})[0]
    kind, a, s = LOOP["prediction_type"], row["alpha"], row["sigma"]
    x = row["c_skip"] * x + row["c_out"] * ((x - s * y) / a if kind == "epsilon" else a * x - s * y)
    x = row["next_alpha"] * x + row["next_sigma"] * noise[i] if "next_alpha" in row else x
rgb = (np.concatenate(MODELS["vae_decoder"]({"latent": x})[0], 1).transpose(1, 2, 0) * 255).round().astype(np.uint8)
body = zlib.compress(np.insert(rgb.reshape(len(rgb), -1), 0, 0, axis=1).tobytes())
parts = [(b"IHDR", struct.pack(">2I5B", rgb.shape[1], rgb.shape[0], 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
png = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
Path(ASKED.out).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))
