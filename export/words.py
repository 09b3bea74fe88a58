"""Prompts to token ids by the tokenizer in a bundle, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.errors import EdgeFusionError


def tokenize(bundle: Path, facts: dict[str, int], prompts: Sequence[str]) -> list[np.ndarray]:
    """Token ids 1 T (int64) of each prompt. `facts`: bundle.json's `tokenizer`, the length T and the id that fills up."""
    from tokenizers import Tokenizer

    path = bundle / "tokenizer" / "tokenizer.json"
    try:
        words = Tokenizer.from_file(str(path))
    except Exception as error:
        raise EdgeFusionError("is no tokenizer", where=str(path), remedy="Export again") from error
    words.enable_truncation(facts["length"])
    words.enable_padding(length=facts["length"], pad_id=facts["pad"])
    return [np.array([words.encode(prompt).ids], dtype=np.int64) for prompt in prompts]
