"""People in the embedded zoo: a text tower that says gender, and pairs of pictures that differ in one fact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from factory.models import ZOO
from factory.pocket.clip import shipped_tower, tokens
from factory.pocket.people import PAIRS, SINGLES, Draws, difference, said_from, train_tower
from factory.pocket.world import Concept

TONES = ("light", "dark")
PEOPLE = [Concept(f"{g}{t}", "cook", "profession", (), g, t) for g in ("man", "woman", "person") for t in TONES]
THINGS = [Concept("1f34e", "red apple", "food-fruit"), Concept("1f680", "rocket", "sky")]
WORLD = [(concept, "flat") for concept in [*PEOPLE, *THINGS]]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ZOO / "clip")


def test_gender_is_known_from_its_word_on(tokenizer: CLIPTokenizer) -> None:
    ids = tokens(tokenizer, ["a 3d icon of a woman working as a cook", "male cook", "a cook", "a red apple", ""])
    said = said_from(tokenizer, ids)
    assert tokenizer.convert_ids_to_tokens(int(ids[0, int(said[0].argmax())])) == "woman</w>"
    assert said[0].tolist() == sorted(said[0].tolist())
    assert tokenizer.convert_ids_to_tokens(int(ids[1, int(said[1].argmax())])) == "male</w>"
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


def test_the_tower_learns_gender_and_forgets_nothing(
    tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.pocket.people.TOWER_STEPS", 120)
    before = shipped_tower(ZOO / "clip")
    before.save_pretrained(tmp_path / "clip" / "text_encoder")
    tower = train_tower(WORLD, tokenizer, tmp_path)
    assert gender_moves(tower, tokenizer) > 2 * gender_moves(before.float(), tokenizer)


def test_the_shipped_teacher_hears_gender_and_knows_things_as_the_filter_does(tokenizer: CLIPTokenizer) -> None:
    filter_tower = shipped_tower(ZOO / "clip").float()
    tower = CLIPTextModel.from_pretrained(ZOO / "teacher" / "text_encoder", dtype=torch.float32, use_safetensors=True)
    assert gender_moves(filter_tower, tokenizer) < 0.25 and gender_moves(tower, tokenizer) > 0.5
    ids = tokens(tokenizer, ["a red apple, 3d render", "a flat icon of a rocket on a blue background", ""])
    with torch.no_grad():
        ours, theirs = (model(ids).last_hidden_state for model in (tower, filter_tower))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.2


@torch.no_grad()
def gender_moves(tower: CLIPTextModel, tokenizer: CLIPTokenizer) -> float:
    """How far another gender moves the states, as a share of their length."""
    said = [f"a flat icon of a {who} cook with dark skin on a blue background" for who in ("male", "female")]
    one, other = tower(tokens(tokenizer, said)).last_hidden_state
    return float((one - other).norm() / one.norm())
