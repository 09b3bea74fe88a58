"""Proposed sizes in words, with what can be pasted into the recipe."""

from __future__ import annotations

import yaml

from factory.sizes import Proposal


def lines(proposal: Proposal) -> list[str]:
    """In words, with what can be pasted into the recipe."""
    if not proposal.steps:
        return ["sizes: as they stand no stage waits for another", *(f"  {note}" for note in proposal.notes)]
    told = [f"sizes for {proposal.gpus} GPUs or workers of this kind, changed one after the other (hours of make):"]
    told.append(f"  {'as the recipe stands':44} {_aligned(proposal.hours)}{_money(proposal.cost)}")
    for step in proposal.steps:
        what = f"{step.key.removeprefix('factory.make.')} {step.before} -> {step.after}"
        told.append(f"  {what:44} {_aligned(step.hours)}{_money(step.cost)}")
    told += [f"  then {proposal.limit} sets the pace", *(f"  {note}" for note in proposal.notes)]
    told += ["to paste into the recipe:", *yaml.safe_dump(proposal.tree(), sort_keys=False).rstrip().splitlines()]
    told.append("or: " + " ".join(f"--set {step.key}={step.after}" for step in proposal.steps))
    return told


def _money(cost: float | None) -> str:
    return "" if cost is None else f"  cost {cost:,.2f}"


def span(hours: float) -> str:
    """`90 s`, `47 min` or `12.5 h`."""
    return f"{hours * 3600:,.0f} s" if hours < 1 / 30 else f"{hours * 60:,.0f} min" if hours < 2 else f"{hours:,.1f} h"


def _aligned(hours: float) -> str:
    number, unit = span(hours).split()
    return f"{number:>8} {unit:3}"
