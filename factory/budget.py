"""A limit on what a server's captions may cost, kept by workers that share nothing but the data set's folder.

A worker first sets aside what its next unit will cost, then counts: what all journals say (cluster/usage.py), and what others have set
aside. In this order two workers that begin at the same time see each other, and at worst both stop; in the other order both might go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import StageError
from cluster.storage import publish_bytes
from cluster.usage import JOURNAL, Prices, Usage, read_usage
from factory.recipe import CaptionerKeys, OpenAiCaptioner

ASIDE = ".aside.json"
"""Ending of a note of what is set aside for a unit; it goes with the unit's last caption."""
_PICTURE_TOKENS = 3000
"""Allowed for a picture, where a price has to be reckoned before any was counted; LLaVA-NeXT makes 2,880 of one at most."""


@dataclass
class _Spent:
    """What a journal of this size says."""

    size_bytes: int = -1
    cost: float = 0.0
    answers: int = 0


class Budget:
    """Of one worker; `folder` holds the journals of all."""

    def __init__(self, folder: Path, prices: Prices, max_cost: float, longest: float) -> None:
        """`longest` is the cost of an answer whose tokens nobody counted."""
        self.folder, self.prices, self.max_cost, self.longest = folder, prices, max_cost, longest
        self._known: dict[str, _Spent] = {}

    @contextmanager
    def set_aside(self, journal: Path, answers: int) -> Generator[None]:
        """Ask for so many answers, which `journal` notes, within the block. Raises StageError if they would cost more than is left.

        Reckoned at what earlier answers cost, or the first at the longest that the recipe allows.
        """
        if not self._known:
            self._read()
        elif journal.exists():
            self._look(journal, journal.stat().st_size)
        counted = sum(one.answers for one in self._known.values())
        each = sum(one.cost for one in self._known.values()) / counted if counted else self.longest
        unit = journal.name.removesuffix(JOURNAL)
        mark = self.folder / f"{unit}{ASIDE}"
        publish_bytes(mark, json.dumps({"upto": self._spent(unit) + each * answers}).encode())
        try:
            others = sum(left for name, left in self._read().items() if name != unit)
            spent = sum(one.cost for one in self._known.values())
            if spent + others + each * answers > self.max_cost:
                at_work = f", {others:.2f} set aside for what others are at" if others else ""
                raise StageError(
                    f"{spent:.2f} is spent{at_work}, and the next {answers} captions would cost about {each * answers:.2f}: "
                    f"more than max_cost ({self.max_cost:g})",
                    where="factory.make.captioner.max_cost",
                    remedy="Raise it and run the same command again; what is made is kept",
                )
            yield
        finally:
            mark.unlink(missing_ok=True)

    def _spent(self, unit: str) -> float:
        return self._known.get(unit, _Spent()).cost

    def _read(self) -> dict[str, float]:
        """Bring what is known of the journals up to date; what is set aside and not spent yet, by unit."""
        upto: dict[str, float] = {}
        # Before the journals: whose note is gone by now has all its answers in there.
        for mark in self.folder.glob(f"*{ASIDE}"):
            with suppress(FileNotFoundError):
                upto[mark.name.removesuffix(ASIDE)] = float(json.loads(mark.read_bytes())["upto"])
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(JOURNAL):
                    self._look(Path(entry.path), entry.stat().st_size)
        return {unit: max(0.0, cost - self._spent(unit)) for unit, cost in upto.items()}

    def _look(self, journal: Path, size_bytes: int) -> None:
        """Open it only if it grew: there is one for every unit of the data set."""
        unit = journal.name.removesuffix(JOURNAL)
        if size_bytes != self._known.get(unit, _Spent()).size_bytes:
            usage = read_usage([journal])
            self._known[unit] = _Spent(size_bytes, self._cost(usage), usage.answers)

    def _cost(self, usage: Usage) -> float:
        """At the recipe's prices as they are now, whatever they were when it was asked."""
        return self.prices.of(usage.input_tokens, usage.output_tokens) + usage.uncounted * self.longest


def budget_of(captioner: CaptionerKeys, folder: Path) -> Budget | None:
    """What the captioner may spend on the data set whose journals lie in `folder`; None if nothing limits it."""
    if not isinstance(captioner, OpenAiCaptioner) or captioner.max_cost is None or not (prices := captioner.prices()):
        return None
    # A token is longer than a letter.
    longest = prices.of(len(captioner.template) + _PICTURE_TOKENS, captioner.max_new_tokens)
    return Budget(folder, prices, captioner.max_cost, longest)


def forget_set_aside(folder: Path) -> None:
    """Take away what a run that was killed had set aside."""
    for mark in folder.glob(f"*{ASIDE}"):
        mark.unlink(missing_ok=True)
