"""The shipped models: whole, loadable, and able to do their work. Judged by the judge CLIP, which nothing else uses."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from cluster.errors import EdgeFusionError
from factory.models import ZOO
from factory.models.caption import open_captioner
from factory.models.clip import Clip
from factory.pocket.build import DIGESTS, SHIPPED, build, digests_of, distinct_bytes, unpack
from factory.pocket.clip import tokens
from factory.pocket.evalset import SPLITS, read_evalset
from factory.pocket.fit import fit
from factory.pocket.roster import TEACHER_ROLES
from factory.recipe import OpenClipScorer, TransformersCaptioner
from trainer.metrics import recall_hits
from trainer.models import open_pipeline
from trainer.sample import generate

PROMPTS = [
    "a 3d render of a red apple on a white background",
    "a flat icon of a fox on a blue background",
    "a 3d render of a rocket on a black background",
    "a flat icon of a pizza on a yellow background",
    "a 3d render of a penguin on a pink background",
    "a flat icon of a sunflower on a red background",
    "a 3d render of a soccer ball on a green background",
    "a flat icon of an octopus on a gray background",
]


def test_the_files_are_what_their_digests_say() -> None:
    assert digests_of(ZOO) == json.loads((ZOO / DIGESTS).read_text())
    assert distinct_bytes(ZOO) < 100e6


@pytest.mark.parametrize(
    ("model", "steps", "guidance", "least"), [("zoo:teacher", 20, 4.0, 6), ("zoo:student-fewstep", 2, 1.0, 5)]
)
def test_pictures_show_what_was_asked(model: str, steps: int, guidance: float, least: int) -> None:
    """Among the eight prompts, the right one is nearest for most pictures (chance would give one), and by a margin."""
    clip = Clip(OpenClipScorer(model="zoo:judge"))
    pictures = generate(open_pipeline(model), PROMPTS, list(range(8)), steps, guidance)
    near = clip.pictures(pictures) @ clip.texts(PROMPTS).T
    assert int((near.argmax(axis=1) == np.arange(8)).sum()) >= least
    own, others = np.diag(near), near[~np.eye(8, dtype=bool)]
    assert own.mean() - others.mean() > 0.4


def test_the_captioner_names_what_it_sees() -> None:
    """Captions of 64 trained pictures find their own picture among 64; chance would give one."""
    shown = read_evalset("trained")[:64]
    captions = open_captioner(TransformersCaptioner(model="zoo:captioner")).describe([s.picture for s in shown])
    judge = Clip(OpenClipScorer(model="zoo:judge"))
    assert recall_hits(judge.pictures([s.picture for s in shown]), judge.texts(captions), 64).mean() > 0.6


def test_the_evaluation_set_holds_what_its_splits_promise() -> None:
    splits = {name: read_evalset(name) for name in SPLITS}
    assert {name: len(shown) for name, shown in splits.items()} == SPLITS
    trained = {
        (s.record["subject"], s.record.get("gender"), s.record.get("tone"), s.record["style"])
        for s in splits["trained"]
    }
    unseen = {
        (s.record["subject"], s.record["gender"], s.record["tone"], s.record["style"]) for s in splits["compositions"]
    }
    assert not trained & unseen
    assert {s.record["subject"] for s in splits["compositions"]} <= TEACHER_ROLES


def test_the_shipped_models_can_be_laid_out_for_building(tmp_path) -> None:
    unpack(ZOO, tmp_path)
    shipped, laid = digests_of(ZOO), digests_of(tmp_path)
    for name, place in SHIPPED.items():
        ours = {file: digest for file, digest in shipped.items() if file.startswith(f"{name}/")}
        assert ours and {laid[f"{place}/{file.removeprefix(f'{name}/')}"] for file in ours} == set(ours.values())
    assert laid["vae/model/config.json"] == shipped["teacher/vae/config.json"]
    assert laid["teacher/model/unet/config.json"] == shipped["teacher/unet/config.json"]
    # The filter's own text tower, which the teacher's no longer is.
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{ZOO / 'clip'}", precision="fp32")
    tower = CLIPTextModel.from_pretrained(tmp_path / "clip" / "text_encoder", dtype=torch.float32)
    ids = tokens(CLIPTokenizer.from_pretrained(ZOO / "clip"), ["a flat icon of a fox on a red background"])
    with torch.no_grad():
        pooled = tower(ids).pooler_output @ clip.text_projection
        torch.testing.assert_close(pooled, clip.encode_text(ids), atol=1e-3, rtol=1e-3)


def test_training_can_begin_with_finished_weights_and_then_goes_on_from_its_checkpoint(tmp_path) -> None:
    def train(steps: int, start: torch.nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        found = fit(model, lambda _: model.weight.square().sum(), tmp_path, steps=steps, learning_rate=0.1, start=start)
        return found.weight.detach().clone()

    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert torch.equal(train(0, first), first.weight)
    assert torch.equal(train(1, first), train(1, second)), "the checkpoint was not what it went on from"


def test_what_cannot_go_on_is_refused(tmp_path) -> None:
    with pytest.raises(EdgeFusionError, match="only captioner and teacher can"):
        build("judge", tmp_path, 1, warm=True)
