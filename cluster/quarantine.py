"""Rows that kill their worker: found by notes on disk and buried alone, while the rest of their unit and of the run goes on.

A segfault or the kernel's OOM killer leaves no exception to catch, and a runner that only retries meets the same row for ever.
So a worker writes down which rows it is about to try and removes the note when it is through. Whoever finds a note left behind
knows what a worker died of: it tries those rows in smaller pieces, and a row that was tried alone and killed `max_deaths` workers
becomes a dead letter. A unit of 64 rows loses two workers until the row stands alone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.errors import StageError
from cluster.stage import DEAD, PENDING, Row, Stage, Unit, Worker, apply

_PIECES = 8
"""Into how many pieces suspects are cut. Each cut costs a dead worker, each piece may cost a batch that is not full."""

log = logging.getLogger("edgefusion")


@dataclass(frozen=True)
class Note:
    """What one stage knows of one unit that it has not finished."""

    run: str
    pieces: list[list[str]]
    """Ids of the pending rows as they will be tried: all at once until a worker dies of them."""
    at_risk: list[str] = field(default_factory=list[str])
    """Ids that a worker is trying now, or died of."""
    deaths: int = 0
    """Workers that died in this unit, for those who look (`edgefusion status`)."""
    alone: dict[str, int] = field(default_factory=dict[str, int])
    """Deaths by id, of rows tried alone."""
    who: str = ""


@dataclass(frozen=True)
class Attempts:
    """Where the notes of a run lie, and what they prove."""

    folder: Path
    max_deaths: int
    """Workers that a row may kill while it is tried alone; at least 1."""
    run: str = ""
    """Names this run. On Ray a note of another run proves nothing: there the whole cluster may have been switched off."""
    trust_other_runs: bool = False

    def begin(self, stage: Stage, unit: Unit) -> Note:
        """The note to work by; draws the conclusion from one that was left behind."""
        ids = [row["id"] for row in unit.rows if stage.whole or row["outcome"] == PENDING]
        left = self._read(stage, unit)
        if left is None or sorted(i for piece in left.pieces for i in piece) != sorted(ids):
            return Note(self.run, [ids] if ids else [])
        # Of a stage that takes units whole nothing could be buried: whoever kills a command twice while it commits means the command.
        counts = left.run == self.run or (self.trust_other_runs and not stage.whole)
        note = replace(left, run=self.run, at_risk=[], deaths=left.deaths + bool(left.at_risk and counts))
        if not left.at_risk:
            return note
        facts = {"stage": stage.name, "unit": unit.id, "samples": left.at_risk, "who_died": left.who}
        words = "a worker died in stage %s on %d rows of %s"
        log.warning(words, stage.name, len(left.at_risk), unit.id, extra={"facts": facts})
        if len(left.at_risk) == 1:
            (key,) = left.at_risk
            return replace(note, alone={**note.alone, key: note.alone.get(key, 0) + bool(counts)})
        return replace(note, pieces=_cut(note.pieces, left.at_risk))

    def save(self, stage: Stage, unit: Unit, note: Note) -> None:
        """Whole or absent, but not synced: it must outlive the process, not the machine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(stage, unit)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        who = f"{socket.gethostname()}, process {os.getpid()}"
        partial.write_text(json.dumps({**asdict(note), "who": who, "when": round(time.time(), 1)}))
        os.replace(partial, path)

    def end(self, stage: Stage, unit: Unit) -> None:
        """The unit is through this stage."""
        self._path(stage, unit).unlink(missing_ok=True)

    @contextmanager
    def opening(self, stage: Stage) -> Generator[None]:
        """Bounds how many workers may die while they open a stage; raises StageError. No row is to blame for those."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # As many as the pool holds may be opening at this moment, alive and well.
        if len(self._openings(stage)) >= self.max_deaths + stage.workers - 1:
            raise StageError(
                f"stage {stage.name} killed at least {self.max_deaths} workers while it was opened",
                remedy="Give its workers more memory (cluster.memory_gib) or mend its model or driver; --debug shows more",
            )
        own = self.folder / f"{stage.name}.opening-{self.run}-{uuid.uuid4().hex}"
        own.touch()
        try:
            yield
        except Exception:
            own.unlink(missing_ok=True)
            raise
        for path in self._openings(stage):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """All units are through: no note means anything now."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _openings(self, stage: Stage) -> list[Path]:
        return list(self.folder.glob(f"{stage.name}.opening-{self.run}-*"))

    def _path(self, stage: Stage, unit: Unit) -> Path:
        return self.folder / f"{stage.name}.{unit.id}.json"

    def _read(self, stage: Stage, unit: Unit) -> Note | None:
        try:
            found: dict[str, Any] = json.loads(self._path(stage, unit).read_text())
            found.pop("when", None)
            return Note(**found)
        except (OSError, ValueError, TypeError):
            return None


def apply_noted(stage: Stage, worker: Worker, unit: Unit, attempts: Attempts) -> Unit:
    """As `apply`, with a note for whoever comes after a death. Call `attempts.end` once the result is safe."""
    note = attempts.begin(stage, unit)
    if stage.whole:
        return _apply_whole(stage, worker, unit, attempts, note)
    buried = {key for key, deaths in note.alone.items() if deaths >= attempts.max_deaths}
    done = {row["id"]: row for row in unit.rows if row["outcome"] != PENDING or row["id"] in buried}
    for key in buried:
        reason = f"{stage.name}: killed its worker {attempts.max_deaths} times"
        done[key] = {**done[key], "outcome": DEAD, "reason": reason}
    by_id = {row["id"]: row for row in unit.rows}
    # Suspects first: if they kill again, the least work is lost.
    for piece in sorted(note.pieces, key=len):
        todo = [key for key in piece if key not in buried]
        if not todo:
            continue
        note = replace(note, at_risk=todo)
        attempts.save(stage, unit, note)
        tried = apply(stage, worker, Unit(unit.id, [by_id[key] for key in todo]))
        done |= {row["id"]: row for row in tried.rows}
    rows = [done[row["id"]] for row in unit.rows]
    columns: Row = {name: None for row in rows for name in row}
    return Unit(unit.id, [{**columns, **row} for row in rows])


def _apply_whole(stage: Stage, worker: Worker, unit: Unit, attempts: Attempts, note: Note) -> Unit:
    if note.deaths >= attempts.max_deaths:
        attempts.end(stage, unit)
        raise StageError(
            f"stage {stage.name} killed its worker {note.deaths} times on {unit.id}, which it must take whole",
            remedy="Give it more memory (cluster.memory_gib) or make factory.make.unit_images smaller",
        )
    attempts.save(stage, unit, replace(note, at_risk=[row["id"] for row in unit.rows]))
    return apply(stage, worker, unit)


def _cut(pieces: list[list[str]], suspects: list[str]) -> list[list[str]]:
    """Every piece that holds suspects in up to eight, in their order."""
    found: list[list[str]] = []
    for piece in pieces:
        guilty = set(piece) & set(suspects)
        size = -(-len(piece) // _PIECES) if guilty else len(piece)
        found += [piece[i : i + size] for i in range(0, len(piece), size)]
    return found
