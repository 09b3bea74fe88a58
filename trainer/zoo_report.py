"""`edgefusion zoo report`: every model of the zoo measured on the shipped evaluation set, by the judge that nothing else uses."""

from __future__ import annotations

import base64
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from cluster.machine import commit, machine_facts
from cluster.storage import publish_bytes
from factory.models import ZOO, fingerprint
from factory.models.clip import Clip
from factory.pocket.build import distinct_bytes
from factory.pocket.clip import CHOICES
from factory.pocket.evalset import Shown, read_evalset
from factory.pocket.grammar import sentence
from factory.recipe import OpenClipScorer
from trainer.metrics import clip_scores, cmmd, frechet_distance, mean_interval, recall_hits
from trainer.models import open_pipeline
from trainer.sample import contact_sheet, generate

TEACHER, STUDENT = "zoo:teacher", "zoo:student-fewstep"
TEACHER_STEPS, GUIDANCE = 25, 4.0
AMONG = 256
_GRID = 64

Say = Callable[[str], None]


def write_zoo_report(folder: Path, say: Say) -> dict[str, Any]:
    """Measure, then write `folder/report.html`, `report.json` and the grids; returns the figures.

    Drawn pictures are kept in `folder/pictures` by model, so a rerun after a kill draws only what is missing.
    """
    judge = Clip(OpenClipScorer(model="zoo:judge"))
    splits = {name: read_evalset(name) for name in ("trained", "compositions", "held-out")}
    say("drawing: teacher")
    drawn = {"teacher, 25 steps": _draw_all(TEACHER, TEACHER_STEPS, GUIDANCE, splits, folder, say)}
    for steps in (4, 2, 1):
        say(f"drawing: student, {steps} steps")
        drawn[f"student, {steps} step{'s' * (steps > 1)}"] = _draw_all(STUDENT, steps, 1.0, splits, folder, say)
    say("judging")
    figures: dict[str, Any] = {
        "commit": commit(),
        "machine": machine_facts(),
        "pictures": _judge_pictures(judge, splits, drawn),
        "attributes": _attributes(judge, splits, drawn),
        "clips": _clips(splits["held-out"], splits["trained"]),
        "autoencoder": _autoencoder(splits["held-out"]),
    }
    say("captioning")
    figures["captioner"] = _captioner(judge, splits)
    say("writing prompts")
    figures["writer"] = _writer()
    say("timing")
    figures["latency"] = _latency()
    figures["size_bytes"] = distinct_bytes(ZOO)
    figures["targets"] = _targets(figures)
    publish_bytes(folder / "report.json", (json.dumps(figures, indent=2) + "\n").encode())
    _write_page(folder, figures, splits, drawn)
    return figures


def _draw_all(
    model: str, steps: int, guidance: float, splits: dict[str, list[Shown]], folder: Path, say: Say
) -> dict[str, list[np.ndarray]]:
    """Pictures of every caption of the two drawn splits; the seed of caption i is i."""
    pipeline: Any = None
    found: dict[str, list[np.ndarray]] = {}
    for split in ("trained", "compositions"):
        name = f"{model.removeprefix('zoo:')}-{fingerprint(model)[:12]}-{steps}-{guidance:g}-{split}.npy"
        kept = folder / "pictures" / name
        if not kept.exists():
            if pipeline is None:
                pipeline = open_pipeline(model)
                if model == TEACHER:
                    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
            captions = [shown.caption for shown in splits[split]]
            pictures = generate(pipeline, captions, list(range(len(captions))), steps, guidance, batch=32)
            sink = io.BytesIO()
            np.save(sink, np.stack(pictures), allow_pickle=False)
            publish_bytes(kept, sink.getvalue())
        found[split] = list(np.load(kept, allow_pickle=False))
    return found


def _judge_pictures(
    judge: Clip, splits: dict[str, list[Shown]], drawn: dict[str, dict[str, list[np.ndarray]]]
) -> dict[str, Any]:
    """For each split, of the real pictures and of each model: R@1, CLIP score, CMMD and Frechet distance on the judge's features."""
    found: dict[str, Any] = {}
    for split in ("trained", "compositions"):
        texts = judge.texts([shown.caption for shown in splits[split]])
        real = judge.pictures([shown.picture for shown in splits[split]])
        found[split] = {}
        for name, pictures in {"real pictures": None, **drawn}.items():
            seen = real if pictures is None else judge.pictures(pictures[split])
            hits, scores = recall_hits(seen, texts, AMONG), clip_scores(seen, texts)
            found[split][name] = {
                "r1": float(hits.mean()),
                "r1_interval": mean_interval(hits)[1:],
                "clip": float(scores.mean()),
                "clip_interval": mean_interval(scores)[1:],
                "cmmd": cmmd(seen, real),
                "frechet": frechet_distance(seen, real),
            }
    return found


def read_attribute(judge: Clip, pictures: list[np.ndarray], records: list[dict[str, str]], key: str) -> np.ndarray:
    """Whether the judge, asked with every value of `key` in the same wording, picks the record's: N booleans."""
    values = [v for v in CHOICES[key] if not (key == "gender" and v == "person")]
    seen = judge.pictures(pictures)
    near = np.stack(
        [
            (seen * judge.texts([sentence({**r, key: v}, random.Random(i)) for i, r in enumerate(records)])).sum(axis=1)
            for v in values
        ],
        axis=1,
    )
    return near.argmax(axis=1) == np.array([values.index(r[key]) for r in records])


def _attributes(
    judge: Clip, splits: dict[str, list[Shown]], drawn: dict[str, dict[str, list[np.ndarray]]]
) -> dict[str, Any]:
    """Share of profession prompts whose gender and skin tone the judge reads back; both splits together."""
    shown = [(split, i, s.record) for split in ("trained", "compositions") for i, s in enumerate(splits[split])]
    people = [entry for entry in shown if entry[2].get("gender") in ("man", "woman") and "tone" in entry[2]]
    records = [record for _, _, record in people]
    found: dict[str, Any] = {"prompts": len(people)}
    real = {split: [s.picture for s in splits[split]] for split in ("trained", "compositions")}
    for name, pictures in {"real pictures": real, **drawn}.items():
        mine = [pictures[split][i] for split, i, _ in people]
        found[name] = {key: float(read_attribute(judge, mine, records, key).mean()) for key in ("gender", "tone")}
    return found


def _clips(held_out: list[Shown], trained: list[Shown]) -> dict[str, Any]:
    """R@1 among 256 of both CLIPs on real pictures."""
    found: dict[str, Any] = {}
    for name in ("clip", "judge"):
        clip = Clip(OpenClipScorer(model=f"zoo:{name}"))
        found[name] = {
            split: float(
                recall_hits(
                    clip.pictures([s.picture for s in some]), clip.texts([s.caption for s in some]), AMONG
                ).mean()
            )
            for split, some in (("held-out", held_out), ("trained", trained[:AMONG]))
        }
    return found


@torch.no_grad()
def _autoencoder(held_out: list[Shown]) -> dict[str, float]:
    """Mean PSNR in dB over held-out pictures."""
    from diffusers import AutoencoderKL

    from factory.pocket.vae import decode, encode, to_tensor

    vae = AutoencoderKL.from_pretrained(
        ZOO / "teacher", subfolder="vae", dtype=torch.float32, use_safetensors=True
    ).eval()
    pictures = np.stack([shown.picture for shown in held_out])
    latents = encode(vae, pictures)
    out = torch.cat([decode(vae, part) for part in latents.split(64)]).clamp(-1, 1)
    error = (out - to_tensor(pictures)).div(2).pow(2).mean(dim=(1, 2, 3))
    return {"psnr_db": float((-10 * error.log10()).mean()), "parameters": sum(p.numel() for p in vae.parameters())}


def _captioner(judge: Clip, splits: dict[str, list[Shown]]) -> dict[str, Any]:
    """R@1 among 256 by the judge, of the captions written and of the true ones, on pictures the captioner never saw."""
    from factory.models.caption import open_captioner
    from factory.recipe import TransformersCaptioner

    captioner = open_captioner(TransformersCaptioner(model="zoo:captioner"))
    found: dict[str, Any] = {}
    for split in ("compositions", "held-out"):
        pictures = [shown.picture for shown in splits[split]]
        written, seen = captioner.describe(pictures), judge.pictures(pictures)
        own = float(recall_hits(seen, judge.texts(written), AMONG).mean())
        true = float(recall_hits(seen, judge.texts([s.caption for s in splits[split]]), AMONG).mean())
        found[split] = {
            "written": own,
            "true": true,
            "ratio": own / true,
            "examples": [[s.caption, w] for s, w in list(zip(splits[split], written, strict=True))[:6]],
        }
    return found


def _writer(count: int = 256) -> dict[str, float]:
    """Share of attribute records whose prompt fails its check at the first try and after four."""
    from factory.draw import draw_records
    from factory.models.text import open_writer
    from factory.plan import check_prompt
    from factory.recipe import TransformersWriter
    from factory.taxonomy import load_taxonomy

    writer = open_writer(TransformersWriter(model="zoo:writer"))
    records = draw_records(load_taxonomy("zoo:taxonomy.yaml"), count, seed=99)
    failed, after = records, []
    for attempt in range(4):
        written = writer.write([record for _, record in failed], seed=1000 * attempt)
        failed = [r for r, prompt in zip(failed, written, strict=True) if check_prompt(prompt, *r)]
        after.append(len(failed) / count)
    return {"failed_first": after[0], "failed_after_four": after[-1], "records": count}


def _latency() -> dict[str, float]:
    """Seconds a picture at batch 8, median of three after one warm-up: the teacher at 25 steps with guidance, the student at 2."""
    found = {}
    prompts = ["a 3d render of a red apple on a white background"] * 8
    for name, model, steps, guidance in (("teacher", TEACHER, 25, GUIDANCE), ("student", STUDENT, 2, 1.0)):
        pipeline = open_pipeline(model)
        if model == TEACHER:
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            generate(pipeline, prompts, list(range(8)), steps, guidance, batch=8)
            seconds.append((time.perf_counter() - began) / 8)
        found[f"{name}_s_per_picture"] = float(np.median(seconds[1:]))
    return {**found, "threads": torch.get_num_threads()}


def _targets(f: dict[str, Any]) -> list[dict[str, Any]]:
    """What the zoo was asked to reach, and what it does."""
    trained, unseen = f["pictures"]["trained"], f["pictures"]["compositions"]
    teacher, name = f["attributes"]["teacher, 25 steps"], "teacher, 25 steps"

    def line(what: str, value: float, least: float, most: bool = False) -> dict[str, Any]:
        return {"what": what, "value": value, "target": least, "met": value <= least if most else value >= least}

    return [
        line("autoencoder, held-out PSNR, dB", f["autoencoder"]["psnr_db"], 29),
        line("teacher R@1 / real R@1, trained concepts", trained[name]["r1"] / trained["real pictures"]["r1"], 0.75),
        line("teacher R@1 / real R@1, held-out compositions", unseen[name]["r1"] / unseen["real pictures"]["r1"], 0.45),
        line("teacher, gender as asked", teacher["gender"], 0.8),
        line("teacher, skin tone as asked", teacher["tone"], 0.8),
        line("captions' R@1 / true captions', held-out compositions", f["captioner"]["compositions"]["ratio"], 0.8),
        line("captions' R@1 / true captions', held-out of any kind", f["captioner"]["held-out"]["ratio"], 0.8),
        line("student 4 steps, CLIP / teacher's", trained["student, 4 steps"]["clip"] / trained[name]["clip"], 0.9),
        line("student 2 steps, CLIP / teacher's", trained["student, 2 steps"]["clip"] / trained[name]["clip"], 0.85),
        line("student 1 step, CLIP / teacher's", trained["student, 1 step"]["clip"] / trained[name]["clip"], 0.75),
        line("student 4 steps, R@1 / teacher's", trained["student, 4 steps"]["r1"] / trained[name]["r1"], 0.9),
        line("student 2 steps, R@1 / teacher's", trained["student, 2 steps"]["r1"] / trained[name]["r1"], 0.85),
        line("student 1 step, R@1 / teacher's", trained["student, 1 step"]["r1"] / trained[name]["r1"], 0.75),
        line("teacher 25 steps, s a picture at batch 8", f["latency"]["teacher_s_per_picture"], 3, most=True),
        line("student 2 steps, s a picture at batch 8", f["latency"]["student_s_per_picture"], 0.15, most=True),
        line("size in the repository (equal files once), MB", f["size_bytes"] / 1e6, 100, most=True),
    ]


def _write_page(
    folder: Path,
    figures: dict[str, Any],
    splits: dict[str, list[Shown]],
    drawn: dict[str, dict[str, list[np.ndarray]]],
) -> None:
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    sheets = {"real pictures": [s.picture for s in splits["trained"][:_GRID]]}
    sheets |= {name: pictures["trained"][:_GRID] for name, pictures in drawn.items()}
    grids = []
    for name, pictures in sheets.items():
        sink = io.BytesIO()
        sheet = contact_sheet([pictures[i : i + 8] for i in range(0, _GRID, 8)])
        Image.fromarray(sheet).save(sink, format="PNG")
        publish_bytes(folder / f"{name.replace(', ', '-').replace(' ', '-')}.png", sink.getvalue())
        grids.append((name, base64.b64encode(sink.getvalue()).decode()))
    template = Environment(
        loader=FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "cluster"]),
        autoescape=select_autoescape(default=True),
    ).get_template("zoo_report.html.j2")
    captions = [shown.caption for shown in splits["trained"][:_GRID]]
    page = template.render(figures=figures, grids=grids, captions=captions)
    publish_bytes(folder / "report.html", page.encode())
