"""From what a language model answered to the prompt in it: mended where the fault is a common one, else refused with the reason."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, Literal

Answer = Literal["text", "json"]

_FENCE = re.compile(r"^\s*```[\w-]*[ \t]*\n?(.*?)\n?```", re.DOTALL)
_LABEL = re.compile(
    r"^\s*(?:[-*]|\d+[.)])?\s*(?:\*\*)?(?:prompt|caption|answer)(?:\*\*)?\s*:(?:\*\*)?\s*", re.IGNORECASE
)
_INTRODUCTION = re.compile(r"^\s*(?:sure|certainly|of course|here(?:'s| is| are))\b.*:\s*$", re.IGNORECASE)
_QUOTES = (('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("\u2018", "\u2019"), ("`", "`"))

_MOST_STARTS = 64
"""Braces and brackets in an answer at which its JSON may begin: a server that sends nothing but brackets must not cost hours."""


class NoAnswer(str):
    """An empty prompt that knows why it is empty."""

    why: str

    def __new__(cls, why: str) -> NoAnswer:
        made = super().__new__(cls, "")
        made.why = why
        return made


def read_answer(text: str, kind: Answer = "text") -> str:
    """The prompt in an answer, or NoAnswer. Code fences, introductions, labels and quotes around it are taken off."""
    fenced = _FENCE.search(text)
    text = fenced.group(1) if fenced else text
    found = _from_json(text) if kind == "json" else _from_text(text)
    return found if isinstance(found, NoAnswer) else writable(found)


def writable(text: str) -> str:
    """The text as UTF-8 can hold it: half a surrogate pair, which JSON may spell, becomes a question mark. No file of ours takes one."""
    return text.encode("utf-8", "replace").decode()


def _from_text(text: str) -> str:
    """The first line that says something."""
    for line in text.splitlines():
        if line.strip() and not _INTRODUCTION.match(line):
            return _unquoted(_LABEL.sub("", line).strip())
    return NoAnswer("the answer is empty")


def _unquoted(line: str) -> str:
    for first, last in _QUOTES:
        if len(line) > 1 and line.startswith(first) and line.endswith(last):
            return line[1:-1].strip()
    return line.strip('"')


def _from_json(text: str) -> str:
    """Of the first JSON object in the text, or in the array that stands there, `prompt`."""
    found = _first_value(text)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        return NoAnswer("the answer is no JSON object")
    prompt = found.get("prompt")
    if not isinstance(prompt, str):
        return NoAnswer("the answer's JSON has no text under `prompt`")
    return " ".join(prompt.split()) or NoAnswer("the answer's `prompt` is empty")


def _first_value(text: str) -> Any:
    decoder = json.JSONDecoder(strict=False)  # line breaks inside a text are a common fault
    places = (i for i, letter in enumerate(text) if letter in "{[")
    for place in itertools.islice(places, _MOST_STARTS):
        try:
            return decoder.raw_decode(text, place)[0]
        except (ValueError, RecursionError):
            continue
    return None
