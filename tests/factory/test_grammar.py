import random

import pytest

from factory.pocket.grammar import sentence

WOMAN = {"subject": "astronaut", "gender": "woman", "tone": "dark", "style": "3d", "background": "blue"}


@pytest.mark.parametrize("seed", range(200))
def test_every_wording_states_every_fact(seed: int) -> None:
    text = sentence(WOMAN, random.Random(seed))
    assert "astronaut" in text and "dark" in text and "blue" in text and "3d" in text
    assert "woman" in text or "female" in text


def test_wordings_vary_but_a_seed_fixes_one() -> None:
    wordings = {sentence(WOMAN, random.Random(seed)) for seed in range(200)}
    assert len(wordings) > 40
    assert sentence(WOMAN, random.Random(7)) == sentence(WOMAN, random.Random(7))
