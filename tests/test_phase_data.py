"""Each phase on data of its own, as in the paper: what each reads, also after SIGKILL, and how a recipe, the report and the model card say so."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chain import Chain, Recipe
from cluster.errors import EdgeFusionError, LedgerConflict, RecipeError
from cluster.recipe import load_recipe, recipe_digest
from export.card import _text, provenance
from export.report import _trained_on, _training_part
from factory.pack import Sample, pack, read_manifest
from factory.stages import encode_picture
from trainer.models import PHASES
from trainer.recipe import TrainerRecipe
from trainer.trained_on import TRAINED_ON

RECIPES = Path(__file__).parent.parent / "recipes"
STEPS = 4

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["chain", "trainer.loop", "factory.make", "factory.views"])


@pytest.fixture(scope="module")
def made(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(recipe whose phases read different data, output folder in which nothing is trained, the other data set)."""
    folder = tmp_path_factory.mktemp("made")
    pictures = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    pack(
        [
            Sample(hashlib.sha256(bytes([i])).hexdigest(), encode_picture(p, "png"), "png", f"an owl {i}")
            for i, p in enumerate(pictures)
        ],
        folder / "owls" / "dataset",
    )
    tree = yaml.safe_load((RECIPES / "pocket.yaml").read_text())
    plan, make, trainer = tree["factory"]["plan"], tree["factory"]["make"], tree["trainer"]
    tree["cluster"]["runner"] = "in-process"
    plan |= {"taxonomy": str(tiny_models / "taxonomy.yaml"), "prompts": 24}
    plan["writer"]["model"] = str(tiny_models / "writer")
    make["teacher"] |= {"model": str(tiny_models / "teacher"), "size_px": 32, "steps": 2, "batch_images": 4}
    make |= {"scorer": {"kind": "open_clip", "model": str(tiny_models / "clip")}, "unit_images": 8, "threads": 1}
    tree["factory"]["select"] = {"min_clip": -1.0, "max_hamming_bits": 0, "max_colour_difference": 0}
    tree["factory"]["views"] = {"few": {"best": 6}, "chosen": {"people": "only"}}
    trainer |= {"teacher": str(tiny_models / "teacher"), "start": None, "size_px": 32, "threads": 1}
    trainer |= {"judge": None, "grid_prompts": []}
    phase = {"steps": STEPS, "batch_images": 4, "checkpoint_s": 1e-9}
    trainer["adapt"] |= phase | {"data": {"own_view": "few"}}
    trainer["distill"] |= phase | {"data": {"more_data": [{"data": str(folder / "owls" / "dataset"), "weight": 30}]}}
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    Chain(load_recipe(Recipe, recipe), folder / "out").run("select")
    return recipe, folder / "out", folder / "owls" / "dataset"


def train_and_note(recipe: str, out: str, die_at: tuple[str, int] | None = None) -> None:
    """The chain as far as the student. What is handed out to learn from is noted before it is; at `die_at` the process kills itself."""
    from trainer.mix import MixedStream

    read = MixedStream.read_draws
    notes = os.open(Path(out).with_suffix(".keys"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self: MixedStream, draws: Any, following: Any, size_px: int) -> Any:
        phase = PHASES[(Path(out) / "training" / "adapt" / "unet").exists()]
        if (phase, draws[0] // 4) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = read(self, draws, following, size_px)
        os.write(notes, (json.dumps([phase, draws[0] // 4, [e.id for e in found]]) + "\n").encode())
        return found

    MixedStream.read_draws = note
    Chain(load_recipe(Recipe, Path(recipe)), Path(out)).run("student")


def in_a_process(recipe: Path, out: Path, die_at: tuple[str, int] | None = None) -> int | None:
    process = _forks.Process(target=train_and_note, args=(str(recipe), str(out), die_at))
    process.start()
    process.join()
    return process.exitcode


def what_was_read(out: Path) -> dict[tuple[str, int], list[str]]:
    """By phase and step; a step that was done again must have read the same."""
    found: dict[tuple[str, int], list[str]] = {}
    for line in out.with_suffix(".keys").read_text().splitlines():
        phase, step, keys = json.loads(line)
        assert found.setdefault((phase, step), keys) == keys, f"step {step} of {phase} was read in two ways"
    return found


def weights(out: Path) -> list[bytes]:
    return [p.read_bytes() for name in PHASES for p in sorted((out / "training" / name / "unet").glob("*.safetensors"))]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_each_phase_reads_its_own_data_also_after_kills(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe, packed, owls = made
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        shutil.copytree(packed, out)
    assert in_a_process(recipe, whole) == 0
    for moment in (("adapt", 2), ("distill", 2)):
        assert in_a_process(recipe, killed, moment) == -signal.SIGKILL
    assert in_a_process(recipe, killed) == 0
    assert what_was_read(killed) == what_was_read(whole) and weights(killed) == weights(whole)

    ids = {
        name: {row["id"] for row in read_manifest(folder)}
        for name, folder in (
            ("few", whole / "dataset" / "views" / "few"),
            ("main", whole / "dataset"),
            ("owls", owls),
        )
    }
    read = {
        phase: {key for (p, _), keys in what_was_read(whole).items() if p == phase for key in keys} for phase in PHASES
    }
    assert read["adapt"] == ids["few"], "20 draws of 6 samples: all of them and no other"
    assert read["distill"] <= ids["main"] | ids["owls"] and read["distill"] & ids["owls"]
    assert read["distill"] & (ids["main"] - ids["few"])

    facts = json.loads((whole / "training" / "data.json").read_text())
    assert [(f["phase"], f["data"], f["samples"]) for f in facts] == [
        ("adapt", str((whole / "dataset" / "views" / "few").resolve()), 6),
        ("distill", str((whole / "dataset").resolve()), len(ids["main"])),
        ("distill", str(owls.resolve()), 9),
    ]
    told = json.loads((whole / "student" / TRAINED_ON).read_text())
    assert [(row["phase"], row["data"]) for row in told] == [
        ("adapt", "dataset/views/few"),
        ("distill", "dataset"),
        ("distill", "owls/dataset"),
    ]
    assert (killed / "student" / TRAINED_ON).read_bytes() == (whole / "student" / TRAINED_ON).read_bytes()
    assert provenance(whole / "student", [])["trained_on"] == told
    shown = {
        part["title"][:7]: [fact["samples"] for fact in part["data"]] for part in _training_part(whole / "training")
    }
    assert shown == {"Phase 1": [6], "Phase 2": [len(ids["main"]), 9]}
    goes_on_without_the_data_of_a_finished_phase(recipe, whole)
    other = load_recipe(Recipe, recipe, ["trainer.adapt.data=null"])
    with pytest.raises(LedgerConflict, match=r"trainer\.adapt\.data is \{.*\} there and null now"):
        Chain(other, whole)


def goes_on_without_the_data_of_a_finished_phase(recipe: Path, out: Path) -> None:
    noted = (out / "training" / "data.json").read_bytes()
    shutil.rmtree(out / "dataset" / "views" / "few")
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "training" / "distill")
    Chain(load_recipe(Recipe, recipe), out).run("student")
    assert (out / "training" / "data.json").read_bytes() == noted
    (out / "training" / "adapt" / "checkpoints" / "step-00000001").mkdir(parents=True)  # as a kill leaves them
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "training" / "distill" / "unet")
    Chain(load_recipe(Recipe, recipe), out).run("student")
    assert not (out / "training" / "adapt" / "checkpoints").exists()


def test_what_is_not_there_is_told_by_the_phases_key(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe, packed, _ = made

    def run(*changes: str, out: Path = tmp_path / "out") -> None:
        Chain(load_recipe(Recipe, recipe, changes), out).run("student")

    with pytest.raises(RecipeError, match=r"trainer\.adapt\.data\.own_view is fwe, .*there are: chosen, few"):
        run("trainer.adapt.data.own_view=fwe")
    with pytest.raises(RecipeError, match=r"trainer\.distill\.data\.more_data\.0\.data: there is no packed data set"):
        run("trainer.distill.data.more_data=[{data: nowhere}]")
    with pytest.raises(RecipeError, match=r"trainer\.distill\.data\.own_weight, trainer\.distill\.data\.more_data"):
        run("trainer.distill.data.more_data=[]", "trainer.distill.data.own_weight=0")
    assert not (tmp_path / "out").exists()
    shutil.copytree(packed, tmp_path / "copy")
    with pytest.raises(EdgeFusionError, match=r"trainer\.adapt\.data\.own_view is chosen.*factory curate"):
        run("trainer.adapt.data.own_view=chosen", out=tmp_path / "copy")
    assert not (tmp_path / "copy" / "training" / "adapt").exists()
    for alone, named in (((), "adapt.data and distill.data"), (("trainer.adapt.steps=0",), "distill.data")):
        said = rf"own_view says what phases without data of their own read, and {named} name.*--set ~trainer\.own_view"
        with pytest.raises(RecipeError, match=said):
            run("trainer.own_view=few", *alone)
    # What training and export take later is looked for now, not after hours.
    with pytest.raises(EdgeFusionError, match="nosuch"):
        run("trainer.distill.teacher=zoo:nosuch")
    with pytest.raises(EdgeFusionError, match=r"export\.vae has no config\.json that names a VAE"):
        Chain(load_recipe(Recipe, recipe, [f"export.vae={tmp_path}"]), tmp_path / "out").run()
    run_alone = load_recipe(Recipe, recipe, ["trainer.adapt.steps=0", "trainer.adapt.data.own_view=fwe"])
    assert list(Chain(run_alone, tmp_path / "alone")._views()) == [(None, "trainer.distill.data.own_view")]


def test_a_recipe_without_the_key_is_what_it_was() -> None:
    plain = load_recipe(Recipe, RECIPES / "pocket.yaml").trainer
    assert "data" not in plain.model_dump(mode="json")["adapt"]
    assert [plain.data_of(phase) for phase in PHASES] == [(plain, "trainer")] * 2
    tree = plain.model_dump(mode="json")
    tree["adapt"]["data"] = {"own_view": "few"}
    changed = TrainerRecipe.model_validate(tree)
    assert TrainerRecipe.model_validate(changed.model_dump(mode="json")) == changed
    assert recipe_digest(changed) != recipe_digest(plain)


def test_the_papers_recipe_trains_each_phase_on_what_the_paper_did() -> None:
    recipe = load_recipe(Recipe, RECIPES / "edgefusion.yaml")
    first, second = (recipe.trainer.data_of(phase)[0] for phase in PHASES)
    assert (first.own_view, first.more_data) == ("synt-cur", []) and recipe.factory.view("synt-cur").people == "only"
    assert second.own_view is None and [more.data for more in second.more_data] == ["runs/edgefusion-wild/dataset"]
    assert (RECIPES / "edgefusion-wild.yaml").exists(), "whose run is L-pps"


def test_report_and_card_name_the_data_of_each_phase() -> None:
    assert _trained_on({"own_view": "few"}) == {"few": "trained on"}
    phases = {"adapt": {"steps": 3, "data": {"own_view": "few"}}, "distill": {"steps": 3}}
    assert _trained_on({**phases, "own_view": None}) == {"few": "trained on in phase 1", "": "trained on in phase 2"}
    assert _trained_on({**phases, "own_weight": 0.0}) == {"few": "trained on in phase 1"}
    phases["adapt"]["steps"] = 0
    assert _trained_on(phases) == {"": "trained on"}
    rows = [
        {"phase": "adapt", "data": "dataset/views/few", "samples": 6, "share": 1.0},
        {"phase": "distill", "data": "owls/dataset", "samples": 9, "share": 0.25},
    ]
    facts: dict[str, Any] = {
        "student": {"name": "student", "sources": [], "trained_on": rows},
        **{"latent_shape": [1, 4, 8, 8], "builds": {"fp32": _BUILD}, "target": "onnx", "steps": 2, "keep": []},
        **{"prompts": ["a fox"], "measured_on": "a CPU", "runtime": "onnxruntime", "scheduler": {}},
    }
    card = _text(facts)
    assert "| 1, adapt (feature distillation) | dataset/views/few | 6 | 100.0% |" in card
    assert "| 2, distill (few steps) | owls/dataset | 9 | 25.0% |" in card
    facts["student"].pop("trained_on")
    assert "trained on" not in _text(facts)


_BUILD = {
    "precisions": dict.fromkeys(("text_encoder", "unet", "vae_decoder"), "fp32"),
    "bytes": {"unet": 1},
    "not_run": "a test",
    "parity": None,
}
