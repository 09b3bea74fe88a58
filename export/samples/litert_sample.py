"""Draws a picture with this bundle. Needs only: pip install numpy ai-edge-litert onnxruntime tokenizers pillow
Then: python sample.py "a red apple" --seed 0 --out apple.png [--build w8a16]"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "bundle.json").read_text())
ask = argparse.ArgumentParser()
ask.add_argument("prompt")
for name, default in (("--seed", 0), ("--build", next(iter(FACTS["builds"]))), ("--out", "out.png")):
    ask.add_argument(name, default=default, type=type(default))
ASKED = ask.parse_args()
FILES = {graph: HERE / name for graph, name in FACTS["builds"][ASKED.build]["graphs"].items()}


def run(path, **inputs):
    model = onnxruntime.InferenceSession(str(path))
    return model.run(None, {one.name: inputs[one.name] for one in model.get_inputs()})[0]


def noise(draw, shape):
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
text = run(FILES["text_encoder"], input_ids=np.array([words.encode(ASKED.prompt).ids]))
unet, x = Interpreter(str(FILES["unet"])), noise(0, FACTS["latent_shape"])
unet.allocate_tensors()
fed, said = unet.get_input_details(), unet.get_output_details()[0]
for i, row in enumerate(FACTS["scheduler"]["steps"], 1):
    time = run(FILES["unet"].with_suffix(".host.onnx"), timestep=np.array([row["t"]], np.float32), text=text)
    parts = np.split(time[0], np.cumsum([one["shape"][-1] for one in fed[2:]])[:-1])
    for one, v in zip(fed, [x.transpose(0, 2, 3, 1), text, *parts], strict=True):
        codes = np.round(v.reshape(one["shape"]) / one["quantization"][0]).clip(-32767, 32767)
        unet.set_tensor(one["index"], codes.astype(np.int16))
    unet.invoke()
    y = (unet.get_tensor(said["index"]) * said["quantization"][0]).transpose(0, 3, 1, 2)
    kind, a, s = FACTS["scheduler"]["prediction_type"], row["alpha"], row["sigma"]
    x = row["c_skip"] * x + row["c_out"] * ((x - s * y) / a if kind == "epsilon" else a * x - s * y)
    x = row["next_alpha"] * x + row["next_sigma"] * noise(i, x.shape) if "next_alpha" in row else x
rgb = (run(FILES["vae_decoder"], latent=x.astype(np.float32))[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)
Image.fromarray(rgb).save(ASKED.out)
