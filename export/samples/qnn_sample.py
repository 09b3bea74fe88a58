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
ask = argparse.ArgumentParser()
ask.add_argument("prompt")
for name, default in (("--seed", 0), ("--build", next(iter(FACTS["builds"]))), ("--out", "out.png")):
    ask.add_argument(name, default=default, type=type(default))
ASKED = ask.parse_args()
ort.register_execution_provider_library("QNNExecutionProvider", qnn.get_library_path())
CHIPS = [one for one in ort.get_ep_devices() if one.ep_name == "QNNExecutionProvider" and "NPU" in str(one.device.type)]


def model(graph):
    path, options = HERE / FACTS["builds"][ASKED.build]["graphs"][graph], ort.SessionOptions()
    if (origin := path.with_suffix(".source.onnx")).exists():
        path = path if CHIPS else origin
        for chip in CHIPS[:1]:
            options.add_provider_for_devices([chip], {"backend_path": qnn.get_qnn_htp_path()})
    return ort.InferenceSession(str(path), options)


def noise(draw, shape):
    """bundle.json's generator: Philox4x32-10, then Box-Muller."""
    a, b, c, d = np.zeros((4, np.prod(shape)), np.uint64)
    a, c, low = a + np.uint64(draw), np.arange(a.size, dtype=np.uint64), 0xFFFFFFFF
    for i in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        keys = ASKED.seed + i * 0x9E3779B9 & low, (ASKED.seed >> 32) + i * 0xBB67AE85 & low
        a, b, c, d = (q >> 32) ^ b ^ keys[0], q & low, (p >> 32) ^ d ^ keys[1], p & low
    u, v = (a + 0.5) / 2.0**32, (b + 0.5) / 2.0**32
    return (np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v)).astype(np.float32).reshape(shape)


words, length = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer/tokenizer.json")), FACTS["tokenizer"]["length"]
words.enable_truncation(length)
words.enable_padding(length=length, pad_id=FACTS["tokenizer"]["pad"])
x = noise(0, FACTS["latent_shape"])
unet, ids = model("unet"), np.array([words.encode(ASKED.prompt).ids] * len(x))
text = model("text_encoder").run(None, {"input_ids": ids})[0]
for i, row in enumerate(FACTS["scheduler"]["steps"], 1):
    y = unet.run(None, {"latent": x, "timestep": np.array([row["t"]], np.float32), "text": text})[0]
    kind, a, s = FACTS["scheduler"]["prediction_type"], row["alpha"], row["sigma"]
    x = row["c_skip"] * x + row["c_out"] * ((x - s * y) / a if kind == "epsilon" else a * x - s * y)
    if "next_alpha" in row:
        x = row["next_alpha"] * x + row["next_sigma"] * noise(i, x.shape)
rgb = np.concatenate(np.asarray(model("vae_decoder").run(None, {"latent": x})[0]), 1).transpose(1, 2, 0) * 255
Image.fromarray(rgb.round().astype(np.uint8)).save(ASKED.out)
