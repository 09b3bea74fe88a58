"""The plan: which prompts a language model writes, and every picture that will be made of them, enumerated ahead.

Resume can then never lose half a prompt: what is planned and not in the ledger is still to do.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.environment import find_environment
from cluster.errors import RecipeError, StageError
from cluster.stage import DEAD, PENDING
from cluster.storage import publish_bytes
from cluster.usage import JOURNAL, files_of_usage, read_usage
from factory.draw import draw_records, off_quota
from factory.models import fingerprint, resolve
from factory.models.answers import NoAnswer, writable
from factory.models.text import PromptWriter, opened_late
from factory.prompts import Alike, prompt_file, read_prompts
from factory.recipe import DiffusersTeacher, FactoryRecipe, OpenAiWriter, PromptFilePlan, PromptPlan
from factory.sources import source_files
from factory.taxonomy import Group, Taxonomy, digest_taxonomy, load_taxonomy
from factory.teachers import TEACHER, by_teacher, refuse_taken_name, share_out

_log = logging.getLogger("edgefusion")
PLAN = "plan.parquet"
PART_PROMPTS = 512
_ATTRIBUTES_LETTERS = 200
"""Allowed for a record in the template, where a price has to be reckoned before anything was asked."""
_TOLD = 5
"""Missed quotas that are told one by one."""
TAXONOMY_MARK = "taxonomy.sha256"
"""Beside the parts of the plan: what they were drawn from."""
WRITER_LOG = "writer.log"
"""Beside the parts of the plan: what a server says that the writer starts for itself."""
PLAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("group", pa.string()),
        ("attributes", pa.string()),
        ("seed", pa.int64()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("source", pa.string()),
        ("picture_sha256", pa.string()),
    ]
)

_Brought = tuple[str, str, dict[str, str], str]
"""A prompt that the user brings, its group, its attributes, where it stands."""
Progress = Callable[[int], None]
"""Told how many more items are done."""


def make_plan(
    recipe: FactoryRecipe,
    seed: int,
    folder: Path,
    progress: Progress = lambda n: None,
    took: Callable[[float], None] = lambda seconds: None,
) -> Path:
    """Write `folder/plan.parquet`, a row a picture; parts already written are kept, so a killed plan goes on. `took` is told the seconds in
    which the writer was opened, or closed.

    A prompt that fails its check in every try is planned as dead: planned = kept + rejected + dead holds from here on.
    """
    final = folder / PLAN
    if recipe.plan.kind == "pictures":
        from factory.picture_plan import plan_pictures  # it knows this module

        return plan_pictures(recipe.plan, recipe.make.unit_images, final, progress)
    if final.exists():
        return final
    if recipe.plan.kind == "file":
        return _plan_file(recipe, recipe.plan, seed, final, progress)
    taxonomy = load_taxonomy(recipe.plan.taxonomy)
    _refuse_other_taxonomy(folder / "plan", taxonomy, recipe.plan.taxonomy)
    records = draw_records(taxonomy, recipe.plan.prompts, seed)
    if missed := off_quota(taxonomy, records):
        more = f" and {len(missed) - _TOLD} more" if len(missed) > _TOLD else ""
        _log.warning("exclusions leave no way to keep every quota: %s%s", "; ".join(missed[:_TOLD]), more)
    parts: list[pa.Table] = []
    alike = Alike(recipe.plan.most_alike)
    with opened_late(recipe.plan.writer, folder / "plan" / WRITER_LOG, took) as writer:
        for start in range(0, len(records), PART_PROMPTS):
            some = records[start : start + PART_PROMPTS]
            part = folder / "plan" / f"part-{start // PART_PROMPTS:05d}.parquet"
            parts.append(written_part(recipe, part, writer, some, start, seed, alike))
            remember(alike, parts[-1])
            progress(len(some))
    table = by_teacher(_without_doubles(pa.concat_tables(parts)), recipe.make)
    if all(value == DEAD for value in table["outcome"].to_pylist()):
        raise StageError(
            "no prompt passed its check", where="factory.plan.writer", remedy="Look at the template and the model"
        )
    publish_bytes(final, table_bytes(table))
    return final


def _refuse_other_taxonomy(parts: Path, taxonomy: Taxonomy, name: str) -> None:
    """Raises RecipeError if earlier parts of the plan were drawn from a taxonomy that says something else: one plan is of one taxonomy."""
    noted, mark = parts / TAXONOMY_MARK, digest_taxonomy(taxonomy)
    if not noted.exists():  # the first time, or a plan that an earlier version began
        publish_bytes(noted, mark.encode())
    elif noted.read_text() != mark and any(parts.glob("part-*.parquet")):
        raise RecipeError(
            "was changed since the plan was begun, and a part of the plan is drawn from what it said then",
            where=name,
            remedy="Put it back as it was and run the same command again, or start in a new output folder",
        )
    elif noted.read_text() != mark:
        publish_bytes(noted, mark.encode())


def written_part(
    recipe: FactoryRecipe,
    part: Path,
    writer: Callable[[], PromptWriter],
    some: list[tuple[Group, dict[str, str]]],
    start: int,
    seed: int,
    alike: Alike,
    teachers: Sequence[str] = (),
) -> pa.Table:
    """The rows of the prompts for some records, the first of which is number `start`: written now, or read if `part` is there.
    `teachers`, if given, says of each record who is to draw it; an empty name leaves it to the shares.

    What a server charged for them, killed tries included, stands in the file (cluster/usage.py). Raises StageError if they would cost more than the recipe allows.
    """
    assert recipe.plan.kind == "written"
    journal = part.with_name(f"{part.stem}{JOURNAL}")
    if not part.exists():
        check_budget(recipe.plan, part.parent, len(some))
        writer().note_usage(journal)
        prompts = write_checked(writer(), some, recipe.plan.tries, seed + start, alike)
        rows = enumerate_samples(recipe, recipe.plan.images_per_prompt, seed, start, some, prompts, teachers)
        table = pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)
        publish_bytes(part, table_bytes(table.replace_schema_metadata(read_usage([journal]).metadata())))
    journal.unlink(missing_ok=True)
    return pq.read_table(part, schema=PLAN_SCHEMA).replace_schema_metadata(None)


def check_budget(plan: PromptPlan, parts: Path, prompts: int) -> None:
    """Raises StageError if so many more prompts would cost more than the writer may spend: at what the earlier ones in `parts` cost, or, of
    the first, at the longest answers that the recipe allows."""
    writer = plan.writer
    if not isinstance(writer, OpenAiWriter) or writer.max_cost is None or not (prices := writer.prices()):
        return
    files = sorted(parts.glob("*.parquet"))
    rows = sum(pq.read_metadata(path).num_rows for path in files)
    # A token is longer than a letter; attributes are a part of what is asked. What nobody counted may have been as long as the longest.
    most = prices.of(len(writer.template) + _ATTRIBUTES_LETTERS, writer.max_new_tokens)

    def cost(places: list[Path]) -> float:
        used = [read_usage([path]) for path in places]
        return sum(prices.of(one.input_tokens, one.output_tokens) + one.uncounted * most for one in used)

    spent = cost(files_of_usage(parts))
    foretold = prompts * (cost(files) * plan.images_per_prompt / rows if rows else most)
    if spent + foretold > writer.max_cost:
        raise StageError(
            f"{spent:.2f} is spent, and the next {prompts} prompts would cost about {foretold:.2f}: more than max_cost ({writer.max_cost:g})",
            where="factory.plan.writer.max_cost",
            remedy="Raise it and run the same command again; what is written is kept",
        )


def _plan_file(recipe: FactoryRecipe, plan: PromptFilePlan, seed: int, final: Path, progress: Progress) -> Path:
    """The prompts that the user brings; what will not do is planned as dead with its reason, in its place."""
    alike, tables = Alike(plan.most_alike), [PLAN_SCHEMA.empty_table()]
    for start, some in _in_parts(read_prompts(plan)):
        prompts: list[tuple[str, str]] = []
        for prompt, *_ in some:
            wrong = check_prompt(prompt) or ("the prompt is too like an earlier one" if alike.find(prompt) else "")
            if not wrong:
                alike.add(prompt)
            prompts.append((writable(prompt), wrong))
        records = [(group, attributes) for _, group, attributes, _ in some]
        places = [place for *_, place in some]
        rows = enumerate_samples(recipe, plan.images_per_prompt, seed, start, records, prompts, sources=places)
        tables.append(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
        progress(len(some))
    table = by_teacher(_without_doubles(pa.concat_tables(tables)), recipe.make)
    if all(value == DEAD for value in table["outcome"].to_pylist()):
        raise StageError(
            "the files hold no usable prompt", where=", ".join(plan.paths), remedy="Check factory.plan.paths"
        )
    publish_bytes(final, table_bytes(table))
    return final


def _in_parts(rows: Iterator[_Brought]) -> Iterator[tuple[int, list[_Brought]]]:
    """(number of the first, up to PART_PROMPTS of them)."""
    start = 0
    while some := list(itertools.islice(rows, PART_PROMPTS)):
        yield start, some
        start += len(some)


def remember(alike: Alike, part: pa.Table) -> None:
    """What a part of the plan holds alive, each prompt once however many pictures it has."""
    there = zip(part["prompt"].to_pylist(), part["outcome"].to_pylist(), strict=True)
    for prompt in dict.fromkeys(prompt for prompt, outcome in there if outcome != DEAD):
        alike.add(prompt)


def sample_id(teacher: DiffusersTeacher, prompt: str, seed: int) -> str:
    """SHA-256 of everything that decides the picture."""
    facts = {
        **teacher.model_dump(mode="json", exclude={"model", "revision", "allow_pickle", "batch_images", "share"}),
        "model": fingerprint(teacher.model, teacher.revision),
        "prompt": prompt,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_prompt(prompt: str, group: Group | None = None, record: Mapping[str, str] | None = None) -> str:
    """Why a prompt will not do; empty if it will. A written one must mention what its group says."""
    if not prompt:
        return "the prompt is empty"
    if len(prompt) > 500 or not prompt.isprintable():
        return "the prompt is too long or holds odd characters"
    if group is None or record is None:
        return ""
    words = prompt.lower()
    lacking = [record[name] for name in group.must_mention if record[name].lower() not in words]
    return f"the prompt lacks what was asked for (it does not mention {lacking[0]})" if lacking else ""


def write_checked(
    writer: PromptWriter, some: list[tuple[Group, dict[str, str]]], tries: int, seed: int, alike: Alike
) -> list[tuple[str, str]]:
    """(prompt, what is wrong with it or empty) for each record; `alike` knows the prompts of earlier parts and stays as it is."""
    own = Alike(alike.most)
    found: list[tuple[str, str]] = [("", "never written")] * len(some)
    for attempt in range(tries):
        todo = [i for i, (_, wrong) in enumerate(found) if wrong]
        if not todo:
            break
        written = writer.write([some[i][1] for i in todo], seed + 7919 * attempt)
        for i, prompt in zip(todo, written, strict=True):
            wrong = prompt.why if isinstance(prompt, NoAnswer) else check_prompt(prompt, *some[i])
            if not wrong and (alike.find(prompt) or own.find(prompt)):
                wrong = "the prompt is too like an earlier one"
            if not wrong:
                own.add(prompt)
            found[i] = (writable(prompt), wrong)
    return found


def enumerate_samples(
    recipe: FactoryRecipe,
    images_per_prompt: int,
    seed: int,
    start: int,
    some: Sequence[tuple[Group | str, dict[str, str]]],
    prompts: list[tuple[str, str]],
    teachers: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The plan's rows of some prompts, the first of which is number `start`: each picture with its seed and id, drawn by the teacher that
    `teachers` names, or by shares. `sources`, if given, says where each prompt comes from."""
    painters = recipe.make.painters()
    names = [group if isinstance(group, str) else group.name for group, _ in some]
    drawn_by = iter(
        share_out(recipe.make, [name for name in names for _ in range(images_per_prompt)], f"{seed}/{start}")
    )
    rows: list[dict[str, Any]] = []
    for i, ((_, record), (prompt, wrong)) in enumerate(zip(some, prompts, strict=True)):
        for k in range(images_per_prompt):
            own = int.from_bytes(hashlib.sha256(f"{seed}/{start + i}/{k}".encode()).digest()[:6], "big")
            shared = next(drawn_by)
            name = (teachers[i] if teachers else "") or shared
            rows.append(
                {
                    "id": sample_id(painters[name], prompt, own),
                    "prompt": prompt,
                    "group": names[i],
                    "attributes": json.dumps({**record, TEACHER: name} if name else record, ensure_ascii=False),
                    "seed": own,
                    "outcome": DEAD if wrong else PENDING,
                    "reason": f"plan: {wrong}" if wrong else "",
                    "source": sources[i] if sources else None,
                }
            )
    return rows


def _without_doubles(table: pa.Table) -> pa.Table:
    """An id can only come twice by a wildly unlikely seed; the law counts on each coming once."""
    seen: set[str] = set()
    keep = [not (key in seen or seen.add(key)) for key in table["id"].to_pylist()]
    return table.filter(pa.array(keep, pa.bool_()))


def table_bytes(table: pa.Table) -> bytes:
    """A Parquet file in memory; the same table gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def resolve_models(recipe: FactoryRecipe, here: bool = True) -> None:
    """Refuse unknown models, scorers, taxonomies and sources before any work is done. `here`: workers run on this machine, so what they
    need must be there; of other nodes this one cannot tell."""
    from factory.scorers import check_scores  # it knows the ledger, which knows this module

    for teacher in recipe.make.painters().values():
        resolve(teacher.model)
    if recipe.make.captioner is not None and recipe.make.captioner.kind != "openai":
        resolve(recipe.make.captioner.model)
    if here and recipe.make.captioner is not None and recipe.make.captioner.kind == "vllm":
        find_environment(recipe.make.captioner.environment)
    if recipe.make.scorer.pretrained is None:
        resolve(recipe.make.scorer.model)
    check_scores(recipe)
    attributes = {"group", *([TEACHER] if recipe.make.teachers else [])}
    if recipe.plan.kind == "pictures":
        for name in recipe.plan.paths:
            source_files(name)
        _refuse_unknown_attributes(recipe, attributes | set(recipe.plan.attribute_columns))
        return
    if recipe.plan.kind == "file":
        for name in recipe.plan.paths:
            prompt_file(name)
        refuse_taken_name(recipe, None)
        _refuse_unknown_attributes(recipe, attributes | set(recipe.plan.attribute_columns))
        return
    writer = recipe.plan.writer
    if writer.kind != "openai":
        resolve(writer.model)
    if writer.kind == "vllm" and writer.environment is not None:
        find_environment(writer.environment)
    taxonomy = load_taxonomy(recipe.plan.taxonomy)
    refuse_taken_name(recipe, taxonomy)
    _refuse_unknown_attributes(recipe, attributes.union(*(group.attributes for group in taxonomy.groups)))


def _refuse_unknown_attributes(recipe: FactoryRecipe, known: set[str]) -> None:
    """Raises RecipeError for a rule by an attribute that no sample will have: select would find out after hours of making."""
    for view in ("", *recipe.views):
        rules = recipe.view(view)
        lists = [rule.attributes for rule in (*rules.caps, *rules.wanted)] + [s.within for s in rules.scores.values()]
        if strange := sorted({name for names in lists for name in names} - known):
            near = difflib.get_close_matches(strange[0], known, n=1, cutoff=0.4)
            raise RecipeError(
                f"no sample will have an attribute {strange[0]}",
                where=f"factory.views.{view}" if view else "factory.select",
                remedy=f"{f'Did you mean {near[0]}? ' if near else ''}There are: {', '.join(sorted(known))}",
            )
