"""What the paper's tables say, as rows and as comparisons that a reproduction can agree with or not.

Source: Castells et al., "EdgeFusion", arXiv 2404.11925v1, Tables 2 and 3 (COCO; IS is left out, it has no counterpart here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DATA_SETS = ("L-orig", "L-pp", "L-pps", "synt", "synt-cur")
PAPER_PAIRS = {"L-orig": 212_800, "L-pp": 119_900, "L-pps": 119_900, "synt": 62_300, "synt-cur": 29_900}

Metric = Literal["clip_score", "cmmd"]
COUNTERPART: dict[Metric, str] = {"clip_score": "CLIP", "cmmd": "FID"}
"""Our metric and the paper's: both sides' CLIP score; CMMD for FID, each a distance of drawn pictures from real ones."""
HIGHER_IS_BETTER = {"clip_score": True, "recall_at_1": True, "cmmd": False, "fid_judge": False}
SAME = {"CLIP": 0.0011, "FID": 0.1}
"""Differences of the paper up to these are taken for none: it prints CLIP with three digits and gives no intervals."""


@dataclass(frozen=True)
class TableRow:
    """One line of a table: what the student learned from in each phase."""

    name: str
    adapt: tuple[str, ...]
    """Data sets of phase 1; none is the bare cut from the teacher."""
    distill: tuple[str, ...] = ()
    """Data sets of phase 2; a row without is of Table 2."""
    paper: dict[int, dict[str, float]] = field(default_factory=dict)
    """Denoising steps to the paper's figures."""

    @property
    def table(self) -> int:
        return 3 if self.distill else 2

    @property
    def changes(self) -> Mapping[str, Any]:
        """How phase 2 departs from the protocol: not at all."""
        return {}

    @property
    def steps(self) -> tuple[int, ...]:
        return (4, 2, 1) if self.distill else (25,)


def _row(
    adapt: str, distill: str = "", fid: float = 0.0, clip: float = 0.0, two: dict[str, float] | None = None
) -> TableRow:
    parts = [tuple(part.split("+")) if part not in ("", "none") else () for part in (adapt, distill)]
    name = f"3/{adapt}/{distill}" if distill else f"2/{adapt}"
    paper = {4 if distill else 25: {"FID": fid, "CLIP": clip}}
    return TableRow(name, parts[0], parts[1], paper | ({2: two} if two else {}))


ROWS = (
    _row("L-orig", fid=21.66, clip=0.278),
    _row("L-pp", fid=20.98, clip=0.278),
    _row("L-pps", fid=21.65, clip=0.283),
    _row("L-pps+synt", fid=23.37, clip=0.288),
    _row("L-pps+synt-cur", fid=23.34, clip=0.287),
    _row("synt", fid=25.14, clip=0.288),
    _row("synt-cur", fid=26.15, clip=0.287),
    _row("none", "L-pps+synt", 22.06, 0.262),
    _row("L-orig", "L-orig", 25.03, 0.254),
    _row("L-pp", "L-pp", 24.48, 0.254),
    _row("L-pps", "L-pps", 21.99, 0.266),
    _row("L-pps+synt", "L-pps+synt", 19.33, 0.276),
    _row("L-pps+synt-cur", "L-pps+synt-cur", 20.07, 0.273),
    _row("synt", "synt", 19.91, 0.272),
    _row("synt-cur", "synt-cur", 20.21, 0.270),
    _row("synt-cur", "L-pps+synt", 19.34, 0.272, two={"FID": 20.47, "CLIP": 0.268}),
)
"""SD-v1.4's row of Table 2 is left out: the miniature has one teacher."""
EDGEFUSION = "3/synt-cur/L-pps+synt"


@dataclass(frozen=True)
class Comparison:
    """Two cells of the tables, (row, steps) each, and what the comparison is about."""

    about: str
    one: tuple[str, int]
    other: tuple[str, int]


def _pair(about: str, one: str, other: str) -> Comparison:
    steps = 4 if one.startswith("3/") else 25
    return Comparison(about, (one, steps), (other, steps))


COMPARISONS = (
    _pair("duplicates and small pictures out, better crops", "2/L-pp", "2/L-orig"),
    _pair("captions written anew", "2/L-pps", "2/L-pp"),
    _pair("drawn pictures added to real ones", "2/L-pps+synt", "2/L-pps"),
    _pair("drawn pictures instead of raw ones", "2/synt", "2/L-orig"),
    _pair("curation of drawn pictures", "2/synt-cur", "2/synt"),
    _pair("duplicates and small pictures out, better crops", "3/L-pp/L-pp", "3/L-orig/L-orig"),
    _pair("captions written anew", "3/L-pps/L-pps", "3/L-pp/L-pp"),
    _pair("drawn pictures added to real ones", "3/L-pps+synt/L-pps+synt", "3/L-pps/L-pps"),
    _pair("drawn pictures instead of raw ones", "3/synt/synt", "3/L-orig/L-orig"),
    _pair("curation of drawn pictures", "3/synt-cur/synt-cur", "3/synt/synt"),
    _pair("phase 1 before phase 2", EDGEFUSION, "3/none/L-pps+synt"),
    _pair("EdgeFusion's data against raw data", EDGEFUSION, "3/L-orig/L-orig"),
    _pair("phase 1 on curated data, then phase 2 on all", EDGEFUSION, "3/L-pps+synt/L-pps+synt"),
    Comparison("EdgeFusion with 4 steps against 2", (EDGEFUSION, 4), (EDGEFUSION, 2)),
)


def row_named(name: str) -> TableRow:
    return next(row for row in ROWS if row.name == name)
