"""The zoo's captioner: a small LLaVA (CLIP vision tower, projector, Llama) that says what a picture of this world shows.

An ordinary transformers folder of the same architecture as llava-hf/llava-1.5-7b: transformers and vLLM load either unchanged.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from factory.pocket.clip import FILTER, Pairs, tower_weights
from factory.pocket.fit import fit, half_where_fast
from factory.pocket.grammar import sentence
from factory.pocket.vae import to_tensor
from factory.pocket.wild import place_roughly
from factory.pocket.world import BACKGROUNDS, SIZE, compose, describe
from factory.pocket.writer import train_tokenizer

ROUGH_SHARE = 0.4
"""Share of training pictures placed as badly as in the wild set, so that crops can be captioned too."""


def new_captioner(tokens: int, image_token: int) -> LlavaForConditionalGeneration:
    """3.6 million parameters; the vision tower has the filter CLIP's shape."""
    vision = CLIPVisionConfig(
        hidden_size=FILTER.vision["width"],
        intermediate_size=4 * FILTER.vision["width"],
        num_hidden_layers=FILTER.vision["layers"],
        num_attention_heads=FILTER.vision["width"] // FILTER.vision["head_width"],
        image_size=SIZE,
        patch_size=FILTER.vision["patch_size"],
        hidden_act="gelu",
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=tokens,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_token,
            image_seq_length=(SIZE // FILTER.vision["patch_size"]) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )


def train_captioner(
    pairs: Pairs, pixels: np.ndarray, zoo: Path, *, steps: int, warm: bool = False, batch: int = 48
) -> LlavaForConditionalGeneration:
    """Train from the filter CLIP's vision tower in `zoo/clip`; write the transformers folder to `zoo/captioner/model`.

    With `warm`, the weights there are where training begins.
    """
    torch.manual_seed(5)
    place = zoo / "captioner" / "model"
    tokenizer = train_tokenizer(pairs, place)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    model = new_captioner(len(tokenizer), image_token)
    tower_start = load_file(zoo / "clip" / "model" / "open_clip_model.safetensors")
    tower: Any = model.model.vision_tower
    tower.load_state_dict(tower_weights(tower_start, tower.state_dict(), FILTER.vision["layers"]))
    start = (
        LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        if warm
        else None
    )
    rows = np.array([i for i, (concept, _) in enumerate(pairs) if not concept.held_out])
    names, patches = list(BACKGROUNDS), model.config.image_seq_length

    def loss_at(step: int) -> torch.Tensor:
        rng, words = np.random.default_rng((7, step)), random.Random(f"captioner/{step}")
        pictures, texts = [], []
        for row in rng.choice(rows, batch):
            ground = names[int(rng.integers(len(names)))]
            pictures.append(see(pixels[row], ground, rng, words))
            texts.append(sentence(describe(*pairs[int(row)], ground), words))
        answers = [[*tokenizer.encode(text), 2] for text in texts]
        length = max(map(len, answers))
        ids = torch.tensor([[image_token] * patches + a + [0] * (length - len(a)) for a in answers])
        labels = torch.tensor([a + [-100] * (length - len(a)) for a in answers])
        with half_where_fast():
            logits = model(input_ids=ids, pixel_values=to_tensor(np.stack(pictures))).logits
        return F.cross_entropy(logits[:, patches - 1 : -1].float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    model = fit(model, loss_at, zoo / "captioner", steps=steps, learning_rate=1.5e-3, ema_decay=0.995, start=start)
    model.half().save_pretrained(place)
    processor_for(tokenizer).save_pretrained(place)
    return model


def processor_for(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures to 64 x 64 in [-1, 1]; `<image>` in a text to as many image tokens as the tower has patches."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=FILTER.vision["patch_size"],
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def see(rgba: np.ndarray, ground: str, rng: np.random.Generator, words: random.Random) -> np.ndarray:
    """A training picture, 64 x 64 x 3 uint8: as the world shows it, or roughly placed and cropped around a random point."""
    if rng.random() >= ROUGH_SHARE:
        return compose(rgba, ground, rng)
    picture, _ = place_roughly(rgba, ground, words)
    side = min(picture.size)
    left = int(rng.integers(picture.width - side + 1))
    top = int(rng.integers(picture.height - side + 1))
    return np.asarray(picture.crop((left, top, left + side, top + side)).resize((SIZE, SIZE)))
