"""Prompts that a user brings, from text, JSON lines or Parquet files, and prompts that are too like one another.

Brought prompts are the same kind of plan as written ones: each row is a prompt with its attributes, checked, enumerated and drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RecipeError, StageError
from factory.models.answers import writable
from factory.recipe import PromptFilePlan

_WORD = re.compile(r"\w+")
_MAX_LINE = 1 << 20
"""Characters of a line; what is beyond them is skipped unkept."""
_ROUNDING = 1e-9
"""Of a product of a share and a number of words: a filter may let through more than the exact comparison does, never less."""
_WORTH_ORDERING = 20
"""Comparisons of two sets that take as long as it takes to put one in order."""


def read_prompts(recipe: PromptFilePlan) -> Iterator[tuple[str, str, dict[str, str], str]]:
    """(prompt, group, attributes, where it stands as JSON: file and line or row) of every row, in the order of the files. Raises RecipeError for a file that is no such list.

    A prompt is as it stands there, so that one which is no UTF-8 is known; group and attributes are mended.
    """
    count = 0
    for name in recipe.paths:
        file = prompt_file(name)
        for number, row in _rows(file, recipe):
            if recipe.limit is not None and count == recipe.limit:
                return
            count += 1
            prompt = row.get(recipe.prompt_column)
            text = " ".join(prompt.split()) if isinstance(prompt, str) else ""
            group = row.get(recipe.group_column) if recipe.group_column else None
            # Without its folder: the same files give the same plan wherever they lie.
            where = json.dumps({"at": number, "file": writable(file.name)}, ensure_ascii=False)
            found = {a: writable(str(row[a])) for a in recipe.attribute_columns if row.get(a) is not None}
            yield text, "prompts" if group is None else writable(str(group)), found, where


def prompt_file(name: str) -> Path:
    """Raises RecipeError if it is not there or of no known kind."""
    path = Path(name)
    if not path.is_file() or path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise RecipeError(
            f"{name} is no .txt, .jsonl or .parquet file" if path.exists() else f"there is no file {name}",
            where="factory.plan.paths",
            remedy="Give files with a prompt a line (.txt), a JSON object a line (.jsonl) or a prompt a row (.parquet)",
        )
    return path


def _rows(path: Path, recipe: PromptFilePlan) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, or row of a Parquet file, both from 1; what stands there)."""
    columns = [recipe.prompt_column, *([recipe.group_column] if recipe.group_column else []), *recipe.attribute_columns]
    if path.suffix == ".parquet":
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise StageError(
                f"cannot be read ({error})", where=str(path), remedy="Copy it again or leave it out"
            ) from error
        if lacking := [name for name in columns if name not in file.schema_arrow.names]:
            raise RecipeError(
                f"has no column {lacking[0]}; there are {file.schema_arrow.names}",
                where=str(path),
                remedy="Set factory.plan.prompt_column, group_column and attribute_columns",
            )
        batches = file.iter_batches(batch_size=4096, columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        return
    # Bytes that are not UTF-8 become a mark that no prompt may hold, so such a line is planned as dead.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(read_lines(file), 1):
            if not line.strip():
                continue
            plain = path.suffix == ".txt"
            yield number, {recipe.prompt_column: line} if plain else _object(line, f"{path} line {number}")


def read_lines(file: TextIO) -> Iterator[str]:
    """The lines of a file, those that never end cut: no file of any length fills the memory."""
    while line := file.readline(_MAX_LINE):
        yield line
        while len(line) == _MAX_LINE and not line.endswith("\n"):
            line = file.readline(_MAX_LINE)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise RecipeError("is no JSON object", where=where, remedy="Mend or delete that line")
    return row


class Alike:
    """Prompts seen so far, and whether another has too many words in common with one of them: an exact set-similarity join.

    The very same words are found by a digest. Of others: put the words of any two sets into one order that is the same for both. If their
    Jaccard similarity is `most` or more, and the first word that they share is number i of the one and j of the other, what follows in both
    must be long enough (prefix and positional filter: Chaudhuri et al., 2006; Xiao et al., 2008). Rare words come first, for few share them;
    which order it is changes no answer.
    """

    def __init__(self, most: float | None) -> None:
        self.most = most
        self._digests: set[bytes] = set()
        self._sets: list[frozenset[str]] = []
        self._counts: Counter[str] = Counter()
        self._rank: dict[str, int] = {}
        """The counts when the sets were last put in order."""
        self._filed: dict[str, dict[tuple[int, int], list[frozenset[str]]]] = {}
        """By one of their first words: the sets, by how many words they have and the number of this one among them."""
        self._compared = 0
        """Sets looked at since they were last put in order."""

    def find(self, prompt: str) -> bool:
        """Is an earlier prompt too like this one?"""
        if self.most is None:
            return False
        words = _words(prompt)
        if _digest(words) in self._digests:
            return True
        for other in self._candidates(words):
            self._compared += 1
            shared = len(words & other)
            if shared >= self.most * (len(words) + len(other) - shared):
                return True
        return False

    def add(self, prompt: str) -> None:
        if self.most is None or (digest := _digest(words := _words(prompt))) in self._digests:
            return
        self._digests.add(digest)
        if self.most == 1:
            return
        self._sets.append(words)
        self._counts.update(words)
        if self._compared > _WORTH_ORDERING * len(self._sets):
            self._order_anew()
        else:
            self._file(words)

    def _order_anew(self) -> None:
        """Many were looked at in vain, so the words that were rare are so no more."""
        self._rank, self._filed, self._compared = dict(self._counts), {}, 0
        for words in self._sets:
            self._file(words)

    def _file(self, words: frozenset[str]) -> None:
        for place, word in enumerate(self._first(words)):
            self._filed.setdefault(word, {}).setdefault((len(words), place), []).append(words)

    def _candidates(self, words: frozenset[str]) -> Iterator[frozenset[str]]:
        """All that may be near enough; some of them more than once."""
        for place, word in enumerate(self._first(words)):
            for (size, other), some in self._filed.get(word, {}).items():
                if min(len(words) - place, size - other) >= self._least_shared(len(words) + size):
                    yield from some

    def _first(self, words: frozenset[str]) -> list[str]:
        """In order, the words among which the first one must be that a near enough set shares."""
        assert self.most is not None
        ordered = sorted(words, key=lambda word: (self._rank.get(word, 0), -len(word), word))
        return ordered[: len(ordered) - math.ceil(self.most * len(ordered) - _ROUNDING) + 1]

    def _least_shared(self, words: int) -> float:
        """How many words two sets must share that have so many together, each counted in both."""
        assert self.most is not None
        return self.most * words / (1 + self.most) - _ROUNDING


def _digest(words: frozenset[str]) -> bytes:
    return blake2b("\n".join(sorted(words)).encode(), digest_size=16).digest()


def _words(prompt: str) -> frozenset[str]:
    return frozenset(_WORD.findall(prompt.lower())) or frozenset({""})
