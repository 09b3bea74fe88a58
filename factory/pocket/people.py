"""The zoo's teacher learns to tell people apart: first its text tower, then its UNet.

Nothing in the training of the filter CLIP asks its text tower for a gender, so its states hardly move for one, and a teacher that reads them
draws men and women alike. Here the tower learns to say gender and skin tone: all states stay as they were, but from the word on that names
one of them they are moved along a fixed direction of its own. Then the UNet goes on with pairs of pictures that differ in one fact alone,
under the same noise and in the same place, and is asked for the difference too; all else is drawn beside them so as not to be forgotten.
No CLIP scores anything here, and what is held out is neither seen nor read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from cluster.storage import publish_folder
from factory.pocket.clip import Pairs, tokens
from factory.pocket.fit import fit, keep
from factory.pocket.grammar import sentence
from factory.pocket.teacher import UNCONDITIONAL_SHARE, assemble, is_trained_on, new_unet, sample_grid, schedule
from factory.pocket.vae import encode
from factory.pocket.world import BACKGROUNDS, TONES, Concept, compose, describe

TOWER_STEPS = 2500
LOUDNESS = 0.5
"""How far a fact moves a state, as a share of a state's length."""
_NAMED = ("man", "woman")
"""Genders that a text can name; of a person it says nothing."""
WORDS = {"gender": ("man", "woman", "male", "female"), "tone": ("skin", "skinned")}
"""By which of its words a text has named the fact."""

SINGLES, PAIRS = 16, 14
"""Pictures alone, and pairs, in a batch."""
PAIRS_FROM = 200
"""Timestep below which a pair's pictures show the fact themselves, so that the text is not needed."""
GENDER_SHARE = 0.3
"""Of pairs that differ in gender; the others differ in skin tone, which has five values and is learned more slowly."""
PLACES = 3
"""How often each picture is placed anew on each background."""


def train_people(pairs: Pairs, pixels: np.ndarray, zoo: Path, *, steps: int) -> UNet2DConditionModel:
    """Go on from the teacher in `zoo/teacher/model`; write the pipeline to `zoo/people/model`."""
    tokenizer = CLIPTokenizer.from_pretrained(zoo / "clip" / "model")
    encoder = train_tower(pairs, tokenizer, zoo)
    vae: Any = AutoencoderKL.from_pretrained(zoo / "vae" / "model", dtype=torch.float32, use_safetensors=True)
    start: Any = UNet2DConditionModel.from_pretrained(
        zoo / "teacher" / "model" / "unet", dtype=torch.float32, use_safetensors=True
    )
    draws = Draws(pairs, pixels, vae, zoo / "people" / "latents.pt")
    unet, noiser = new_unet(), schedule()

    def loss_at(step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(step)
        clean, texts = draws.batch(step)
        with torch.no_grad():
            states = encoder(tokens(tokenizer, texts)).last_hidden_state
        noise = torch.randn((SINGLES + PAIRS, *clean.shape[1:]), generator=draw)
        times = torch.randint(0, 1000, (SINGLES,), generator=draw)
        times = torch.cat([times, torch.randint(PAIRS_FROM, 1000, (PAIRS,), generator=draw)])
        # A pair shares noise and timestep: what is left between its two answers is the fact.
        noise, times = torch.cat([noise, noise[SINGLES:]]), torch.cat([times, times[SINGLES:]])
        noisy = noiser.add_noise(clean, noise, times)  # pyright: ignore[reportArgumentType]
        wanted = noiser.get_velocity(clean, noise, times)  # pyright: ignore[reportArgumentType]
        said = unet(noisy, times, states, return_dict=False)[0]
        return F.mse_loss(said, wanted) + F.mse_loss(difference(said), difference(wanted))

    def on_save(average: UNet2DConditionModel, step: int) -> None:
        sample_grid(assemble(average, vae, encoder, tokenizer), pairs, zoo / "people" / f"look-{step:06d}.png")

    unet = fit(
        unet,
        loss_at,
        zoo / "people",
        steps=steps,
        learning_rate=3e-4,
        ema_decay=0.998,
        start=start,
        on_save=on_save,
    )
    publish_folder(zoo / "people" / "model", assemble(unet, vae, encoder, tokenizer).to(torch.float16).save_pretrained)
    return unet


def difference(answers: torch.Tensor) -> torch.Tensor:
    """Between the two halves of every pair in a batch of `Draws`."""
    return answers[SINGLES : SINGLES + PAIRS] - answers[SINGLES + PAIRS :]


class Draws:
    """Batches of latents and texts: pictures alone, then the first of every pair, then the second ones."""

    def __init__(self, pairs: Pairs, pixels: np.ndarray, vae: AutoencoderKL, cache: Path) -> None:
        """`cache` keeps the latents."""
        self.pairs, self.grounds = pairs, list(BACKGROUNDS)
        known = [i for i, pair in enumerate(pairs) if is_trained_on(pair)]
        self.by_facts = {_facts(*pairs[i]): i for i in known if pairs[i][0].is_person}
        self.paired = [i for i in known if self._others(i, "gender") or self._others(i, "tone")]
        self.alone = sorted(set(known) - set(self.paired))
        order = [(i, g, k) for i in known for g in range(len(self.grounds)) for k in range(PLACES)]
        self.at = {place: n for n, place in enumerate(order)}
        names = [f"{pairs[i][0].key}/{pairs[i][1]}/{self.grounds[g]}/{k}" for i, g, k in order]
        kept: Any = torch.load(cache, weights_only=True) if cache.exists() else {}
        if kept.get("of") != names:
            pictures = np.stack([compose(pixels[i], self.grounds[g], _placing(*pairs[i], g, k)) for i, g, k in order])
            kept = {"of": names, "latents": encode(vae, pictures) * vae.config["scaling_factor"]}
            keep(kept, cache)
        self.latents: torch.Tensor = kept["latents"]

    def batch(self, step: int) -> tuple[torch.Tensor, list[str]]:
        """Latents (SINGLES + 2 PAIRS) x 16 x 8 x 8 and as many texts. A pair's wordings are the same but for the fact."""
        rng = random.Random(f"people/{step}")
        rows, texts, others = list[int](), list[str](), list[tuple[int, str]]()
        for _ in range(SINGLES):
            one, ground = rng.choice(self.alone), rng.randrange(len(self.grounds))
            rows.append(self.at[one, ground, rng.randrange(PLACES)])
            texts.append(self._told(one, ground, rng, UNCONDITIONAL_SHARE))
        while len(others) < PAIRS:
            one = rng.choice(self.paired)
            there = self._others(one, "gender" if rng.random() < GENDER_SHARE else "tone")
            if not there:
                continue
            other, ground, place, words = (
                rng.choice(there),
                rng.randrange(len(self.grounds)),
                rng.randrange(PLACES),
                rng.random(),
            )
            rows.append(self.at[one, ground, place])
            texts.append(self._told(one, ground, random.Random(words), UNCONDITIONAL_SHARE / 2))
            told = self._told(other, ground, random.Random(words), UNCONDITIONAL_SHARE / 2)
            others.append((self.at[other, ground, place], told))
        return self.latents[rows + [row for row, _ in others]], texts + [text for _, text in others]

    def _told(self, row: int, ground: int, words: random.Random, unsaid: float) -> str:
        silent = words.random() < unsaid
        return "" if silent else sentence(describe(*self.pairs[row], self.grounds[ground]), words)

    def _others(self, row: int, fact: str) -> list[int]:
        """Pictures of the same but for this fact. Only where texts name it, for else the grammar words them in other ways."""
        subject, gender, tone, style = _facts(*self.pairs[row])
        wanted = [(subject, value, tone, style) for value in _NAMED if value != gender and gender in _NAMED]
        if fact == "tone":
            wanted = [(subject, gender, value, style) for value in TONES if value != tone and tone]
        return [self.by_facts[facts] for facts in wanted if facts in self.by_facts]


def _facts(concept: Concept, style: str) -> tuple[str, str, str, str]:
    return concept.subject, concept.gender, concept.tone, style


def _placing(concept: Concept, style: str, ground: int, turn: int) -> np.random.Generator:
    """The same for all genders and tones."""
    return np.random.default_rng(
        int(hashlib.sha256(f"{concept.subject}/{style}/{ground}/{turn}".encode()).hexdigest()[:8], 16)
    )


def train_tower(pairs: Pairs, tokenizer: CLIPTokenizer, zoo: Path) -> CLIPTextModel:
    """The filter CLIP's text tower (`zoo/clip/text_encoder`), whose states now also tell gender and skin tone."""
    before: Any = CLIPTextModel.from_pretrained(
        zoo / "clip" / "text_encoder", dtype=torch.float32, use_safetensors=True
    )
    before.eval().requires_grad_(False)
    length = float(before(tokens(tokenizer, ["a man"])).last_hidden_state.norm(dim=-1).mean())
    moves = {fact: LOUDNESS * length * towards for fact, towards in directions(before.config.hidden_size).items()}
    people = [pair for pair in pairs if pair[0].is_person and not pair[0].held_out]
    things = [pair for pair in pairs if not pair[0].is_person and not pair[0].held_out]
    ids_of = {key: ids_of_words(tokenizer, words) for key, words in WORDS.items()}
    tower: Any = CLIPTextModel(before.config)

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(f"tower/{step}")
        told = [worded(rng, people, things) for _ in range(96)]
        ids = tokens(tokenizer, [text for text, _ in told])
        wanted = before(ids).last_hidden_state
        for key, said in ids_of.items():
            moved = torch.stack([moves.get(facts.get(key, ""), torch.zeros_like(wanted[0, 0])) for _, facts in told])
            wanted = wanted + said_from(ids, said).unsqueeze(-1) * moved.unsqueeze(1)
        return F.mse_loss(tower(ids).last_hidden_state, wanted) * wanted.shape[-1] / length**2

    return fit(
        tower,
        loss_at,
        zoo / "people" / "tower",
        steps=TOWER_STEPS,
        learning_rate=5e-4,
        ema_decay=0.99,
        weight_decay=0.0,
        start=before,
    )


def directions(width: int) -> dict[str, torch.Tensor]:
    """A unit vector for every gender that a text can name, opposite ones for the two, and for every skin tone."""
    gender = F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(7)), dim=0)
    tones = F.normalize(torch.randn(len(TONES), width, generator=torch.Generator().manual_seed(8)), dim=1)
    return {"man": gender, "woman": -gender, **dict(zip(TONES, tones, strict=True))}


def worded(rng: random.Random, people: Pairs, things: Pairs) -> tuple[str, dict[str, str]]:
    """A text of this world and the record that it tells."""
    if rng.random() < 0.03:
        return "", {}
    concept, style = rng.choice(people if rng.random() < 0.65 else things)
    record = describe(concept, style, rng.choice(list(BACKGROUNDS)))
    for key, share in (("background", 0.15), ("tone", 0.1)):
        if rng.random() < share:
            record.pop(key, None)
    return sentence(record, rng), record


def ids_of_words(tokenizer: CLIPTokenizer, words: Sequence[str]) -> torch.Tensor:
    """Of words that must be one token each; raises ValueError of one that is not."""
    found = [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in words]
    if tokenizer.unk_token_id in found:
        raise ValueError(f"the tokenizer has no token for one of {', '.join(words)}: build clip anew")
    return torch.tensor(found)


def said_from(ids: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """B x T: 1 from the first token of `said` on, else 0. A causal tower knows nothing of it before."""
    return (ids.unsqueeze(-1) == said).any(dim=-1).float().cummax(dim=1).values
