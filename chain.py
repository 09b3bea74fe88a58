"""One run of a recipe into a folder, from prompts to the report: the steps of all wings in order, each done or not by what it leaves."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from rich.progress import Progress

from cluster.claim import claimed, is_claim
from cluster.errors import LedgerConflict, RecipeError, StageError
from cluster.events import LOG, NOWHERE, Events
from cluster.heartbeat import heartbeat
from cluster.likeness import first_difference, without
from cluster.machine import NEEDED, commit, load_per_core, machine_facts, provided_by, watch_memory
from cluster.places import TRAIN, unknown_stages
from cluster.progress import bar_each, console, progress_bars
from cluster.recipe import Settings, recipe_digest
from cluster.runner import ClusterRecipe, make_runner, stop_ray
from cluster.storage import PARTIAL, publish_bytes, refuse_url, sweep_partials
from export.recipe import ExportRecipe
from factory.recipe import FactoryRecipe
from factory.recipe.earlier import without_gone_keys
from factory.recipe.idle import IDLE as FACTORY_IDLE
from trainer.identity import IDLE as TRAINER_IDLE
from trainer.progress import follow_training, is_finished
from trainer.recipe import TrainerRecipe

RUN = "run.json"
_LIMITS = (
    *(("factory", *key) for key in FACTORY_IDLE),
    *(("trainer", *key) for key in TRAINER_IDLE),
    ("export", "allow_pickle"),
)
"""Keys that decide nothing but where a run computes, which weights may be opened, how servers are run and asked, what a card says of licences,
when it saves and when it stops; errors say to change some of them and to run the same command again."""


class Recipe(Settings):
    """Everything a run depends on."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", description="short name in lower-case letters, digits and dashes"
    )
    seed: int = Field(default=0, ge=0, description="seed of the plan and of training")
    cluster: ClusterRecipe = ClusterRecipe()
    factory: FactoryRecipe
    trainer: TrainerRecipe
    export: ExportRecipe = ExportRecipe()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.trainer.adapt.steps == 0 and self.trainer.distill.steps == 0:
            raise ValueError("trainer.adapt.steps and trainer.distill.steps are both 0, so there is nothing to train")
        if named := {*self.cluster.stages, *self.cluster.memory_gib}:
            from factory.stages import make_stages

            known = [stage.name for stage in make_stages(self.factory.make, Path())]
            if odd := unknown_stages(named, [*known, TRAIN]):
                raise ValueError(f"cluster.stages or cluster.memory_gib: {odd}")
        distill, export = self.trainer.distill, self.export
        if distill.steps and distill.phases and export.steps % distill.phases:
            raise ValueError(
                f"export.steps ({export.steps}) is no multiple of trainer.distill.phases ({distill.phases}), and the student learns to "
                "step from edge to edge only; change one of the two"
            )
        low, high = distill.guidance_min + 1, distill.guidance_max + 1
        if distill.steps and distill.guidance_input and export.guidance_scale is None and export.guidance_range is None:
            raise ValueError(
                "trainer.distill.guidance_input needs export.guidance_scale, which a build is fixed at, or export.guidance_range, from which "
                f"whoever draws chooses; choose one from {low:g} to {high:g}"
            )
        if distill.steps and export.guidance_range is not None:
            if not distill.guidance_input:
                raise ValueError(
                    "export.guidance_range needs a student that takes guidance: set trainer.distill.guidance_input, or leave it out"
                )
            if export.guidance_range[0] < low or export.guidance_range[1] > high:
                raise ValueError(
                    f"export.guidance_range reaches beyond what trainer.distill teaches ({low:g} to {high:g}, which is guidance_min + 1 to "
                    "guidance_max + 1), and no gate sees how the student draws there; change one of the two"
                )
        return self


class Chain:
    """One run of a recipe into a folder. Each step knows by its output whether it is done, so a rerun goes on where it stopped."""

    STEPS = ("plan", "make", "select", "train", "student", "samples", "export", "pages", "report")

    def __init__(self, recipe: Recipe, out: Path) -> None:
        refuse_url(out)
        self.recipe, self.out = recipe, out
        self.data, self.training, self.student = out / "dataset", out / "training", out / "student"
        self.facts = self._read_facts()
        self.events = NOWHERE

    def run(self, until: str = "report") -> bool:
        """Run what is missing up to step `until`; returns False if there was nothing to do."""
        steps = self.STEPS[: self.STEPS.index(until) + 1]
        if not (todo := self._todo(steps)):
            return False
        self._refuse_hopeless(todo)
        with claimed(self.out, "edgefusion run", _say) as still_mine:
            # What another process did here between the first look and the claim.
            self.facts = self._read_facts()
            todo = self._todo(steps)
            if "export" in todo:
                self._forget_pages()
                todo = self._todo(steps)
            if todo:
                self._run_steps(todo, still_mine)
        return bool(todo)

    def _todo(self, steps: Sequence[str]) -> list[str]:
        """What is missing of `steps`. Raises LedgerConflict where people decided anew about what was trained on."""
        found = [step for step in steps if not self._is_done(step)]
        if found and "train" in steps:
            self._refuse_late_decisions()
        return found

    def _refuse_hopeless(self, todo: Sequence[str]) -> None:
        """Tell what cannot work before the folder is taken and hours are spent."""
        from export.vae import check_decoder
        from factory.models import quiet, resolve
        from factory.plan import resolve_models
        from factory.publish import check_place
        from factory.views import check_view
        from trainer.mix import sources_by_phase

        if not self._is_done("train"):
            for view, key in self._views():
                check_view(self.recipe.factory, self.data, view, key)
        if "train" in todo:
            # A data set that is not there is told now, not after hours of making.
            sources_by_phase(self.recipe.trainer, self.data, self.recipe.cluster.cache, self.training)
            if (named := self.recipe.trainer.distill.teacher) not in (None, "student"):
                resolve(named)
        if "export" in todo and self.recipe.trainer.distill.steps == 0:
            raise RecipeError(
                "a student of phase 1 alone draws in 25 steps with guidance, and a build draws in few",
                where="trainer.distill.steps",
                remedy="Give it steps, or stop before the builds: edgefusion trainer run",
            )
        if "export" in todo and self.recipe.export.vae is not None:
            check_decoder(self.recipe.export.vae)
        if "select" in todo and self.recipe.factory.pack.to is not None:
            check_place(self.recipe.factory.pack.to)
        resolve_models(self.recipe.factory, self.recipe.cluster.is_here())
        resolve(self.recipe.trainer.teacher)
        resolve(self.recipe.trainer.start or self.recipe.trainer.teacher)
        quiet()

    def _run_steps(self, todo: Sequence[str], still_mine: Callable[[], None]) -> None:
        self.facts.setdefault("run", uuid.uuid4().hex[:12])
        # An earlier start was stopped in it, and its seconds are in no sum.
        if step := self.facts.pop("under_way", None):
            cut_off: dict[str, int] = self.facts.setdefault("cut_off", {})
            cut_off[step] = cut_off.get(step, 0) + 1
        self._save()
        sweep_partials(self.out)
        about = {"recipe": self.recipe.name, "steps": ", ".join(todo), "commit": commit()}
        with (
            watch_memory() as peak,
            progress_bars() as bars,
            heartbeat(self.out, still_mine) as begin,
            self._events().during("run", **about) as whole,
            whole.listening(),
        ):
            for step in todo:
                still_mine()
                begin(step)
                began = time.monotonic()
                self.facts.setdefault("load", {})[step] = round(load_per_core(), 1)
                self.facts["under_way"] = step
                self._save()
                with whole.during(f"step {step}") as self.events:
                    result = getattr(self, f"_{step}")(bars)
                self.facts["seconds"][step] = round(self.facts["seconds"].get(step, 0) + time.monotonic() - began, 1)
                self.facts["peak_memory_bytes"] = max(peak(), self.facts.get("peak_memory_bytes", 0))
                self.facts |= result or {}
                del self.facts["under_way"]
                self._save()

    def _events(self) -> Events:
        kind = self.recipe.cluster.log
        if kind == "off":
            return NOWHERE
        return Events((self.out / LOG).resolve(), self.facts["run"], uuid.uuid4().hex[:8], units=kind == "units")

    def _read_facts(self) -> dict[str, Any]:
        """What the folder says of this recipe's run, or a new run's facts; refuses a folder that holds another recipe's run.

        Until training began, how to train and export may still change. Nothing is written yet: a recipe whose models are not there must
        not take the folder.
        """
        trained = self.training.exists() or self.student.exists()
        path, tree = self.out / RUN, self.recipe.model_dump(mode="json")
        if path.exists():
            try:
                facts = json.loads(path.read_text())
                there, here = (what_is_made(one, trained) for one in (_by_this_version(facts["recipe"]), tree))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise LedgerConflict("cannot be read", where=str(path), remedy="Choose another --out folder") from None
            if there != here:
                raise LedgerConflict(
                    f"the folder holds a run of another recipe: {first_difference(there, here)}",
                    where=str(self.out),
                    remedy="Choose another --out folder, or go back to that recipe",
                )
            if "funnel" in facts:  # what an earlier version wrote does not say it
                facts.setdefault("card_sources", facts["recipe"]["factory"].get("sources", []))
            return {**facts, "recipe": tree, "recipe_digest": recipe_digest(self.recipe)}
        if self.out.is_dir() and not all(is_claim(path.name) or PARTIAL in path.name for path in self.out.iterdir()):
            raise LedgerConflict(
                "the folder is not empty and holds no run", where=str(self.out), remedy="Choose another --out folder"
            )
        facts = {
            "recipe_digest": recipe_digest(self.recipe),
            "recipe": tree,
            "versions": {package: found[1] if (found := provided_by(package)) else None for package in NEEDED},
            "commit": commit(),
            "machine": machine_facts(),
            "seconds": {},
            "load": {},
        }
        return facts

    def _save(self) -> None:
        publish_bytes(self.out / RUN, (json.dumps(self.facts, indent=2) + "\n").encode())

    def _is_done(self, step: str) -> bool:
        if step == "plan":
            from factory.download import wants_again

            return not wants_again(self.data) and (self.data / "plan.parquet").exists()
        if step == "select":
            told = self.facts.get("card_sources") == self.facts["recipe"]["factory"]["sources"]
            return "funnel" in self.facts and told and self._holds_decisions()
        if step == "export":
            return all((self.out / "export" / target / "bundle.json").exists() for target in self.recipe.export.targets)
        if step == "pages" and not (self.out / "compare.html").exists():
            from export.handover import has_pages

            return has_pages(self.out, self.recipe.export)
        proof = {
            "make": self.data / "manifest.parquet",
            "train": self.student,
            "student": self.student,
            "samples": self.out / "samples",
            "pages": self.out / "compare.html",
            "report": self.out / "report.html",
        }
        return proof[step].exists()

    def _forget_pages(self) -> None:
        """What shows the builds is of the old ones once there are others."""
        for name in ("compare.html", "report.html"):
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.out / "demo", ignore_errors=True)

    def _holds_decisions(self) -> bool:
        """The shards, and the counts noted of them, include everything that people decided so far."""
        from factory.make import decided, is_packed
        from factory.pack import MANIFEST
        from factory.views import MAIN, view_folder

        recipe, data = self.recipe.factory, self.data
        # A selection that somebody took away is not missed.
        there = [name for name in recipe.views if (view_folder(data, name) / MANIFEST).exists()]
        return self.facts.get("decisions_sha256", "") == decided(data, recipe.select) and all(
            is_packed(data, recipe.view(name), view_folder(data, name)) for name in (*there, MAIN)
        )

    def _refuse_late_decisions(self) -> None:
        """A student must not be trained on two data sets, nor a report show the counts of one it never saw."""
        from factory.make import decided

        if "funnel" not in self.facts or not (self.training.exists() or self.student.exists()):
            return
        if self.facts.get("decisions_sha256", "") != decided(self.data, self.recipe.factory.select):
            raise LedgerConflict(
                "people decided anew about the data set after training began",
                where=str(self.out),
                remedy="Delete training, student, samples and export there to train on the curated pictures, "
                "or take the decisions back",
            )

    def _plan(self, bars: Progress) -> None:
        from factory.plan import make_plan

        plan = self.recipe.factory.plan
        total = plan.prompts if plan.kind == "written" else plan.limit
        what = {"written": "writing prompts", "file": "taking in prompts", "pictures": "taking in pictures"}[plan.kind]
        task = bars.add_task(f"plan: {what}", total=total)
        make_plan(self.recipe.factory, self.recipe.seed, self.data, lambda n: bars.advance(task, n))

    def _make(self, bars: Progress) -> None:
        from factory.make import make
        from factory.units import unit_sizes, units_left

        each = self.recipe.factory.make.unit_images
        sizes = unit_sizes(self.data, each)
        left = sum(sizes[number] for number in units_left(self.data, each))
        task = bars.add_task("make: pictures", total=sum(sizes), completed=sum(sizes) - left)
        runner = make_runner(self.recipe.cluster, self.events)
        try:
            make(
                self.recipe.factory,
                self.data,
                runner,
                lambda n: bars.advance(task, n),
                lambda told: bars.update(task, below=told),
            )
        finally:
            runner.close()

    def _select(self, bars: Progress) -> dict[str, Any]:
        from factory.pack import packed_decisions
        from factory.views import pack_all, write_cards

        task = bars.add_task("select and pack", total=1)
        if "funnel" in self.facts and self._holds_decisions():  # only the licences that the cards tell are others
            write_cards(self.recipe.factory, self.data, self.recipe.name, bar_each(bars))
            funnel = self.facts["funnel"]
        else:
            # Killed between the manifest and the card or the store, the old counts would say that all is done.
            if self.facts.pop("funnel", None):
                self._save()
            funnel = pack_all(self.recipe.factory, self.data, self.recipe.name, bar_each(bars))
        bars.advance(task)
        if not funnel["kept"]:
            why = ", ".join(f"{count} {reason}" for reason, count in funnel["reasons"].items())
            raise StageError(
                f"the data set is empty: of {funnel['planned']} planned samples none was kept ({why})",
                where=str(self.data),
                remedy="Look at what came in, or loosen factory.select in a run of its own (another --out)",
            )
        return {
            "funnel": funnel,
            "decisions_sha256": packed_decisions(self.data),
            "card_sources": self.facts["recipe"]["factory"]["sources"],
        }

    def _train(self, bars: Progress) -> None:
        from cluster.training import launch
        from factory.views import refuse_stale_view
        from trainer.loop import train
        from trainer.mix import sources_by_phase

        recipe, folder, seed = self.recipe.trainer, self.training.resolve(), self.recipe.seed
        for view, key in self._views():
            refuse_stale_view(self.data, view, key)
        data = sources_by_phase(recipe, self.data, self.recipe.cluster.cache, folder)
        with follow_training(bars, self.recipe.trainer, folder):
            try:
                launch(
                    lambda: train(recipe, data, folder, seed),
                    self.recipe.cluster,
                    folder,
                    recipe.threads,
                    self.recipe.cluster.trains_on_gpu(),
                    self.events,
                )
            finally:
                if self.recipe.cluster.runner == "ray":
                    stop_ray()

    def _student(self, bars: Progress) -> None:
        from trainer.sample import save_student

        task = bars.add_task("student folder", total=1)
        save_student(self.recipe.trainer, self.training, self.student)
        bars.advance(task)

    def _samples(self, bars: Progress) -> None:
        from trainer.evaluate import write_samples

        task = bars.add_task("samples: teacher and student", total=1)
        recipe = self.recipe
        write_samples(
            recipe.trainer.teacher,
            self.student,
            self._prompts(16),
            recipe.trainer.grid_seed,
            self._guidance(),
            recipe.trainer.judge or recipe.factory.make.scorer,
            recipe.trainer.threads,
            self.out / "samples",
            recipe.trainer.allow_pickle,
        )
        bars.advance(task)

    def _export(self, bars: Progress) -> None:
        from export.bundle import export_student
        from export.prompts import calibrating_first

        task = bars.add_task("export", total=None)
        export = self.recipe.export
        count = export.calibration_prompts + export.parity_prompts
        export_student(
            self.student,
            calibrating_first(
                self._prompts(max(16, count)), self._data_prompts, export.calibration_prompts, export.parity_prompts
            ),
            export,
            self.out / "export",
            lambda what: bars.update(task, description=f"export: {what}"),
        )
        bars.update(task, description="export", total=1, completed=1)

    def _pages(self, bars: Progress) -> None:
        from export.handover import write_pages

        task = bars.add_task("pages", total=None)
        write_pages(self.out, self.recipe.export, lambda what: bars.update(task, description=f"pages: {what}"))
        bars.update(task, description="pages", total=1, completed=1)

    def _report(self, bars: Progress) -> None:
        from export.report import write_report

        task = bars.add_task("report", total=1)
        write_report(self.out, self.facts)
        bars.advance(task)

    def _guidance(self) -> float:
        """The teacher's scale where it draws, of several the first one's; where pictures came in, the one that the student learned."""
        teacher = next(iter(self.recipe.factory.make.painters().values()), None)
        return teacher.guidance if teacher is not None else self.recipe.trainer.distill.guidance_max

    def _prompts(self, count: int) -> list[str]:
        """The grid's, or the data's."""
        return list(self.recipe.trainer.grid_prompts) or self._data_prompts(count)

    def _data_prompts(self, count: int) -> list[str]:
        """The first of the selection that the last phase was trained on; none where the data have gone and the grid stands for them."""
        from factory.pack import MANIFEST, first_prompts
        from factory.views import MAIN, view_folder

        trainer = self.recipe.trainer
        view = trainer.data_of(trainer.phases_run()[-1])[0].own_view or MAIN
        folder = view_folder(self.data, view)
        if trainer.grid_prompts and not (folder / MANIFEST).exists():
            return []
        return first_prompts(folder, count)

    def _views(self) -> list[tuple[str | None, str]]:
        """The selection of the run's own data set that each phase still to be trained reads, and the recipe's key that says so."""
        trainer = self.recipe.trainer
        told = [trainer.data_of(phase) for phase in trainer.phases_run() if not is_finished(self.training, phase)]
        return [(data.own_view, f"{key}.own_view") for data, key in told]


def _say(words: str) -> None:
    console.print(words, soft_wrap=True, markup=False)


def what_is_made(recipe: dict[str, Any], trained: bool) -> dict[str, Any]:
    """A recipe without where it runs and when it stops: a run may be begun on a laptop and go on elsewhere, or under a head of another
    address, or with a higher limit. Before anything is `trained`, also without how to train and export."""
    aside = {"cluster"} if trained else {"cluster", "trainer", "export"}
    return without({name: part for name, part in recipe.items() if name not in aside}, _LIMITS)


def _by_this_version(recipe: dict[str, Any]) -> dict[str, Any]:
    """What an earlier version wrote, with the defaults of keys that came since and without those that went; as it stands if it is no recipe
    any more."""
    try:
        return Recipe.model_validate(without_gone_keys(recipe)).model_dump(mode="json")
    except ValidationError:
        return recipe
