"""The zoo's two CLIPs: the filter, whose text tower is where the teacher's text encoder begins (people.py), and the judge, which only evaluates.

They share nothing but the world: other seed, other vision tower (ViT, ResNet), other tokenizer. The judge alone also learns from what is
held out, and from captions with one fact changed, so that it reads attributes and not only subjects.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
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
from factory.pocket.world import BACKGROUNDS, GENDERS, SIZE, STYLES, TONES, Concept, compose, describe

CONTEXT = 24
"""Tokens per prompt, start and end included."""

Pairs = list[tuple[Concept, str]]


@dataclass(frozen=True)
class Kind:
    """What tells one CLIP from the other."""

    seed: int
    vocabulary: int
    vision: dict[str, Any]
    text_width: int
    sees_held_out: bool
    wrong_facts: bool
    """Each picture is also shown a caption with one fact changed, as a wrong answer."""


FILTER = Kind(1, 1536, {"layers": 5, "width": 160, "head_width": 32, "patch_size": 8}, 128, False, False)
JUDGE = Kind(21, 1100, {"layers": [1, 2, 2, 1], "width": 20, "head_width": 40, "patch_size": None}, 96, True, True)


def train_tokenizer(pairs: Pairs, folder: Path, vocabulary: int = FILTER.vocabulary) -> CLIPTokenizer:
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


def clip_config(kind: Kind, tokens: int) -> dict[str, Any]:
    """open_clip's model config; `tokens` is the tokenizer's true size."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, **kind.vision},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": tokens,
            "width": kind.text_width,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "local",
        },
    }


def train_clip(pairs: Pairs, pixels: np.ndarray, folder: Path, kind: Kind, *, steps: int, batch: int = 96) -> nn.Module:
    """Train and write an open_clip folder to `folder/model` (load it as `local-dir:PATH`); the filter's text tower to `folder/text_encoder`."""
    torch.manual_seed(kind.seed)
    tokenizer = train_tokenizer(pairs, folder / "model", kind.vocabulary)
    config = clip_config(kind, len(tokenizer))
    model = _new_clip(config)
    rows = np.array([i for i, (concept, _) in enumerate(pairs) if kind.sees_held_out or not concept.held_out])

    def loss_at(step: int) -> torch.Tensor:
        picked = np.random.default_rng((4 * kind.seed, step)).choice(rows, batch, replace=False)
        pictures, records, texts = batch_of(pairs, pixels, picked, seed=step)
        words = random.Random(f"wrong/{step}")
        wrong = [sentence(change_one_fact(r, words), words) for r in records] if kind.wrong_facts else []
        with half_where_fast():
            image, text, scale = model(to_tensor(pictures), tokens(tokenizer, texts + wrong))
        logits = scale.clamp(max=100) * image.float() @ text.float().T
        # Two rows can bear the same wording; each counts as a right answer of the other.
        same = torch.tensor([[a == b for b in texts + wrong] for a in texts], dtype=torch.float32)
        own = same[:, :batch]
        to_text = F.cross_entropy(logits, same / same.sum(dim=1, keepdim=True))
        return (to_text + F.cross_entropy(logits[:, :batch].T, own / own.sum(dim=1, keepdim=True))) / 2

    def on_save(average: nn.Module, step: int) -> None:
        found = retrieval(average, tokenizer, pairs, pixels, 96)
        print(f"{folder.name}: step {step}, held-out R@1 among 96: {found:.3f}", flush=True)

    model = fit(
        model, loss_at, folder, steps=steps, learning_rate=1e-3, weight_decay=0.1, ema_decay=0.998, on_save=on_save
    )
    weights = {
        k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in model.state_dict().items()
    }
    save_file(weights, folder / "model" / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "model" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    )
    if kind is FILTER:
        text_encoder(model, len(tokenizer)).half().save_pretrained(folder / "text_encoder")
    return model


CHOICES = {"gender": GENDERS, "tone": TONES, "style": STYLES, "background": tuple(BACKGROUNDS)}


def change_one_fact(record: dict[str, str], rng: random.Random) -> dict[str, str]:
    """The same record with another gender, tone, style or background; of people mostly gender and tone, which are hardest to see."""
    keys = [k for k in CHOICES if k in record]
    key = rng.choice(keys[:2] if "gender" in record and rng.random() < 0.8 else keys)
    return {**record, key: rng.choice([value for value in CHOICES[key] if value != record[key]])}


def batch_of(
    pairs: Pairs, pixels: np.ndarray, rows: np.ndarray, seed: int
) -> tuple[np.ndarray, list[dict[str, str]], list[str]]:
    """Pictures `rows` on random backgrounds, their records and one wording each."""
    rng, words, names = np.random.default_rng((5, seed)), random.Random(seed), list(BACKGROUNDS)
    grounds = [names[int(rng.integers(len(names)))] for _ in rows]
    pictures = np.stack([compose(pixels[i], b, rng) for i, b in zip(rows, grounds, strict=True)])
    records = [describe(*pairs[int(i)], b) for i, b in zip(rows, grounds, strict=True)]
    return pictures, records, [sentence(record, words) for record in records]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """B x CONTEXT token ids."""
    padded = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    return padded["input_ids"]  # pyright: ignore[reportReturnType]


@torch.no_grad()
def retrieval(model: nn.Module, tokenizer: CLIPTokenizer, pairs: Pairs, pixels: np.ndarray, among: int) -> float:
    """Share of held-out pictures whose own caption is the nearest of `among`."""
    rows = np.array([i for i, (concept, _) in enumerate(pairs) if concept.held_out])
    picked = np.random.default_rng(6).choice(rows, min(among, len(rows)), replace=False)
    pictures, _, texts = batch_of(pairs, pixels, picked, 6)
    image, text, _ = model(to_tensor(pictures), tokens(tokenizer, texts))
    return float(((image @ text.T).argmax(dim=1) == torch.arange(len(picked))).float().mean())


def filter_tower(folder: Path) -> CLIPTextModel:
    """The text tower of the filter's finished open_clip folder, as training it writes it to `text_encoder`."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    model = _new_clip(config)
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return text_encoder(model, config["text_cfg"]["vocab_size"]).half()


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
        **_layers(source, "transformer", f"{prefix}encoder", config.num_hidden_layers or 0),
    }
    missing = target.load_state_dict(found, strict=False)
    wanted = [k for k in missing.missing_keys if "position_ids" not in k]
    if wanted or missing.unexpected_keys:
        raise ValueError(
            f"the text tower does not fit CLIPTextModel: missing {wanted}, extra {missing.unexpected_keys}"
        )
    return target


def tower_weights(
    source: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], layers: int
) -> dict[str, torch.Tensor]:
    """open_clip's ViT tower under the names of transformers' CLIPVisionModel, whose state dict is `wanted`."""
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in wanted) else ""
    found = {
        f"{prefix}embeddings.class_embedding": source["visual.class_embedding"],
        f"{prefix}embeddings.patch_embedding.weight": source["visual.conv1.weight"],
        f"{prefix}embeddings.position_embedding.weight": source["visual.positional_embedding"],
        **_layers(source, "visual.transformer", f"{prefix}encoder", layers),
    }
    for part in ("weight", "bias"):
        found[f"{prefix}pre_layrnorm.{part}"] = source[f"visual.ln_pre.{part}"]
        found[f"{prefix}post_layernorm.{part}"] = source[f"visual.ln_post.{part}"]
    return {name: weight.float() for name, weight in found.items()}


def _layers(source: dict[str, torch.Tensor], ours: str, theirs: str, layers: int) -> dict[str, torch.Tensor]:
    """The transformer layers of an open_clip tower under transformers' names."""
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    found: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        a, b = f"{ours}.resblocks.{layer}", f"{theirs}.layers.{layer}"
        for part in ("weight", "bias"):
            found |= {f"{b}.{new}.{part}": source[f"{a}.{old}.{part}"] for old, new in names.items()}
            joined = source[f"{a}.attn.in_proj_{part}"]
            for letter, value in zip("qkv", joined.chunk(3), strict=True):
                found[f"{b}.self_attn.{letter}_proj.{part}"] = value
    return found


def _new_clip(config: dict[str, Any]) -> nn.Module:
    text: Any = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=text)
