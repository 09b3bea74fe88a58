"""Prompts that a user brings, from text, JSON lines or Parquet files, and prompts that are too like one another.

Brought prompts are the same kind of plan as written ones: each row is a prompt with its attributes, checked, enumerated and drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RecipeError, StageError
from factory.recipe import PromptFilePlan

_WORD = re.compile(r"\w+")
_MAX_LINE = 1 << 20
"""Characters of a line; what is beyond them is skipped unkept."""


def read_prompts(recipe: PromptFilePlan) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(prompt, group, attributes) of every row, in the order of the files. Raises RecipeError for a file that is no such list."""
    count = 0
    for name in recipe.paths:
        for row in _rows(prompt_file(name), recipe):
            if recipe.limit is not None and count == recipe.limit:
                return
            count += 1
            prompt = row.get(recipe.prompt_column)
            text = " ".join(prompt.split()) if isinstance(prompt, str) else ""
            group = row.get(recipe.group_column) if recipe.group_column else None
            found = {a: str(row[a]) for a in recipe.attribute_columns if row.get(a) is not None}
            yield text, "prompts" if group is None else str(group), found


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


def _rows(path: Path, recipe: PromptFilePlan) -> Iterator[dict[str, Any]]:
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
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from batch.to_pylist()
        return
    # Bytes that are not UTF-8 become a mark that no prompt may hold, so such a line is planned as dead.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(read_lines(file), 1):
            if not line.strip():
                continue
            yield {recipe.prompt_column: line} if path.suffix == ".txt" else _object(line, f"{path} line {number}")


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

    Two prompts with a Jaccard similarity of words of at least `most` share one of the first words of each, in any order of all words that
    is the same for both (prefix filter, Chaudhuri et al., 2006); here longer words come first, for they are rarer.
    """

    def __init__(self, most: float | None) -> None:
        self.most = most
        self._words: list[frozenset[str]] = []
        self._by_word: dict[str, list[int]] = defaultdict(list)

    def find(self, prompt: str) -> bool:
        """Is an earlier prompt too like this one?"""
        if self.most is None:
            return False
        words = _words(prompt)
        # The first in the plan that is near enough is as good as any, so nothing depends on the order of candidates.
        near = {i for word in self._prefix(words) for i in self._by_word.get(word, ())}
        return any(len(words & self._words[i]) >= self.most * len(words | self._words[i]) for i in near)

    def add(self, prompt: str) -> None:
        if self.most is None:
            return
        words = _words(prompt)
        for word in self._prefix(words):
            self._by_word[word].append(len(self._words))
        self._words.append(words)

    def _prefix(self, words: frozenset[str]) -> list[str]:
        assert self.most is not None
        ordered = sorted(words, key=lambda word: (-len(word), blake2b(word.encode(), digest_size=8).digest()))
        return ordered[: len(ordered) - math.ceil(self.most * len(ordered) - 1e-9) + 1]


def _words(prompt: str) -> frozenset[str]:
    return frozenset(_WORD.findall(prompt.lower())) or frozenset({""})
