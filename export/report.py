"""`report.html`: one self-contained page that shows what a run did, from the files the run left behind."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.storage import publish_bytes
from cluster.usage import files_of_usage, read_usage, spell_usage
from export.bundle import read_bundle
from export.handover import doors
from export.pages import png_url
from factory.index import load_columns
from factory.ledger import ENTRY, read_entry, read_pictures
from factory.select import DEAD, KEPT, REJECTED, SELECTION
from factory.stages import decode_picture
from factory.units import plan_units
from factory.views import MAIN, list_views
from trainer.looks import read_looks
from trainer.options import PHASES
from trainer.state import read_log
from trainer.trained_on import read_data

_SHOWN, _DEAD = 24, 50
_LOOKS = 6
_ENDS_STEPS = 10
"""Steps over which the loss at either end of a phase is a mean."""


def write_report(out: Path, facts: dict[str, Any]) -> Path:
    """Write `out/report.html`; parts of the run that are not there yet are left out."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    template = Environment(
        loader=FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "cluster"]),
        autoescape=select_autoescape(default=True),
    ).get_template("report.html.j2")
    page = template.render(
        facts=facts,
        recipe=facts["recipe"],
        recipe_text=json.dumps(facts["recipe"], indent=2, ensure_ascii=False),
        total_seconds=sum(facts["seconds"].values()),
        cut_off=_cut_off(facts),
        busy=_busy(facts),
        **_data_part(out, facts),
        training=_training_part(out / "training"),
        trained_on=_trained_on(facts["recipe"]["trainer"]),
        skipped=_skipped_part(out / "training"),
        samples=_samples_part(out / "samples"),
        bundles=_bundle_part(out / "export"),
        doors=doors(out),
    )
    publish_bytes(out / "report.html", page.encode())
    return out / "report.html"


def _cut_off(facts: dict[str, Any]) -> int:
    """Steps whose seconds are in no sum: starts that were stopped or killed in them, and the one that may still be at it."""
    under_way = facts.get("under_way", "report") != "report"  # the report itself is under way while it is written
    return sum(facts.get("cut_off", {}).values()) + under_way


def _busy(facts: dict[str, Any]) -> float | None:
    """Processes a core before pictures and builds were timed, if that is more than the run's own training leaves behind."""
    load = max((facts.get("load", {}).get(step, 0.0) for step in ("samples", "export")), default=0.0)
    return load if load > 2.5 else None


def _data_part(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Kept and rejected pictures with scores and reasons, the score histogram, dead letters. Of the ledger only columns and what is shown is read."""
    data = out / "dataset"
    if not (data / SELECTION).exists():
        return {
            "kept": [],
            "rejected": [],
            "dead": [],
            "histogram": None,
            "selections": {},
            "differs": {},
            "further": {},
            "asked": {},
        }
    import pyarrow.parquet as pq

    unit_images = facts["recipe"]["factory"]["make"]["unit_images"]
    columns = load_columns(data, unit_images)
    table = pq.read_table(data / SELECTION, columns=["outcome"])  # in the order of the plan, as the columns are
    outcome = np.asarray(table["outcome"].to_numpy())
    kept, rejected = outcome == KEPT, outcome == REJECTED
    rules = facts["recipe"]["factory"]["select"]
    shown = [np.flatnonzero(kept)[:_SHOWN], np.flatnonzero(rejected)[:_SHOWN], np.flatnonzero(outcome == DEAD)[:_DEAD]]
    rows = _rows(data, unit_images, np.concatenate(shown))
    reasons = pq.read_table(data / SELECTION, columns=["reason"])["reason"]
    wanted = {rows[i]["id"] for i in [*shown[0].tolist(), *shown[1].tolist()]}
    units = {row["unit"]: row["pictures_sha256"] for row in rows.values() if row["id"] in wanted}
    pictures = {key: picture for unit in units.items() for key, picture in read_pictures(data, *unit) if key in wanted}

    def card(number: int) -> dict[str, Any]:
        row = rows[number]
        return {
            "picture": png_url(decode_picture(pictures[row["id"]])) if row["id"] in pictures else "",
            "prompt": row["prompt"],
            "score": row["clip_score"],
            "reason": reasons[number].as_py(),
        }

    scores = {name: (values[kept], values[rejected]) for name, values in columns.scores.items()}
    names = [n for n in sorted(scores) if n not in ENTRY.names and not np.isnan(columns.scores[n]).all()]
    return {
        "kept": [card(i) for i in shown[0].tolist()],
        "rejected": [card(i) for i in shown[1].tolist()],
        "asked": {what: told for what in ("plan", "captions") if (told := _asked(data / what))},
        "dead": [{"prompt": rows[i]["prompt"], "reason": reasons[i].as_py()} for i in shown[2].tolist()],
        "selections": (selections := list_views(data)),
        "differs": {
            name: _differs(found["rules"], selections.get("", found)["rules"]) for name, found in selections.items()
        },
        "histogram": _histogram(*scores["clip_score"], "CLIP cosine of picture and prompt", rules["min_clip"]),
        "further": {name: _further(scores[name], name, rules["scores"].get(name, {})) for name in names},
    }


def _trained_on(trainer: dict[str, Any]) -> dict[str, str]:
    """Selections of the run's own data set that the student saw, and when: `trained on`, or `trained on in phase 1` where the phases differ."""
    seen: dict[str, list[str]] = {}
    ran = [phase for phase in PHASES if trainer.get(phase, {}).get("steps", 1)]
    for phase in ran:
        data = trainer.get(phase, {}).get("data") or trainer
        if data.get("own_weight") != 0:
            seen.setdefault(data.get("own_view") or MAIN, []).append(str(PHASES.index(phase) + 1))
    return {
        name: "trained on" + (f" in phase {phases[0]}" if len(phases) < len(ran) else "")
        for name, phases in seen.items()
    }


def _differs(rules: dict[str, Any], main: dict[str, Any]) -> str:
    """`text raw, min_clip -1`: what a view's rules say otherwise than the main selection's."""
    return ", ".join(f"{key} {rules[key]}" for key in rules if rules[key] != main.get(key))


def _asked(folder: Path) -> str:
    usage = read_usage(files_of_usage(folder))
    return spell_usage(usage) if usage.answers else ""


def _rows(data: Path, unit_images: int, numbers: np.ndarray) -> dict[int, dict[str, Any]]:
    """The ledger's rows with these numbers in the plan; only their units are opened."""
    found: dict[int, dict[str, Any]] = {}
    wanted, start = np.unique(numbers), 0
    for unit, ids in plan_units(data, unit_images):
        own = wanted[(wanted >= start) & (wanted < start + len(ids))]
        entry = read_entry(data, unit) if len(own) else []
        found |= {number: entry[number - start] for number in own.tolist()}
        start += len(ids)
    return found


def _further(values: tuple[np.ndarray, np.ndarray], name: str, rule: dict[str, Any]) -> str:
    bounds = [bound for key in ("least", "most") if (bound := rule.get(key)) is not None]
    return _histogram(*values, name, *bounds)


def _training_part(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for phase, title in (("adapt", "Phase 1, adapt: feature distillation"), ("distill", "Phase 2, distill: LCM")):
        rows = read_log(folder / phase / "metrics.jsonl")
        if rows:
            found.append(
                {
                    "title": title,
                    "steps": rows[-1]["step"],
                    "first": _mean_loss(rows[:_ENDS_STEPS]),
                    "last": _mean_loss(rows[-_ENDS_STEPS:]),
                    "ends": min(_ENDS_STEPS, len(rows)),
                    "rate": rows[-1]["images_per_s"],
                    "plot": _curve(rows),
                    "looks": _looks(folder / phase),
                    "data": [fact for fact in read_data(folder) if fact.get("phase", phase) == phase],
                }
            )
    return found


def _mean_loss(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([row["loss"] for row in rows]))


def _looks(folder: Path) -> list[dict[str, Any]]:
    """Up to `_LOOKS` of the pictures drawn on the way, evenly spread, the first and the last among them."""
    looks = read_looks(folder)
    chosen = sorted({round(i * (len(looks) - 1) / (_LOOKS - 1)) for i in range(_LOOKS)}) if looks else []
    return [
        {"step": looks[i].step, "scores": looks[i].scores, "sheet": png_url(np.asarray(Image.open(looks[i].sheet)))}
        for i in chosen
    ]


def _skipped_part(folder: Path) -> list[dict[str, Any]]:
    """Samples that training could not read: data set, shard, key, reason."""
    return [{"data": fact["data"], **row} for fact in read_data(folder) for row in fact.get("skipped", [])]


def _samples_part(folder: Path) -> dict[str, Any] | None:
    if not (folder / "samples.json").exists():
        return None
    facts = json.loads((folder / "samples.json").read_text())
    rows = [{**row, "sheet": _inline(folder / f"{row['name']}.png")} for row in facts["rows"]]
    return {"judge": facts.get("judge", "the filter"), "prompts": facts["prompts"], "rows": rows}


def _bundle_part(folder: Path) -> list[dict[str, Any]]:
    places = sorted(p.parent for p in folder.glob("*/bundle.json"))
    return [{**read_bundle(place), "sheet": _inline(place / "parity.png")} for place in places]


def _histogram(kept: np.ndarray, rejected: np.ndarray, label: str, *thresholds: float) -> str:
    """`kept` and `rejected`: a score of each such row, NaN where it has none."""
    scores = [values[~np.isnan(values)] for values in (kept, rejected)]

    def draw(axes: Any) -> None:
        axes.hist(scores, bins=40, stacked=True, color=["#2a9d8f", "#e76f51"], label=["kept", "rejected"])
        for threshold in thresholds:
            axes.axvline(threshold, color="#666", linestyle="--", label=f"threshold {threshold:g}")
        axes.set_xlabel(label)
        axes.set_ylabel("pictures")
        axes.legend(frameon=False)

    return _plot(draw)


def _curve(rows: list[dict[str, Any]]) -> str:
    steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
    width = max(1, len(losses) // 12)
    smooth = np.convolve(np.pad(losses, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")

    def draw(axes: Any) -> None:
        axes.plot(steps, losses, color="#2a9d8f", alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color="#2a9d8f", linewidth=2)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss")

    return _plot(draw)


def _plot(draw: Callable[[Any], None]) -> str:
    """A plot as an inline SVG image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(sink.getvalue()).decode()


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.exists() else ""
