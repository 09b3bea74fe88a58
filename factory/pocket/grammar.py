"""How this world is talked about: attribute records turned into many wordings of one prompt.

The CLIPs, the teacher and the language model all learn from these sentences. It knows no models and no pixels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

_STYLE_NOUNS = {
    "3d": ("3d render", "glossy 3d picture", "3d icon", "shiny 3d model"),
    "flat": ("flat icon", "flat drawing", "simple flat picture", "minimal flat design"),
    "cartoon": ("cartoon", "cartoon drawing", "cartoon sticker", "comic style picture"),
}
_STYLE_TAGS = {
    "3d": ("3d render", "3d style", "glossy 3d"),
    "flat": ("flat icon", "flat style", "flat design"),
    "cartoon": ("cartoon", "cartoon style", "cartoon sticker"),
}
_PLACES = ("on a {} background", "in front of a {} wall", "with a {} background", "against {}", "on {}")


def sentence(record: Mapping[str, str], rng: random.Random) -> str:
    """One wording of `record` (keys: subject, style, background, and for people gender and tone).

    Which words appear varies; the facts never do. A missing key is left unsaid.
    """
    who = _subject(record, rng)
    style, background = record.get("style"), record.get("background")
    place = rng.choice(_PLACES).format(background) if background else ""
    shape = rng.random()
    if not style:
        return _join(_article(who), place)
    if shape < 0.5:
        return _join(f"{_article(rng.choice(_STYLE_NOUNS[style]))} of {_article(who)}", place)
    if shape < 0.75:
        return _join(_article(who), place) + f", {rng.choice(_STYLE_TAGS[style])}"
    if shape < 0.9:
        tag = rng.choice(_STYLE_TAGS[style])
        return f"{who}, {tag}" + (f", {background} background" if background else "")
    return _join(f"{rng.choice(_STYLE_TAGS[style])}, {_article(who)}", place)


def _subject(record: Mapping[str, str], rng: random.Random) -> str:
    subject, gender, tone = record["subject"], record.get("gender"), record.get("tone")
    if not gender:
        return subject
    female = {"man": ("male", "man"), "woman": ("female", "woman")}.get(gender)
    if female is None:
        who = subject
    else:
        who = rng.choice(
            (f"{female[0]} {subject}", f"{female[1]} {subject}", f"{female[1]} working as {_article(subject)}")
        )
    if tone:
        if rng.random() < 0.3 and not who.startswith(("man working", "woman working")):
            return f"{tone}-skinned {who}"
        return f"{who} with {tone} skin"
    return who


def _article(noun: str) -> str:
    if noun.startswith(
        ("glasses", "jeans", "scissors", "books", "skis", "grapes", "cherries", "socks", "gloves", "shorts")
    ):
        return noun
    return f"{'an' if noun[0] in 'aeio' or (noun.startswith('u') and not noun.startswith('uni')) else 'a'} {noun}"


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
