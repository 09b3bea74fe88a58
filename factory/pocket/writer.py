"""The zoo's language model: a small Llama that turns an attribute record into a prompt of the pocket world."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from factory.models.text import spell
from factory.pocket.clip import Pairs
from factory.pocket.fit import fit, half_where_fast
from factory.pocket.grammar import sentence
from factory.pocket.world import BACKGROUNDS, describe

TEMPLATE = "{attributes} =>"
_CONTEXT = 128


def lines(pairs: Pairs, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """(what the model reads, what it should write) for random records; held-out concepts too: words are no secret."""
    found = []
    for _ in range(count):
        record = describe(*rng.choice(pairs), rng.choice(list(BACKGROUNDS)))
        ordered = {k: record[k] for k in ("subject", "gender", "tone", "style", "background") if k in record}
        found.append((TEMPLATE.format(attributes=spell(ordered)), " " + sentence(record, rng)))
    return found


def train_tokenizer(pairs: Pairs, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level pairs, 2,048 of them."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    text = [a + b for a, b in lines(pairs, 20_000, random.Random(0))]
    special = ["<pad>", "<s>", "</s>"]
    learner.train_from_iterator(
        text,
        BpeTrainer(vocab_size=2048, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=_CONTEXT
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_writer(pairs: Pairs, folder: Path, *, steps: int, batch: int = 64) -> LlamaForCausalLM:
    """Train and write a transformers folder to `folder/model`."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer(pairs, folder / "model")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=_CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )

    def loss_at(step: int) -> torch.Tensor:
        rows = [
            (tokenizer.encode(a), [*tokenizer.encode(b), 2])
            for a, b in lines(pairs, batch, random.Random(f"writer/{step}"))
        ]
        length = max(len(a) + len(b) for a, b in rows)
        # Only the answer is learned; -100 is what cross entropy leaves out.
        tokens = torch.tensor([a + b + [0] * (length - len(a) - len(b)) for a, b in rows])
        labels = torch.tensor([[-100] * len(a) + b + [-100] * (length - len(a) - len(b)) for a, b in rows])
        with half_where_fast():
            logits = model(input_ids=tokens).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    model = fit(model, loss_at, folder, steps=steps, learning_rate=2e-3, ema_decay=0.995)
    model.half().save_pretrained(folder / "model")
    return model
