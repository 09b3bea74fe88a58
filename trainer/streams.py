"""The samples that each phase of a training draws from, opened before the first of them begins, and the file that says what they are.

Phases that are trained on the same data share one stream. Knows no models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from cluster.storage import publish_bytes
from trainer.ahead import ReadAhead
from trainer.mix import Data, MixedStream, Source, as_sources
from trainer.options import Phase
from trainer.progress import is_finished
from trainer.recipe import TrainerRecipe
from trainer.trained_on import DATA, read_data


class Streams:
    """A stream for each phase that is still to be trained, by its name; `folder/data.json` is kept true."""

    def __init__(
        self,
        recipe: TrainerRecipe,
        data: Data | Mapping[Phase, Data],
        encoders: str | None,
        folder: Path,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        """`encoders` as in ShardStream. A phase that `folder` holds finished needs its data no more, and may be absent from `data`: what
        was noted of them stays.

        Raises what MixedStream does, all of it before anything is trained.
        """
        self.path, self._main = folder / DATA, accelerator.is_main_process
        groups = _groups(sources_of_phases(recipe, data))
        noted = read_data(folder)
        known = {phase for _, phases in groups for phase in phases}
        gone = [fact for fact in noted if "phase" in fact and fact["phase"] not in known]
        self.apart = len(groups) > 1 or bool(gone)
        """Whether the phases have different data."""
        self._parts: list[tuple[Phase, MixedStream | list[dict[str, Any]]]] = []
        for phase in dict.fromkeys(fact["phase"] for fact in gone):
            self._parts.append((phase, [fact for fact in gone if fact["phase"] == phase]))
        self._of: dict[Phase, MixedStream] = {}
        for sources, phases in groups:
            kept = [fact for fact in noted if fact.get("phase", phases[0]) == phases[0]]
            if all(is_finished(folder, phase) for phase in phases):
                self._parts.append((phases[0], kept))
                continue
            key = recipe.data_of(phases[0])[1] if self.apart else "trainer"
            stream = MixedStream(
                sources, seed, self._main, encoders, recipe.on_corrupt, recipe.max_corrupt_share, f"{key}.more_data"
            )
            stream.recall(kept)
            if accelerator.num_processes > 1:
                stream.gather = gather_object
            stream.ahead, stream.decode_ahead = ReadAhead(recipe.loaders), not recipe.cache_latents
            self._parts.append((phases[0], stream))
            self._of |= dict.fromkeys(phases, stream)
        accelerator.wait_for_everyone()  # all have read the old file before there is a new one
        if groups:  # else all is trained, and what was noted stays
            self._publish()
        for stream in self._open():
            stream.on_skip = self._publish
            stream.settle()

    def __getitem__(self, phase: Phase) -> MixedStream:
        return self._of[phase]

    def told(self) -> list[str]:
        """What people want to know of the data before training begins."""
        return [
            f"{phase}: {line}" if self.apart else line
            for phase, part in self._parts
            if isinstance(part, MixedStream)
            for line in part.told(all_of_them=self.apart)
        ]

    def close(self) -> None:
        for stream in self._open():
            stream.close()

    def _open(self) -> list[MixedStream]:
        return [part for _, part in self._parts if isinstance(part, MixedStream)]

    def _publish(self) -> None:
        if not self._main:
            return
        facts: list[dict[str, Any]] = []
        for phase, part in self._parts:
            told = part.facts() if isinstance(part, MixedStream) else part
            facts += [{"phase": phase, **fact} if self.apart else fact for fact in told]
        publish_bytes(self.path, (json.dumps(facts, indent=2) + "\n").encode())


def sources_of_phases(recipe: TrainerRecipe, data: Data | Mapping[Phase, Data]) -> dict[Phase, list[Source]]:
    """What each phase that has steps is trained on: what `data` has for it, if it is there, or all of `data` where it is not by phase."""
    return {
        phase: as_sources(data[phase] if isinstance(data, Mapping) else data)  # pyright: ignore[reportArgumentType]
        for phase in recipe.phases_run()
        if not isinstance(data, Mapping) or phase in data
    }


def _groups(by_phase: Mapping[Phase, list[Source]]) -> list[tuple[list[Source], list[Phase]]]:
    """Phases with the same sources together, in order."""
    found: list[tuple[list[Source], list[Phase]]] = []
    for phase, sources in by_phase.items():
        same = next((phases for others, phases in found if others == sources), None)
        if same is None:
            found.append((sources, [phase]))
        else:
            same.append(phase)
    return found
