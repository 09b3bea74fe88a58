"""Decisions as tables: out to CSV or Parquet for other tools and people, and back in."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import EdgeFusionError
from cluster.storage import publish_bytes
from factory.decisions import FIELDS, Decision, Overlay, read_decisions
from factory.plan import table_bytes
from factory.units import plan_files, read_table

_SCHEMA = pa.schema([(name, pa.string()) for name in FIELDS])


def export_decisions(folder: Path, target: Path) -> int:
    """Write what stands decided, sorted by id, to a .csv or .parquet file; returns the number of rows."""
    decisions = read_decisions(folder)
    rows = [asdict(decisions[key]) for key in sorted(decisions)]
    if _kind(target) == "parquet":
        publish_bytes(target, table_bytes(pa.Table.from_pylist(rows, schema=_SCHEMA)))
    else:
        sink = io.StringIO(newline="")
        writer = csv.DictWriter(sink, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        publish_bytes(target, sink.getvalue().encode())
    return len(rows)


def import_decisions(folder: Path, source: Path) -> int:
    """Take over the decisions of a file that `export_decisions` wrote (or a like one), all or none; returns how many were new.

    An imported row wins over what stands, as a mark made now would. Columns id and verdict are enough. Raises EdgeFusionError
    that names the first row that is no decision or whose id is not in the plan.
    """
    known = {key for path in plan_files(folder) for key in read_table(path, ["id"])["id"].to_pylist()}
    found: list[Decision] = []
    for number, row in enumerate(_rows(source), 1):
        try:
            decision = _decision(row)
            if decision.id not in known:
                raise ValueError(f"{decision.id} is not in this data set")
        except (ValueError, TypeError) as error:
            raise EdgeFusionError(
                f"row {number}: {error}", where=str(source), remedy="Mend the row; nothing was imported"
            ) from None
        found.append(decision)
    return Overlay(folder).extend(found)


def _decision(row: dict[str, Any]) -> Decision:
    if odd := set(row) - set(FIELDS):
        raise ValueError(f"{min(map(str, odd))} is no column of decisions")
    return Decision(
        id=row.get("id") or "",
        verdict=row.get("verdict") or None,
        reason=row.get("reason") or "",
        caption=row.get("caption") or None,
        who=row.get("who") or "import",
        when=row.get("when") or "",
    )


def _rows(source: Path) -> list[dict[str, Any]]:
    if not source.exists():
        raise EdgeFusionError("there is no such file", where=str(source), remedy="Check the path")
    kind = _kind(source)
    try:
        if kind == "parquet":
            return pq.read_table(source).to_pylist()
        return list(csv.DictReader(io.StringIO(source.read_text(encoding="utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid, OSError) as error:
        what = "Parquet" if kind == "parquet" else "CSV in UTF-8"
        raise EdgeFusionError(
            f"cannot be read as {what} ({str(error).splitlines()[0]})", where=str(source), remedy="Save it as such"
        ) from None


def _kind(path: Path) -> str:
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("csv", "parquet"):
        raise EdgeFusionError("is neither .csv nor .parquet", where=str(path), remedy="Give it one of these endings")
    return kind
