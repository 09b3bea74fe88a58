"""People in the embedded zoo: a text tower that says gender and skin tone, and pairs of pictures that differ in one fact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from factory.models import ZOO
from factory.pocket.clip import shipped_tower, tokens
from factory.pocket.people import PAIRS, SINGLES, WORDS, Draws, difference, said_from, train_tower
from factory.pocket.world import Concept

TONES = ("light", "dark")
PEOPLE = [Concept(f"{g}{t}", "cook", "profession", (), g, t) for g in ("man", "woman", "person") for t in TONES]
THINGS = [Concept("1f34e", "red apple", "food-fruit"), Concept("1f680", "rocket", "sky")]
WORLD = [(concept, "flat") for concept in [*PEOPLE, *THINGS]]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ZOO / "clip")


def test_a_fact_is_known_from_its_word_on(tokenizer: CLIPTokenizer) -> None:
    texts = [
        "a 3d icon of a woman working as a cook with medium-dark skin",
        "dark-skinned male cook",
        "a red light bulb",
        "",
    ]
    ids = tokens(tokenizer, texts)
    for key, wanted in {"gender": ("woman", "male"), "tone": ("skin", "skinned")}.items():
        said = said_from(tokenizer, ids, WORDS[key])
        first = tokenizer.convert_ids_to_tokens(ids[:2].gather(1, said[:2].argmax(dim=1, keepdim=True))[:, 0].tolist())
        assert first == [f"{word}</w>" for word in wanted]
        assert all(row.tolist() == sorted(row.tolist()) for row in said)
        assert not said[2:].any()


def test_a_pair_differs_in_one_fact_and_lies_in_the_same_place(tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(ZOO / "teacher" / "vae", dtype=torch.float32, use_safetensors=True)
    # All people look the same here, so that latents tell whether they were placed alike.
    rng = np.random.default_rng(0)
    one, apple, rocket = (rng.integers(0, 256, (64, 64, 4), dtype=np.uint8) for _ in range(3))
    draws = Draws(WORLD, np.stack([one] * len(PEOPLE) + [apple, rocket]), vae, tmp_path / "latents.pt")
    latents, texts = draws.batch(3)
    assert len(latents) == len(texts) == SINGLES + 2 * PAIRS
    assert not difference(latents).any()
    facts = {"man", "male", "woman", "female", *TONES}
    changed: set[frozenset[str]] = set()
    for first, second in zip(texts[SINGLES : SINGLES + PAIRS], texts[SINGLES + PAIRS :], strict=True):
        apart = set(first.replace("-", " ").split()) ^ set(second.replace("-", " ").split())
        assert apart <= facts | {"working", "as", "cook", "a"}, (first, second)
        changed.add(frozenset(apart & facts))
    assert frozenset(TONES) in changed and any(c & {"man", "male"} for c in changed)
    assert all("cook" not in text for text in texts[:SINGLES])
    assert torch.equal(Draws(WORLD, np.zeros((0,)), vae, tmp_path / "latents.pt").batch(3)[0], latents), "kept latents"


def test_the_tower_learns_gender(tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.pocket.people.TOWER_STEPS", 120)
    before = shipped_tower(ZOO / "clip")
    before.save_pretrained(tmp_path / "clip" / "text_encoder")
    tower = train_tower(WORLD, tokenizer, tmp_path)
    assert moves(tower, tokenizer, "gender") > 2 * moves(before.float(), tokenizer, "gender")


def test_the_shipped_teacher_hears_people_and_knows_things_as_the_filter_does(tokenizer: CLIPTokenizer) -> None:
    filter_tower = shipped_tower(ZOO / "clip").float()
    tower = CLIPTextModel.from_pretrained(ZOO / "teacher" / "text_encoder", dtype=torch.float32, use_safetensors=True)
    assert moves(filter_tower, tokenizer, "gender") < 0.25 and moves(tower, tokenizer, "gender") > 0.5
    assert moves(tower, tokenizer, "tone") > moves(filter_tower, tokenizer, "tone")
    ids = tokens(tokenizer, ["a red apple, 3d render", "a flat icon of a rocket on a blue background", ""])
    with torch.no_grad():
        ours, theirs = (model(ids).last_hidden_state for model in (tower, filter_tower))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.2


@torch.no_grad()
def moves(tower: CLIPTextModel, tokenizer: CLIPTokenizer, fact: str) -> float:
    """How far another value moves the states, as a share of their length."""
    said = "a flat icon of a {} cook with {} skin on a blue background"
    one, other = {
        "gender": [("male", "dark"), ("female", "dark")],
        "tone": [("male", "light"), ("male", "medium-light")],
    }[fact]
    first, second = tower(tokens(tokenizer, [said.format(*one), said.format(*other)])).last_hidden_state
    return float((first - second).norm() / first.norm())
