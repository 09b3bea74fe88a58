"""What servers that charge were asked in a probe, and what they will charge for the whole run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.usage import Usage, files_of_usage, read_usage, spell_usage
from factory.recipe import FactoryRecipe, OpenAiCaptioner, OpenAiWriter
from factory.stages import CAPTIONS


@dataclass(frozen=True)
class Charge:
    """What one of the recipe's servers answered."""

    who: str
    usage: Usage
    of_a_sample: float | None
    """In the currency of the recipe's prices; None where there are none."""


def charges(recipe: FactoryRecipe, folder: Path, samples: int, captioned: int) -> tuple[Charge, ...]:
    """Of a data set of so many samples, of which so many came to be captioned. A prompt that was written anew was paid anew; what the
    captioner was asked to warm up is not in a sample's price."""
    found: list[Charge] = []
    if recipe.plan.kind == "written" and isinstance(recipe.plan.writer, OpenAiWriter):
        usage = read_usage(files_of_usage(folder / "plan"))
        found.append(Charge("writer", usage, None if usage.cost is None else usage.cost / samples))
    if isinstance(recipe.make.captioner, OpenAiCaptioner):
        usage = read_usage(files_of_usage(folder / CAPTIONS))
        each = None if usage.cost is None else usage.cost / max(usage.answers, 1)
        found.append(Charge("captioner", usage, None if each is None else each * captioned / samples))
    return tuple(found)


def total(found: tuple[Charge, ...], samples: int) -> float | None:
    """What so many samples cost; None where no server is asked that has a price."""
    costs = [one.of_a_sample * samples for one in found if one.of_a_sample is not None]
    return sum(costs) if costs else None


def probe_lines(found: tuple[Charge, ...]) -> list[str]:
    """What the probe itself asked, and what of it nobody can price."""
    told: list[str] = []
    for one in found:
        unpriced = "; price_input and price_output are not in the recipe" if one.of_a_sample is None else ""
        told.append(f"  asked by the {one.who}, and charged for by whoever runs it: {spell_usage(one.usage)}{unpriced}")
    return told


def run_lines(found: tuple[Charge, ...], samples: int) -> list[str]:
    """What the whole run will be charged."""
    cost = total(found, samples)
    whose = " and ".join(one.who for one in found if one.of_a_sample is not None)
    return [] if cost is None else [f"  servers cost {cost:,.2f} by the tokens of the {whose}, beside the workers"]
