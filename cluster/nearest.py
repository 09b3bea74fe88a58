"""Errors that name the folder that was meant. A folder's kind is told by a file it holds; which kinds there are, the wings know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cluster.errors import EdgeFusionError

_MOST_NAMED = 4


def wrong_folder(
    folder: Path, mark: str, what: str, remedy: str, kind: type[EdgeFusionError] = EdgeFusionError
) -> EdgeFusionError:
    """The error for a folder that lacks the file `mark`: that it does not exist, or `what` it is not; and the folder that was meant, or `remedy`."""
    what = what if folder.exists() else "does not exist"
    return kind(what, where=str(folder), remedy=did_you_mean(folder, mark) or remedy)


def did_you_mean(folder: Path, mark: str) -> str:
    """A question that names the nearest folders with a file `mark`; empty where there are none."""
    found = [str(place) for place in _nearest(folder, mark)[:_MOST_NAMED]]
    *others, last = found or [""]
    first = f"{', '.join(others)} or " if others else ""
    return f"Did you mean {first}{last}?" if last else ""


def _nearest(folder: Path, mark: str) -> list[Path]:
    """Up to two below, or else the one it lies in, or else those beside it. Of a name that nothing has, those that are spelled like it."""
    if not folder.exists():
        there = next(place for place in folder.parents if place.is_dir())
        if there == there.parent and there.is_absolute():
            return []  # nobody keeps models at a disk's root, and all of it would be looked at
        found = {str(place): place for deep in ("*", "*/*") for place in _with(there, f"{deep}/{mark}")}
        return [found[name] for name in difflib.get_close_matches(str(folder), found, n=_MOST_NAMED, cutoff=0.7)]
    looks = ((folder, f"*/{mark}"), (folder, f"*/*/{mark}"), (folder.parent, mark), (folder.parent, f"*/{mark}"))
    for look in looks:
        if found := _with(*look):
            return found
    return []


def _with(place: Path, pattern: str) -> list[Path]:
    with suppress(OSError):  # what may not be read is none that was meant
        return sorted(_parents(place.glob(pattern)))
    return []


def _parents(files: Iterable[Path]) -> Iterable[Path]:
    return (file.parent for file in files)
