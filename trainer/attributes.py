"""Whether pictures show what was asked for, attribute by attribute, as the judge reads them.

A prompt is put beside the same prompt with one attribute's word exchanged for each of the others; a picture agrees if its own is the nearest.
Asks only where the word is in the prompt once, so that nothing else changes: of "a red apple on a red background" nobody can tell which red was
meant. Knows no models, only a function from texts to embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics import Interval, mean_interval

MOST_VALUES = 16
"""An attribute of more values, such as the subject, is left to R@1."""

Words = Mapping[str, Mapping[str, Sequence[str]]]
"""Attribute to value to the words that say so; a value without an entry is its own word."""


@dataclass(frozen=True)
class Asked:
    """What is asked about one attribute."""

    values: tuple[str, ...]
    rows: list[int]
    """Prompts that say their value of it."""
    wordings: list[list[str]]
    """For each of them the prompt with every one of `values`; its own value's is the prompt itself."""
    own: list[int]
    """For each of them the place of its own value among `values`."""


def ask(prompts: Sequence[str], records: Sequence[Mapping[str, str]], words: Words) -> dict[str, Asked]:
    """The questions that the prompts' attribute records allow, by attribute. One with a single value asks nothing."""
    values: dict[str, dict[str, None]] = {}
    for record in records:
        for key, value in record.items():
            values.setdefault(key, {})[value] = None
    found: dict[str, Asked] = {}
    for key, seen in values.items():
        # Values that only the words name count too: they are what a picture can be taken for.
        every = tuple(sorted({*seen, *words.get(key, {})}))
        if not 2 <= len(every) <= MOST_VALUES:
            continue
        said = {value: tuple(words.get(key, {}).get(value, (value,))) for value in every}
        asked = Asked(every, [], [], [])
        for row, (prompt, record) in enumerate(zip(prompts, records, strict=True)):
            wordings = _exchanged(prompt, record[key], said) if key in record else None
            if wordings:
                asked.rows.append(row)
                asked.wordings.append(wordings)
                asked.own.append(every.index(record[key]))
        if asked.rows:
            found[key] = asked
    return found


def agreement(
    asked: Mapping[str, Asked], pictures: np.ndarray, embed: Callable[[list[str]], np.ndarray]
) -> dict[str, tuple[Interval, int, float]]:
    """Attribute to (share of pictures N x D that agree, how many were asked, what chance would reach)."""
    found: dict[str, tuple[Interval, int, float]] = {}
    for key, question in asked.items():
        texts = embed([text for wordings in question.wordings for text in wordings])
        texts = texts.reshape(len(question.rows), len(question.values), -1)
        near = np.einsum("nd,nvd->nv", pictures[question.rows], texts)
        # Equal bests share the hit: a judge that cannot read the word (it stands past its context) agrees by chance.
        best = near >= near.max(axis=1, keepdims=True) - 1e-6
        hits = best[np.arange(len(best)), question.own] / best.sum(axis=1)
        found[key] = (mean_interval(hits), len(hits), 1 / len(question.values))
    return found


def _exchanged(prompt: str, own: str, said: Mapping[str, tuple[str, ...]]) -> list[str] | None:
    """The prompt with each value's word in place of its own value's; None if it does not say its value, or says the word twice.

    The other value's word is the one at the same place of its list (`male` becomes `female`, `man` becomes `woman`), else its first.
    """
    for place, word in enumerate(said[own]):
        # `light` is not in `medium-light`, but it is in `light-skinned`.
        pattern = re.compile(rf"(?<![\w-]){re.escape(word)}(?!\w)", re.IGNORECASE)
        if len(pattern.findall(prompt)) == 1:
            others = {value: them[place] if place < len(them) else them[0] for value, them in said.items()}
            return [
                prompt if value == own else pattern.sub(lambda _, w=other: w, prompt) for value, other in others.items()
            ]
    return None
