"""Several packed data sets as one endless stream: each draw's data set and row are pure functions of the draw number.

Draws come in cycles of 1,024 slots; in every cycle each data set has its share of the slots, in a seeded order of the cycle's own. Within
a data set the order is its own endless permutation, so each of its samples comes once before any comes twice. The state of the mixture is
therefore still the step number: resume is exact and any number of workers sees the same global batches. In the place of a sample that
cannot be read comes another of its data set, chosen by the draw number and the number of tries alone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.cache import CacheRecipe, RemoteFolder, is_url
from cluster.errors import CorruptShard, RecipeError
from cluster.storage import local_path
from factory.pack import MANIFEST
from factory.views import MAIN, view_folder
from trainer.ahead import ReadAhead
from trainer.options import OnCorrupt, Phase
from trainer.progress import is_finished
from trainer.recipe import TrainerRecipe
from trainer.stream import CorruptSample, Example, ShardStream

CYCLE = 1024
"""Draws after which every data set had exactly its share; shares are rounded to 1 / 1,024."""
_TRIES = 64
"""Stand-ins that are tried for one draw; a data set in which so many fail has nothing to give."""


@dataclass(frozen=True)
class Source:
    """A packed data set and how much of the training it is; without a weight, its number of samples."""

    folder: Path | RemoteFolder
    weight: float | None = None


def sources_of(
    recipe: TrainerRecipe, own: Path, cache: CacheRecipe | None = None, phase: Phase | None = None
) -> list[Source]:
    """The chain's own data set, or the view of it that the recipe names, and the recipe's others, by absolute paths or URLs; one of weight 0 is left out.

    With a `phase`, what that phase is trained on. `cache` is where shards that come from URLs are kept. Raises RecipeError for a data set that
    is not there or comes twice, or if no weight is left.
    """
    data, key = recipe.data_of(phase) if phase else (recipe, "trainer")
    found = [Source(view_folder(own.resolve(), data.own_view or MAIN), data.own_weight)]
    for i, more in enumerate(data.more_data):
        folder = _place_of(more.data, cache or CacheRecipe())
        if not _is_there(folder):
            raise RecipeError(
                f"{key}.more_data.{i}.data: there is no packed data set in {more.data}",
                remedy=f"Give a folder or URL with shards and {MANIFEST}: the `dataset` folder of a finished run, or a view in it (dataset/views/NAME)",
            )
        if folder in [source.folder for source in found]:
            raise RecipeError(f"{key}.more_data.{i}.data: {more.data} is there twice", remedy="Give it one weight")
        found.append(Source(folder, more.weight))
    found = [source for source in found if source.weight != 0]
    if not found:
        raise RecipeError(
            "every weight is 0, so there is nothing to train on",
            where=f"{key}.own_weight, {key}.more_data",
            remedy="Give one of them a weight above 0",
        )
    return found


def sources_by_phase(
    recipe: TrainerRecipe, own: Path, cache: CacheRecipe | None, training: Path
) -> dict[Phase, list[Source]]:
    """`sources_of` each phase that has steps, but for those that `training` holds finished: their data may be gone."""
    left: list[Phase] = [phase for phase in recipe.phases_run() if not is_finished(training, phase)]
    return {phase: sources_of(recipe, own, cache, phase) for phase in left}


def _place_of(data: str, cache: CacheRecipe) -> Path | RemoteFolder:
    if is_url(data):
        return RemoteFolder(data.rstrip("/"), cache)
    return local_path(data).expanduser().resolve()


def _is_there(folder: Path | RemoteFolder) -> bool:
    if isinstance(folder, Path):
        return (folder / MANIFEST).exists()
    return MANIFEST in folder.sizes([MANIFEST])


class MixedStream:
    """`ShardStream`s behind one row number: row 0 of the second follows the last row of the first."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int = 0,
        check: bool = True,
        encoders: str | None = None,
        on_corrupt: OnCorrupt = "stop",
        max_corrupt_share: float = 0.05,
        key: str = "trainer.more_data",
    ) -> None:
        """`encoders` and `on_corrupt` as in ShardStream; `key` is where a recipe says the weights. Raises CorruptShard for shards, members or encodings that are not what the
        manifest says, RecipeError for a share that vanishes."""
        # The first keeps the order that it would have alone.
        self.parts = [
            ShardStream(source.folder, seed + 7919 * i, check, encoders, on_corrupt) for i, source in enumerate(sources)
        ]
        sizes = [len(part) for part in self.parts]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        weights = [
            float(size) if source.weight is None else source.weight for source, size in zip(sources, sizes, strict=True)
        ]
        self.quotas = quotas(weights, [str(source.folder) for source in sources], key)
        self.seed = seed
        self._cycle: tuple[int, np.ndarray, np.ndarray] | None = None
        self.max_corrupt_share = max_corrupt_share
        self.skipped: dict[int, str] = {}
        """Row number to why the sample is left out: of all workers, as of the last `settle`."""
        self.gather: Callable[[list[tuple[int, str]]], list[tuple[int, str]]] = lambda new: new
        """Joins what the workers found since the last `settle`."""
        self.on_skip: Callable[[], object] = lambda: None
        self.ahead = ReadAhead(0)
        self.decode_ahead = True
        """Whether pictures are decoded where they are read; not worth it where their latents are kept in memory."""
        self._sound: set[int] = set()
        self._lock = threading.Lock()
        """Held for the order and for what could not be read: samples are read by several threads."""
        self._new = {
            start + row: why
            for start, part in zip(self.starts, self.parts, strict=True)
            for row, why in part.damaged.items()
        }

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def row_at(self, draw: int) -> int:
        """Row number of a draw, from any thread; the global batch at a step is the draws `step * batch` to `(step + 1) * batch`."""
        with self._lock:
            return self._row_at(draw)

    def first_prompts(self, count: int) -> list[str]:
        """Of the first samples, as the manifests have them."""
        return list(itertools.islice((row["prompt"] for part in self.parts for row in part.rows), count))

    def read(self, row: int) -> Example:
        part = self._part_of(row)
        return self.parts[part].read(row - self.starts[part])

    def _part_of(self, row: int) -> int:
        return max(i for i, start in enumerate(self.starts) if start <= row)

    def read_draws(self, draws: Sequence[int], following: Sequence[int], size_px: int) -> list[Example]:
        """The samples of `draws`; those of `following` are read meanwhile, if `ahead` has threads."""

        def read(draw: int) -> Example:
            example = self.read_draw(draw, size_px)
            if self.decode_ahead and example.encoded is None:
                example.pixels(size_px)
            return example

        return self.ahead.take(read, draws, following)

    def read_draw(self, draw: int, size_px: int) -> Example:
        """The sample of a draw, or its stand-in if it cannot be read. Raises CorruptShard if no stand-in can be read either.

        A picture is decoded at `size_px` before it is handed out for the first time.
        """
        row = self.row_at(draw)
        for attempt in range(1, _TRIES + 1):
            if row not in self.skipped and row not in self._new:
                try:
                    example = self.read(row)
                    if row not in self._sound and example.encoded is None:
                        example.pixels(size_px)
                        self._sound.add(row)
                    return example
                except CorruptSample as error:
                    with self._lock:
                        self._new[row] = error.reason
            part = self._part_of(row)
            rng = np.random.default_rng((self.seed, 2, draw, attempt))
            row = self.starts[part] + int(rng.integers(len(self.parts[part])))
        raise CorruptShard(
            f"{_TRIES} samples in a row cannot be read",
            where=str(self.parts[self._part_of(row)].folder),
            remedy="Run `edgefusion factory repair`, or leave the data set out",
        )

    def settle(self) -> None:
        """Tell all workers what each could not read. Raises CorruptShard, in all of them, when it is too much."""
        with self._lock:
            found, self._new = self._new, {}
        new = {row: why for row, why in self.gather(sorted(found.items())) if row not in self.skipped}
        if not new:
            return
        self.skipped |= new
        self.on_skip()
        share = len(self.skipped) / len(self)
        if share > self.max_corrupt_share:
            row = min(new)
            part = self._part_of(row)
            entry = self.parts[part].rows[row - self.starts[part]]
            raise CorruptShard(
                f"{len(self.skipped)} of {len(self)} samples cannot be read ({share:.1%}, above trainer.max_corrupt_share "
                f"{self.max_corrupt_share:.1%}); one is {entry['id']}: {new[row]}",
                where=f"{self.parts[part].folder}/{entry['shard']}",
                remedy="Run `edgefusion factory repair` or copy the shards again; or raise trainer.max_corrupt_share",
            )

    def recall(self, facts: Sequence[dict[str, Any]]) -> None:
        """Leave out at once what an earlier part of this training left out, as its `facts` say."""
        for fact, part, start in zip(facts, self.parts, self.starts, strict=False):
            told = {(row["shard"], row["key"]): row["reason"] for row in fact.get("skipped", [])}
            if told and fact.get("data") == str(part.folder):
                for row, entry in enumerate(part.rows):
                    if why := told.get((entry["shard"], entry["id"])):
                        self._new.setdefault(start + row, why)

    def identity(self) -> list[dict[str, Any]]:
        """What makes this mixture this mixture, a row a data set: its manifest, its encodings if they are read, its slots of a cycle."""
        return [part.identity() | {"slots": quota} for part, quota in zip(self.parts, self.quotas, strict=True)]

    def facts(self) -> list[dict[str, Any]]:
        """A row a data set, for the log: folder, samples, share of the draws, whether encodings are read, and what was left out."""
        found: list[dict[str, Any]] = []
        for part, start, quota in zip(self.parts, self.starts, self.quotas, strict=True):
            fact: dict[str, Any] = {
                "data": str(part.folder),
                "samples": len(part),
                "share": round(quota / CYCLE, 4),
                "encodings": None if part.encodings is None else part.encodings.facts,
            }
            skipped = [
                {"shard": part.rows[row - start]["shard"], "key": part.rows[row - start]["id"], "reason": why}
                for row, why in sorted(self.skipped.items())
                if start <= row < start + len(part)
            ]
            found.append(fact | ({"skipped": skipped} if skipped else {}))
        return found

    def told(self, all_of_them: bool = False) -> list[str]:
        """The same for people, where there is something to say, or of `all_of_them`."""
        lines = []
        for fact in self.facts():
            encoded = fact["encodings"]
            if is_url(fact["data"]):
                lines.append(f"{fact['data']}: {fact['samples']} samples, by way of the cache on this machine")
            if encoded:
                lines.append(
                    f"{fact['data']}: cached encodings ({encoded['dtype']}, by {encoded['teacher']}) are read instead of pictures"
                )
            elif len(self.parts) > 1 or all_of_them:
                lines.append(f"{fact['data']}: {fact['samples']} samples, {fact['share']:.1%} of the draws")
        return lines

    def close(self) -> None:
        self.ahead.close()
        for part in self.parts:
            part.close()

    def _row_at(self, draw: int) -> int:
        if len(self.parts) == 1:
            return self.parts[0].row_at(draw)
        cycle, slot = divmod(draw, CYCLE)
        if self._cycle is None or self._cycle[0] != cycle:
            slots = np.repeat(np.arange(len(self.parts)), self.quotas)
            np.random.default_rng((self.seed, 1, cycle)).shuffle(slots)
            # How many of the cycle's earlier slots had the same data set.
            before = np.zeros(CYCLE, np.int64)
            for part in range(len(self.parts)):
                own = slots == part
                before[own] = np.arange(own.sum())
            self._cycle = (cycle, slots, before)
        part = int(self._cycle[1][slot])
        turn = cycle * self.quotas[part] + int(self._cycle[2][slot])
        return self.starts[part] + self.parts[part].row_at(turn)


def quotas(weights: Sequence[float], names: Sequence[str], key: str = "trainer.more_data") -> list[int]:
    """Slots of a cycle for each weight, by largest remainder. Raises RecipeError for a weight that gets none."""
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: CYCLE - sum(found)]:
        found[i] += 1
    if 0 in found:
        raise RecipeError(
            f"the weight of {names[found.index(0)]} is under 1/{2 * CYCLE} of all, so it would never be drawn",
            where=key,
            remedy="Raise its weight or leave it out (weight 0)",
        )
    return found


Data = Path | RemoteFolder | Sequence[Source]
"""One data set, or several to be drawn from together."""


def as_sources(data: Data) -> list[Source]:
    """One data set or several, as several."""
    return [Source(data)] if isinstance(data, Path | RemoteFolder) else list(data)
