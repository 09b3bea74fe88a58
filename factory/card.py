"""The data card: README.md with a grid, the funnel, balance and provenance, and Croissant metadata, beside the shards.

Both are written from what the folder holds, so they can be written anew at any time; the same data set gives the same bytes.
"""

from __future__ import annotations

import io
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.storage import publish_bytes
from factory.croissant import croissant
from factory.pack import MANIFEST, manifest_shards, read_shard
from factory.provenance import Part, provenance
from factory.recipe import FactoryRecipe
from factory.select import SUMMARY
from factory.stages import decode_picture

CARD, GRID, CROISSANT = "README.md", "card-samples.png", "croissant.json"
_SHOWN, _ACROSS, _EDGE = 48, 12, 96
_BALANCE_VALUES = 12


@dataclass
class _Facts:
    """What the card says of the samples: numbers and counts, never the samples."""

    count: int = 0
    clip: array[float] = field(default_factory=lambda: array("d"))
    """Of those that were looked at: the centre of a source that no text chose has none."""
    scores: dict[str, array[float]] = field(default_factory=dict)
    attributes: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, facts: dict[str, Any]) -> None:
        """The `json` of a sample."""
        self.count += 1
        self.clip.extend([] if facts["clip_score"] is None else [facts["clip_score"]])
        for name, value in facts.get("scores", {}).items():
            self.scores.setdefault(name, array("d")).extend([] if value is None else [value])
        for key, value in facts.get("attributes", {}).items():
            self.attributes.setdefault(key, Counter())[str(value)] += 1


def write_card(folder: Path, recipe: FactoryRecipe, funnel: dict[str, Any], name: str) -> Path:
    """Write README.md, card-samples.png and croissant.json of the packed data set in `folder`; returns the README's path."""
    shards = manifest_shards(folder)
    facts, pictures = _read(folder, list(shards))
    publish_bytes(folder / GRID, _grid(pictures))
    publish_bytes(
        folder / CROISSANT,
        (json.dumps(croissant(folder, shards, facts.count, name, recipe), indent=2) + "\n").encode(),
    )
    publish_bytes(folder / CARD, _readme(folder, len(shards), facts, recipe, funnel, name).encode())
    return folder / CARD


def _read(folder: Path, shards: Sequence[str]) -> tuple[_Facts, list[np.ndarray]]:
    """Facts of all samples, and the first pictures of each shard for the grid. One sample lies in memory."""
    facts, pictures = _Facts(), list[np.ndarray]()
    each = -(-_SHOWN // max(1, len(shards)))
    for shard in shards:
        for place, (_, members) in enumerate(read_shard(folder / shard)):
            facts.add(json.loads(members["json"]))
            if place < each and len(pictures) < _SHOWN:
                pictures.append(decode_picture(next(v for k, v in members.items() if k not in ("json", "txt"))))
    return facts, pictures


def _grid(pictures: list[np.ndarray]) -> bytes:
    down = max(1, -(-len(pictures) // _ACROSS))
    sheet = Image.new("RGB", (_ACROSS * _EDGE, down * _EDGE), "white")
    for i, picture in enumerate(pictures):
        small = Image.fromarray(picture).resize((_EDGE - 2, _EDGE - 2), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % _ACROSS * _EDGE + 1, i // _ACROSS * _EDGE + 1))
    sink = io.BytesIO()
    sheet.save(sink, format="PNG")
    return sink.getvalue()


def _readme(folder: Path, shards: int, facts: _Facts, recipe: FactoryRecipe, funnel: dict[str, Any], name: str) -> str:
    count = facts.count
    drawn, parts = bool(recipe.make.painters()), provenance(recipe, folder)
    text = [
        "---",
        f"pretty_name: {name}",
        "task_categories: [text-to-image]",
        "annotations_creators: [machine-generated]",
        f"size_categories: [{_size(count)}]",
        f"tags: [{'synthetic, ' if drawn else ''}webdataset, edgefusion]",
        "---",
        "",
        f"# {name}",
        "",
        f"{count:,} {'AI-generated' if drawn else 'real'} pictures with texts in {shards} WebDataset shards, made by EdgeFusion Factory.",
        "",
        f"![{min(count, _SHOWN)} samples]({GRID})",
        "",
        "## From plan to shards",
        "",
        "| | samples |",
        "|---|---:|",
        *(f"| {what} | {funnel[what]:,} |" for what in ("planned", "kept", "rejected", "dead")),
        *(f"| {reason.replace('|', '/')} | {count:,} |" for reason, count in funnel["reasons"].items()),
        "",
        "planned = kept + rejected + dead. "
        f"CLIP score of what is kept{_of_how_many(facts)}: {_spread(facts.clip)} (median, 5% and 95% quantile; by the filter's own CLIP).",
        "",
        *_scores(facts.scores),
        *_balance(facts.attributes),
        *_before_and_after(folder),
        "## Provenance",
        "",
        "| part | model or source | revision or digest | licence |",
        "|---|---|---|---|",
        *(f"| {p.part} | `{p.name}` | {f'`{p.mark}`' if p.mark else ''} | {_linked(p)} |" for p in parts),
        "",
        _licences(parts),
        "",
        "## Load it",
        "",
        "```python",
        "import webdataset",
        f'samples = webdataset.WebDataset("shard-{{000000..{max(0, shards - 1):06d}}}.tar", shardshuffle=False).decode("pil")',
        "",
        "from datasets import load_dataset",
        'samples = load_dataset("webdataset", data_files="shard-*.tar", split="train")',
        "```",
        "",
        f"`{MANIFEST}` has a row a sample: id, shard, prompt, SHA-256 of the sample and of its shard. `edgefusion factory verify` proves it.",
        "",
    ]
    return "\n".join(text)


def _licences(parts: list[Part]) -> str:
    """What binds whoever uses the data set, and what nobody said."""
    lacking = list(dict.fromkeys(one.name for one in parts if not one.licence))
    bound = "These licences, of the models and of the sources, bind this data set too."
    if not lacking:
        return bound
    names = ", ".join(f"`{name}`" for name in lacking)
    return f"{bound} Not known is that of {names}: name it in `factory.sources` of the recipe and run that again before you publish."


def _linked(one: Part) -> str:
    return f"[{one.licence or 'its page'}]({one.url})" if one.url else one.licence or "not known"


def _balance(counts: dict[str, Counter[str]]) -> list[str]:
    """How often each value of each attribute is among the kept; long lists by their ends."""
    if not counts:
        return []
    lines = ["## Balance of what is kept", "", "| attribute | values |", "|---|---|"]
    for key in sorted(counts):
        ordered = sorted(counts[key].items(), key=lambda item: (-item[1], item[0]))
        shown = ordered if len(ordered) <= _BALANCE_VALUES else [*ordered[:5], *ordered[-5:]]
        text = ", ".join(f"{value} {count}" for value, count in shown)
        more = f" (5 most and 5 least frequent of {len(ordered)})" if len(shown) < len(ordered) else ""
        lines.append(f"| {key} | {text}{more} |")
    return [*lines, ""]


def _before_and_after(folder: Path) -> list[str]:
    """What select did to balance and variety, by the summary beside the selection."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except FileNotFoundError:
        return []
    even = [(n, f["evenness_planned"], f["evenness_kept"]) for n, f in summary["balance"].items()]
    rows = [f"evenness of {name} | {before} | {after}" for name, before, after in even if after is not None]
    varied = summary["diversity"]
    if varied["vendi_kept"] is not None:
        rows.append(f"Vendi score of {varied['pictures']:,} pictures | {varied['vendi_made']} | {varied['vendi_kept']}")
    if not rows:
        return []
    return [
        "## Before and after the selection",
        "",
        "| | planned or made | kept |",
        "|---|---:|---:|",
        *(f"| {row} |" for row in rows),
        "",
        "Evenness: 1 when every value comes up equally often. Vendi score: the effective number of different pictures, by the filter's CLIP.",
        "",
    ]


def _scores(values: dict[str, array[float]]) -> list[str]:
    """The further scores of what is kept."""
    if not values:
        return []
    rows = [f"| {name} | {_spread(found)} | {len(found):,} |" for name, found in sorted(values.items())]
    return ["| score | median, 5% and 95% quantile | pictures |", "|---|---|---:|", *rows, ""]


def _of_how_many(facts: _Facts) -> str:
    judged = len(facts.clip)
    return "" if judged == facts.count else f", of the {judged:,} whose crop was judged"


def _spread(scores: array[float]) -> str:
    if not scores:
        return "none"
    low, middle, high = np.percentile(scores, [5, 50, 95])
    return f"{middle:.3f}, {low:.3f} and {high:.3f}"


def _size(count: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if count < bound), "n>1M")
