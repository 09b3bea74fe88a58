"""Another try for samples that died while they were made, and for URLs that failed: what vouches for their units is taken back."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import EdgeFusionError, LedgerConflict
from cluster.stage import DEAD
from factory.added import forget_units
from factory.dead import note_tried, reopen_unit
from factory.download import ask_again, failed_urls, wants_again
from factory.pack import MANIFEST
from factory.plan import PLAN
from factory.units import plan_files, read_table

_BUILT_ON = ("training", "student", "samples", "export", "report.html")


def reopen_dead(folder: Path) -> tuple[int, int]:
    """Take back the ledger entries of units that hold dead samples, and the manifest; returns (samples, units).

    `folder` is a data set or the output folder of a run. Prompts that died in the plan stay dead: there is nothing to draw.
    The next `make` makes those units anew; their living pictures come out the same. Raises EdgeFusionError if there is no data
    set, and LedgerConflict if something was already built on it as it is.
    """
    data = _data_set(folder, PLAN)
    if not (data / PLAN).exists():
        raise EdgeFusionError("holds no data set", where=str(folder), remedy="Give the --out folder of edgefusion run")
    planned = [row for path in plan_files(data) for row in read_table(path, ["id", "outcome"]).to_pylist()]
    hopeless = {row["id"] for row in planned if row["outcome"] == DEAD}
    found: dict[Path, list[dict[str, str]]] = {}
    for entry in sorted((data / "ledger").glob("unit-*.parquet")):
        rows = read_table(entry, ["id", "outcome", "reason"]).to_pylist()
        dead = [row for row in rows if row["outcome"] == DEAD and row["id"] not in hopeless]
        found |= {entry: dead} if dead else {}
    if not found:
        return 0, 0
    refuse_if_built(data)
    # The manifest goes first: a data set without one is unfinished, whatever else happens.
    (data / MANIFEST).unlink(missing_ok=True)
    forget_units(data, [entry.stem for entry in found])
    note_tried(data, (row for rows in found.values() for row in rows))
    for entry in found:
        reopen_unit(data, entry.stem)
    return sum(map(len, found.values())), len(found)


def reopen_urls(folder: Path) -> int:
    """Let the next run ask once more for URLs that failed for reasons that may pass (time-outs, broken answers, busy servers), and take
    back the manifest; returns how many.

    `folder` as of `reopen_dead`, but it may have no plan yet. Raises LedgerConflict as that does.
    """
    data = _data_set(folder, "downloads")
    failed = failed_urls(data)
    if failed:
        refuse_if_built(data)
        (data / MANIFEST).unlink(missing_ok=True)
        if not wants_again(data):  # else these failures are noted, and nobody asked since
            ask_again(data)
            note_tried(data, ({"id": key, "reason": f"plan: {wrong}"} for key, wrong in failed))
    return len(failed)


def is_planned(folder: Path) -> bool:
    """Whether there is a plan; a download that never came to an end leaves none."""
    return (_data_set(folder, PLAN) / PLAN).exists()


def _data_set(folder: Path, proof: str) -> Path:
    return folder / "dataset" if (folder / "dataset" / proof).exists() else folder


def built_on(data: Path) -> list[str]:
    """What a run has made of the data set in `data`, by its names in the output folder."""
    place = data.resolve()
    return [name for name in _BUILT_ON if (place.parent / name).exists()] if place.name == "dataset" else []


def refuse_if_built(data: Path) -> None:
    """Raise LedgerConflict if a run already built something on the data set in `data`, which is about to change."""
    if built := built_on(data):
        raise LedgerConflict(
            f"{', '.join(built)} there was made from the data set as it is",
            where=str(data.resolve().parent),
            remedy="Delete those to build them anew, or copy the dataset folder and go on in the copy",
        )
