"""The converted text tower must say what open_clip's says: the teacher reads prompts through it."""

import torch

from factory.pocket.clip import CONTEXT, FILTER, _new_clip, clip_config, text_encoder, tokens, train_tokenizer
from factory.pocket.world import Concept

PAIRS = [(Concept("1f34e", "red apple", "food-fruit", ("fruit",)), "3d"), (Concept("1f680", "rocket", "sky"), "flat")]


def test_tokenizer_keeps_words_and_ends_with_the_highest_id(tmp_path) -> None:
    tokenizer = train_tokenizer(PAIRS, tmp_path, vocabulary=600)
    ids = tokens(tokenizer, ["a render of a red apple", ""])
    assert ids.shape == (2, CONTEXT)
    assert ids.max() == len(tokenizer) - 1
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a render of a red apple"


def test_converted_text_tower_equals_open_clip(tmp_path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PAIRS, tmp_path, vocabulary=600)
    model = _new_clip(clip_config(FILTER, len(tokenizer))).eval()
    ids = tokens(tokenizer, ["a rocket on blue", "a 3d render of a red apple"])
    encoder = text_encoder(model, len(tokenizer)).eval()
    with torch.no_grad():
        pooled = encoder(ids).pooler_output @ model.text_projection
        expected = model.encode_text(ids)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
