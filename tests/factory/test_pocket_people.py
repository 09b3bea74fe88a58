"""People in the embedded zoo: a text tower that says gender and skin tone, and pairs of pictures that differ in one fact."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from factory.models import ZOO
from factory.pocket.build import digests_of, unpack
from factory.pocket.clip import filter_tower, tokens
from factory.pocket.people import (
    PAIRS,
    SINGLES,
    WORDS,
    Draws,
    difference,
    ids_of_words,
    said_from,
    train_people,
    train_tower,
    worded,
)
from factory.pocket.world import BACKGROUNDS, Concept

TONES = ("light", "medium-dark")
PEOPLE = [Concept(f"{g}-{t}", "cook", "profession", (), g, t) for g in ("man", "woman", "person") for t in (*TONES, "")]
THINGS = [Concept("1f34e", "red apple", "food-fruit"), Concept("1f680", "rocket", "sky")]
WORLD = [(concept, "flat") for concept in [*PEOPLE, *THINGS]]
HELD_OUT = [(Concept("1f400", "rat", "animal-mammal"), "flat")]


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
        said = said_from(ids, ids_of_words(tokenizer, WORDS[key]))
        first = tokenizer.convert_ids_to_tokens(ids[:2].gather(1, said[:2].argmax(dim=1, keepdim=True))[:, 0].tolist())
        assert first == [f"{word}</w>" for word in wanted]
        assert all(row.tolist() == sorted(row.tolist()) for row in said)
        assert not said[2:].any()


def test_a_word_that_is_no_token_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ValueError, match="no token for one of man, zeppelins"):
        ids_of_words(tokenizer, ("man", "zeppelins"))


def test_pictures_are_what_their_texts_say_and_a_pair_differs_in_one_fact(tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(ZOO / "teacher" / "vae", dtype=torch.float32, use_safetensors=True)
    world = [*WORLD, *HELD_OUT]
    pixels = np.random.default_rng(0).integers(0, 256, (len(world), 64, 64, 4), dtype=np.uint8)
    draws = Draws(world, pixels, vae, tmp_path / "latents.pt")
    places, grounds, changed = {n: place for place, n in draws.at.items()}, list(BACKGROUNDS), set[str]()
    assert {world[i][0].subject for i, *_ in places.values()} == {"cook", "red apple", "rocket"}, "held out"
    for step in range(12):
        latents, texts = draws.batch(step)
        assert len(latents) == len(texts) == SINGLES + 2 * PAIRS
        found = [places[int((draws.latents - one).abs().amax(dim=(1, 2, 3)).argmin())] for one in latents]
        for (row, ground, _), text in zip(found, texts, strict=True):
            concept = world[row][0]
            words = set(text.replace("medium-dark", "mediumdark").replace("-", " ").split())
            assert not text or {concept.subject.split()[-1], grounds[ground]} <= {word.strip(",") for word in words}
            said = {"man": {"man", "male"}, "woman": {"woman", "female"}}.get(concept.gender, set())
            assert not text or bool(words & {"man", "male", "woman", "female"}) == bool(words & said) == bool(said)
            assert not text or not concept.tone or concept.tone.replace("-", "") in words
        for k in range(SINGLES, SINGLES + PAIRS):
            one, other = found[k], found[k + PAIRS]
            assert one[1:] == other[1:], "another place or background"
            before, after = (texts[n].split() for n in (k, k + PAIRS))
            apart = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
            facts = [world[row[0]][0] for row in (one, other)]
            keys = [key for key in ("gender", "tone") if getattr(facts[0], key) != getattr(facts[1], key)]
            assert len(keys) == 1 and len(apart) <= 1, (texts[k], texts[k + PAIRS])
            changed.update(keys)
    assert changed == {"gender", "tone"}
    again = Draws(world, np.zeros_like(pixels), vae, tmp_path / "latents.pt")
    assert torch.equal(again.latents, draws.latents), "what is kept is not drawn again"
    other_world = Draws(WORLD[1:], pixels[1 : len(WORLD)], vae, tmp_path / "latents.pt")
    assert len(other_world.latents) < len(draws.latents), "what is kept of another world counts for nothing"


def test_only_the_pairs_count_as_different() -> None:
    answers = torch.arange(SINGLES + 2 * PAIRS, dtype=torch.float32)
    assert difference(answers).tolist() == [-PAIRS] * PAIRS


def test_the_tower_reads_nothing_of_what_is_held_out(
    tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = set[str]()

    def noted(rng, people, things):
        read.update(concept.subject for concept, _ in [*people, *things])
        return worded(rng, people, things)

    monkeypatch.setattr("factory.pocket.people.TOWER_STEPS", 1)
    monkeypatch.setattr("factory.pocket.people.worded", noted)
    filter_tower(ZOO / "clip").save_pretrained(tmp_path / "clip" / "text_encoder")
    train_tower([*WORLD, *HELD_OUT], tokenizer, tmp_path)
    assert read == {"cook", "red apple", "rocket"}


def test_the_tower_learns_gender(tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.pocket.people.TOWER_STEPS", 120)
    before = filter_tower(ZOO / "clip")
    before.save_pretrained(tmp_path / "clip" / "text_encoder")
    tower = train_tower(WORLD, tokenizer, tmp_path)
    assert moves(tower, tokenizer, "gender") > 2 * moves(before.float(), tokenizer, "gender")


def test_the_shipped_teacher_hears_people_and_knows_things_as_the_filter_does(tokenizer: CLIPTokenizer) -> None:
    before = filter_tower(ZOO / "clip").float()
    tower = CLIPTextModel.from_pretrained(ZOO / "teacher" / "text_encoder", dtype=torch.float32, use_safetensors=True)
    assert moves(before, tokenizer, "gender") < 0.25 and moves(tower, tokenizer, "gender") > 0.5
    assert moves(tower, tokenizer, "tone") > moves(before, tokenizer, "tone")
    ids = tokens(tokenizer, ["a red apple, 3d render", "a flat icon of a rocket on a blue background", ""])
    with torch.no_grad():
        ours, theirs = (model(ids).last_hidden_state for model in (tower, before))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.2


def test_what_comes_of_it_lies_beside_the_teacher_and_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(ZOO, tmp_path)
    shutil.rmtree(tmp_path / "people")
    monkeypatch.setattr("factory.pocket.people.TOWER_STEPS", 1)
    monkeypatch.setattr("factory.pocket.people.sample_grid", lambda *_: None)
    pixels = np.random.default_rng(0).integers(0, 256, (len(WORLD), 64, 64, 4), dtype=np.uint8)
    teacher = digests_of(tmp_path / "teacher")
    train_people(WORLD, pixels, tmp_path, steps=1)
    made = digests_of(tmp_path / "people" / "model")
    assert digests_of(tmp_path / "teacher") == teacher, "where it begins was changed"
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert made[part] != teacher[f"model/{part}"]
    shutil.rmtree(tmp_path / "people" / "model")
    train_people(WORLD, pixels, tmp_path, steps=1)
    assert digests_of(tmp_path / "people" / "model") == made, "from its checkpoints"


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
