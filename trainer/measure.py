"""How good models are, on one set of prompts and seeds: pictures drawn once and kept, a judge's embeddings, metrics with intervals.

A picture is a function of its model's digest, prompt, seed and sampler settings; batches are always the same ones, filled up, so what
was drawn before an interruption is what would have been drawn.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from rich.table import Table

from cluster.errors import EdgeFusionError, RecipeError
from cluster.storage import publish_bytes
from factory.models import fingerprint, quiet
from factory.models.clip import Clip
from factory.recipe import OpenClipScorer
from trainer.attributes import Asked, agreement, ask
from trainer.fidelity import FEATURES, SPLITS, Inception, fidelity, require_fidelity
from trainer.judge import Judge, Tick
from trainer.judging import EvaluateRecipe, check_data
from trainer.metrics import Interval, clip_scores, cmmd_interval, frechet_interval, mean_interval, recall_hits
from trainer.models import open_pipeline
from trainer.prompts import read_prompts
from trainer.sample import generate, is_few_step, on_gpu, student_guidance
from trainer.stream import EndlessOrder, open_samples

REPORT = "evaluation.json"
METRICS = {
    "recall_at_1": "R@1 ↑",
    "clip_score": "CLIP ↑",
    "cmmd": "CMMD ↓",
    "fid_judge": "FID of judge ↓",
    "fid": "FID ↓",
    "inception_score": "IS ↑",
}
_WITHOUT_ATTRIBUTES = "no prompt says an attribute that the data set records; give --data, or set attribute_words"
_NOT_ASKED = "not asked for; --fidelity needs torch-fidelity"
_NO_REFERENCES = "no reference pictures; give --data"
_FEWEST_REFERENCES = 2048
log = logging.getLogger("edgefusion")


@dataclass(frozen=True)
class Questions:
    """The prompts, and the pictures that real answers would look like, if there are any."""

    prompts: list[str]
    references: list[Callable[[], np.ndarray]]
    """H x W x 3 uint8, read when called; the first ones belong to the prompts if `paired`."""
    paired: bool
    key: str | None = None
    """What makes these references these."""
    records: list[dict[str, str]] | None = None
    """What each prompt was asked for, by attribute, where the data set says so."""


def evaluate(recipe: EvaluateRecipe, folder: Path, tick: Tick = lambda what, done, of: None) -> dict[str, Any]:
    """Draw, judge and compare `recipe.models`; writes `folder/evaluation.json` and returns it. Run again to go on.

    A metric without what it needs is None and says so under `absent`; none is replaced by another. What was asked for and will be
    absent, and what a reader of the figures must know (`notes`), is also told before the hours of drawing. Raises TargetUnavailable
    if `fidelity` is asked for and its package is not there, before anything is drawn.
    """
    if recipe.fidelity:
        require_fidelity()
    torch.set_num_threads(recipe.threads)
    quiet()
    questions = read_questions(recipe)
    if questions.references and min(len(questions.prompts), len(questions.references)) < 2:
        raise RecipeError(
            "one prompt, or one reference picture, has no spread that could be compared",
            where=recipe.prompts or str(recipe.data),
            remedy="Give two or more of each, or leave --data out",
        )
    among = min(recipe.among, len(questions.prompts))
    absent, notes = _absent(recipe, questions), _notes(recipe, questions)
    told_of = {METRICS[name].rsplit(" ", 1)[0]: why for name, why in absent.items() if why != _NOT_ASKED}
    for told in [*(f"there will be no {name}: {why}" for name, why in told_of.items()), *notes]:
        log.warning("%s", told)
    clip = Clip(
        OpenClipScorer(model=recipe.judge, pretrained=recipe.judge_pretrained, allow_pickle=recipe.allow_pickle)
    )
    judge = Judge(clip, _judge_digest(recipe), folder, recipe.judge_px)
    inception = Inception(recipe.fidelity_px) if recipe.fidelity else None
    of_inception = Judge(inception, inception.digest, folder) if inception else None
    texts = clip.texts(questions.prompts)
    real = (
        judge.embed("references: judging", questions.references, questions.key, tick) if questions.references else None
    )
    real_of_inception = (
        of_inception.embed("references: Inception", questions.references, questions.key, tick)
        if of_inception and questions.references
        else None
    )
    asked = ask(questions.prompts, questions.records, recipe.attribute_words) if questions.records else {}
    rows: list[dict[str, Any]] = []
    if real is not None and questions.paired:
        own = real[: len(texts)]
        row = {"model": "the data set's own pictures", "steps": None, **measure(own, texts, None, among)}
        rows.append(row | read_attributes(asked, own, clip))
    for model in recipe.models:
        pipeline, plans = prepare(model, recipe)
        for steps, guidance in plans:
            pictures = draw(model, pipeline, questions.prompts, steps, guidance, recipe, folder, tick)
            readers = [lambda path=path: _read(path) for path in pictures]
            keys = hashlib.sha256("".join(path.stem for path in pictures).encode()).hexdigest()
            made = judge.embed(f"{model}, {steps} steps: judging", readers, keys, tick)
            row = {"model": model, "digest": fingerprint(model), "steps": steps, "guidance": guidance}
            row |= measure(made, texts, real, among) | read_attributes(asked, made, clip)
            if of_inception:
                seen = of_inception.embed(f"{model}, {steps} steps: Inception", readers, keys, tick)
                row |= {name: _rounded(found) for name, found in fidelity(seen, real_of_inception).items()}
            rows.append(row)
    report = {
        "protocol": recipe.model_dump(mode="json"),
        "prompts": len(questions.prompts),
        "among": among,
        "references": len(questions.references),
        "judge": judge.digest,
        "interval": "95%, bootstrap over pictures",
        "notes": notes,
        "absent": absent | ({} if asked else {"attributes": _WITHOUT_ATTRIBUTES}),
        "rows": rows,
    }
    publish_bytes(folder / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report


def measure(
    pictures: np.ndarray, texts: np.ndarray, real: np.ndarray | None, among: int
) -> dict[str, dict[str, float] | None]:
    """Every metric of picture embeddings N x D, their texts N x D and reference pictures M x D, as value, low and high."""
    found: dict[str, Interval | None] = {
        "recall_at_1": mean_interval(recall_hits(pictures, texts, among)),
        "clip_score": mean_interval(clip_scores(pictures, texts)),
        "cmmd": None if real is None else cmmd_interval(pictures, real),
        "fid_judge": None if real is None else frechet_interval(pictures, real),
    }
    return {name: _rounded(interval) for name, interval in found.items()}


def read_attributes(asked: dict[str, Asked], pictures: np.ndarray, clip: Clip) -> dict[str, Any]:
    """`attributes`: by attribute the share of pictures that agree with their prompt, its interval, how many were asked, and chance."""
    return {
        "attributes": {
            key: {**{k: round(v, 5) for k, v in share._asdict().items()}, "asked": count, "chance": round(chance, 5)}
            for key, (share, count, chance) in agreement(asked, pictures, clip.texts).items()
        }
    }


def draw(
    model: str,
    pipeline: Any,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    recipe: EvaluateRecipe,
    folder: Path,
    tick: Tick,
) -> list[Path]:
    """The PNG of each prompt by `pipeline`, which is `model` opened, below `folder/pictures`; those that are there are kept."""
    digest = fingerprint(model)
    place = folder / "pictures" / digest[:16]
    sampler = type(pipeline.scheduler).__name__
    seeds = [recipe.seed + i for i in range(len(prompts))]
    facts = [[digest, prompt, seed, sampler, steps, guidance] for prompt, seed in zip(prompts, seeds, strict=True)]
    paths = [place / f"{hashlib.sha256(json.dumps(fact).encode()).hexdigest()}.png" for fact in facts]
    batch = recipe.batch_images
    for start in range(0, len(paths), batch):
        rows = list(range(start, min(start + batch, len(paths))))
        if not all(paths[row].exists() for row in rows):
            full = rows + [rows[-1]] * (batch - len(rows))
            made = generate(pipeline, [prompts[r] for r in full], [seeds[r] for r in full], steps, guidance, batch)
            for row, picture in zip(rows, made, strict=False):
                sink = io.BytesIO()
                Image.fromarray(picture).save(sink, "PNG")
                publish_bytes(paths[row], sink.getvalue())
        tick(f"{model}, {steps} steps: drawing", rows[-1] + 1, len(paths))
    return paths


def read_questions(recipe: EvaluateRecipe) -> Questions:
    """`count` prompts of different meaning and the reference pictures, in an order that only the seed decides.

    Raises RecipeError if there is nothing to ask.
    """
    if recipe.prompts:
        prompts = list(dict.fromkeys(read_prompts(recipe.prompts)))
        random.Random(recipe.seed).shuffle(prompts)
        prompts = prompts[: recipe.count]
    else:
        prompts = []
    if recipe.data is None:
        return Questions(prompts, [], paired=False)
    check_data(Path(recipe.data), recipe.prompts)
    stream = open_samples(Path(recipe.data))
    order = EndlessOrder(len(stream), recipe.seed).batch(0, len(stream))
    asked: list[int] = []
    records: list[dict[str, str]] = []
    if not recipe.prompts:
        seen: set[str] = set()
        for row in order:
            if len(asked) == recipe.count:
                break
            # Two sentences for one thing would be each other's rivals: where the plan's attributes are kept, they decide.
            example = stream.read(row)
            meaning = json.dumps(example.facts.get("attributes") or example.prompt, sort_keys=True)
            if meaning not in seen:
                seen.add(meaning)
                asked.append(row)
                prompts.append(example.prompt)
                records.append({k: str(v) for k, v in (example.facts.get("attributes") or {}).items()})
    taken = set(asked)
    rows = [*asked, *(row for row in order if row not in taken)][
        : max(recipe.references or max(_FEWEST_REFERENCES, recipe.count), len(asked))
    ]
    readers = [lambda row=row: stream.read(row).pixels() for row in rows]
    key = f"{stream.digest()} {rows}"
    return Questions(prompts, readers, paired=not recipe.prompts, key=key, records=records if any(records) else None)


def table(report: dict[str, Any]) -> Table:
    """The report for people: values with half-widths of their intervals."""
    title = f"{report['prompts']} prompts, R@1 among {report['among']}, {report['references']} reference pictures"
    shown = Table("model", "steps", title=title)
    names = [name for name in METRICS if any(row.get(name) for row in report["rows"])]
    for name in names:
        shown.add_column(METRICS[name], justify="right")
    attributes = list(dict.fromkeys(key for row in report["rows"] for key in row["attributes"]))
    for key in attributes:
        shown.add_column(f"{key} as asked ↑", justify="right")
    for row in report["rows"]:
        cells = [_cell(row.get(name)) for name in names] + [_cell(row["attributes"].get(key)) for key in attributes]
        shown.add_row(str(row["model"]), str(row["steps"] or ""), *cells)
    told = ["± is half of the 95% interval"]
    if report["absent"] or report["notes"]:
        reasons = dict.fromkeys(report["absent"].values())
        named = {why: [name for name, given in report["absent"].items() if given == why] for why in reasons}
        told += [*report["notes"], *(f"no {' and '.join(names)}: {why}" for why, names in named.items())]
    shown.caption = "; ".join(told)
    return shown


def _cell(found: dict[str, float] | None) -> str:
    if not found:
        return ""
    return f"{found['value']:.3f} ± {(found['high'] - found['low']) / 2:.3f}"


def _judge_digest(recipe: EvaluateRecipe) -> str:
    """What makes a judge this judge. A weight tag alone would not: `openai` is the tag of many models, and embeddings are kept by this."""
    if recipe.judge_pretrained is None:
        return fingerprint(recipe.judge)
    return f"{recipe.judge} {recipe.judge_pretrained}"


def prepare(model: str, recipe: EvaluateRecipe) -> tuple[Any, list[tuple[int, float]]]:
    """The opened pipeline and its (steps, guidance): a few-step student's, or those of a teacher with DPM++."""
    pipeline = on_gpu(open_pipeline(model, recipe.allow_pickle))
    if is_few_step(pipeline):
        return pipeline, [(steps, student_guidance(pipeline, recipe.teacher_guidance)) for steps in recipe.steps]
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline, [(recipe.teacher_steps, recipe.teacher_guidance)]


def _absent(recipe: EvaluateRecipe, questions: Questions) -> dict[str, str]:
    found: dict[str, str] = {}
    if not questions.references:
        found |= dict.fromkeys(("cmmd", "fid_judge"), _NO_REFERENCES)
    if not recipe.fidelity:
        return found | dict.fromkeys(("fid", "inception_score"), _NOT_ASKED)
    if not questions.references:
        found["fid"] = _NO_REFERENCES
    if len(questions.prompts) < SPLITS:
        found["inception_score"] = f"its {SPLITS} splits need as many pictures; raise --count"
    return found


def _notes(recipe: EvaluateRecipe, questions: Questions) -> list[str]:
    """What a reader must know to compare these figures with others."""
    made, real = len(questions.prompts), len(questions.references)
    found: list[str] = []
    if recipe.prompts and made < recipe.count:
        found.append(f"there are {made} different prompts, fewer than count ({recipe.count})")
    if 0 < real < made:
        found.append(f"{real} reference pictures stand against {made} drawn ones: FIDs fall with both numbers")
    if recipe.fidelity and 0 < min(made, real) < int(FEATURES):
        found.append(
            f"FID's covariances of {FEATURES} features rest on {min(made, real)} pictures and are not full: it compares with nothing of another number"
        )
    return found


def _rounded(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {key: round(value, 5) for key, value in interval._asdict().items()}


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise EdgeFusionError(f"cannot be read ({error})", where=str(path), remedy="Delete it and run again") from error
