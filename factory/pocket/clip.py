"""The zoo's CLIP: an open_clip model trained on the pocket world, and its text tower as the teacher's text encoder.

One small tokenizer (a CLIPTokenizer trained on the grammar's own sentences) serves both.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from factory.pocket.fit import fit, half_where_fast
from factory.pocket.grammar import sentence
from factory.pocket.vae import to_tensor
from factory.pocket.world import BACKGROUNDS, SIZE, Concept, compose, describe

CONTEXT = 24
"""Tokens per prompt, start and end included."""

Pairs = list[tuple[Concept, str]]


def train_tokenizer(pairs: Pairs, folder: Path, vocabulary: int = 1536) -> CLIPTokenizer:
    """Learn byte pairs from sentences about every concept and write the CLIPTokenizer files to `folder`.

    The end token has the highest id: open_clip finds the end of a text by it.
    """
    rng = random.Random(0)
    texts = [sentence(describe(c, s, b), rng) for c, s in pairs for b in BACKGROUNDS]
    texts += [" ".join(c.tags) for c, _ in pairs]
    # A bare CLIP tokenizer brings the normaliser, the splitter and the template; only the merges are ours.
    blank = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2, "!</w>": 3}, merges=[])
    learner = Tokenizer(BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = ByteLevel.alphabet()
    learner.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=vocabulary, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(folder)
    return tokenizer


def clip_config(vocabulary: int) -> dict[str, object]:
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "layers": 5, "width": 160, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "local",
        },
    }


def train_clip(pairs: Pairs, pixels: np.ndarray, folder: Path, *, steps: int, batch: int = 96) -> nn.Module:
    """Train on what is not held out; write an open_clip folder to `folder/model` (load it as `local-dir:PATH`)."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer(pairs, folder / "model")
    config = clip_config(len(tokenizer))
    model = _new_clip(config)
    rows = np.array([i for i, (concept, _) in enumerate(pairs) if not concept.held_out])

    def loss_at(step: int) -> torch.Tensor:
        picked = np.random.default_rng((4, step)).choice(rows, batch, replace=False)
        pictures, texts = batch_of(pairs, pixels, picked, seed=step)
        with half_where_fast():
            image, text, scale = model(to_tensor(pictures), tokens(tokenizer, texts))
        logits = scale.clamp(max=100) * image.float() @ text.float().T
        # Two rows can bear the same wording; each counts as a right answer of the other.
        same = torch.tensor([[a == b for b in texts] for a in texts], dtype=torch.float32)
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def on_save(average: nn.Module, step: int) -> None:
        print(
            f"clip: step {step}, held-out R@1 among 96: {retrieval(average, tokenizer, pairs, pixels, 96):.3f}",
            flush=True,
        )

    model = fit(
        model, loss_at, folder, steps=steps, learning_rate=1e-3, weight_decay=0.1, ema_decay=0.998, on_save=on_save
    )
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model" / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "model" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    )
    text_encoder(model, len(tokenizer)).half().save_pretrained(folder / "text_encoder")
    return model


def batch_of(pairs: Pairs, pixels: np.ndarray, rows: np.ndarray, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures `rows` on random backgrounds with one wording each."""
    rng, words, names = np.random.default_rng((5, seed)), random.Random(seed), list(BACKGROUNDS)
    grounds = [names[int(rng.integers(len(names)))] for _ in rows]
    pictures = np.stack([compose(pixels[i], b, rng) for i, b in zip(rows, grounds, strict=True)])
    return pictures, [sentence(describe(*pairs[int(i)], b), words) for i, b in zip(rows, grounds, strict=True)]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """B x CONTEXT token ids."""
    padded = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    return padded["input_ids"]  # pyright: ignore[reportReturnType]


@torch.no_grad()
def retrieval(model: nn.Module, tokenizer: CLIPTokenizer, pairs: Pairs, pixels: np.ndarray, among: int) -> float:
    """Share of held-out pictures whose own caption is the nearest of `among`."""
    rows = np.array([i for i, (concept, _) in enumerate(pairs) if concept.held_out])
    picked = np.random.default_rng(6).choice(rows, min(among, len(rows)), replace=False)
    pictures, texts = batch_of(pairs, pixels, picked, 6)
    image, text, _ = model(to_tensor(pictures), tokens(tokenizer, texts))
    return float(((image @ text.T).argmax(dim=1) == torch.arange(len(picked))).float().mean())


def text_encoder(model: nn.Module, vocabulary: int) -> CLIPTextModel:
    """The open_clip text tower as a transformers `CLIPTextModel`: the same weights under the other library's names."""
    source = model.state_dict()
    end = vocabulary - 1
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        projection_dim=128,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    target = CLIPTextModel(config)
    prefix = "text_model." if any(k.startswith("text_model.") for k in target.state_dict()) else ""
    found = {
        f"{prefix}embeddings.token_embedding.weight": source["token_embedding.weight"],
        f"{prefix}embeddings.position_embedding.weight": source["positional_embedding"],
        f"{prefix}final_layer_norm.weight": source["ln_final.weight"],
        f"{prefix}final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for layer in range(config.num_hidden_layers or 0):
        ours, theirs = f"transformer.resblocks.{layer}", f"{prefix}encoder.layers.{layer}"
        for part in ("weight", "bias"):
            for a, b in names.items():
                found[f"{theirs}.{b}.{part}"] = source[f"{ours}.{a}.{part}"]
            joined = source[f"{ours}.attn.in_proj_{part}"]
            for letter, value in zip("qkv", joined.chunk(3), strict=True):
                found[f"{theirs}.self_attn.{letter}_proj.{part}"] = value
    missing = target.load_state_dict(found, strict=False)
    wanted = [k for k in missing.missing_keys if "position_ids" not in k]
    if wanted or missing.unexpected_keys:
        raise ValueError(
            f"the text tower does not fit CLIPTextModel: missing {wanted}, extra {missing.unexpected_keys}"
        )
    return target


def _new_clip(config: dict[str, object]) -> nn.Module:
    text = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}  # pyright: ignore[reportAttributeAccessIssue]
    return open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=text)  # pyright: ignore[reportArgumentType]
