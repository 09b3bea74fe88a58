"""What is drawn: quotas to one, exclusions to the last, and the same records for the same seed as ever."""

import hashlib
import itertools
import json
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RecipeError
from cluster.storage import publish_bytes
from factory.draw import draw_records, keep_apart, off_quota
from factory.plan import PLAN_SCHEMA, make_plan, table_bytes
from factory.recipe import FactoryRecipe
from factory.taxonomy import Group, Taxonomy, digest_taxonomy, is_excluded, load_taxonomy

TAXONOMY = Taxonomy(
    groups=[
        Group(name="things", share=3, attributes={"subject": ["fox", "owl", "key"], "background": ["red", "blue"]}),
        Group(name="people", share=1, attributes={"subject": ["judge"], "gender": ["man", "woman"]}),
    ]
)


def test_groups_get_their_share_and_values_come_up_equally_often() -> None:
    records = draw_records(TAXONOMY, 97, seed=1)
    assert len(records) == 97
    groups = Counter(group.name for group, _ in records)
    assert groups == {"things": 73, "people": 24}
    for name in ("subject", "background"):
        counts = Counter(record[name] for group, record in records if group.name == "things")
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_draw_depends_on_the_seed_alone() -> None:
    assert draw_records(TAXONOMY, 40, seed=1) == draw_records(TAXONOMY, 40, seed=1)
    assert draw_records(TAXONOMY, 40, seed=1) != draw_records(TAXONOMY, 40, seed=2)


@pytest.mark.parametrize(
    ("name", "count", "digest"),
    [
        ("zoo:taxonomy.yaml", 512, "5a6871db6d98554735bae12dbad5c764616d1d8b30e84aaba97deebec90e24f2"),
        (
            "recipes/taxonomies/people-and-scenes.yaml",
            1001,
            "53160325963bf3ec634d73e667f0112c33aa6cf0a58e925689f9dd9b7a8f09b5",
        ),
    ],
)
def test_the_shipped_taxonomies_draw_what_they_always_drew(name: str, count: int, digest: str) -> None:
    """A plan that was begun by an earlier version goes on with the same records."""
    records = [[group.name, record] for group, record in draw_records(load_taxonomy(name), count, 7)]
    assert hashlib.sha256(json.dumps(records).encode()).hexdigest() == digest


def people(**keys) -> Group:
    attributes = {"role": ["nun", "judge", "pilot"], "gender": ["man", "woman"], "age": ["young", "old"]}
    return Group(**{"name": "people", "share": 1, "must_mention": ["role"], "attributes": attributes, **keys})


def counts(records: list, name: str) -> Counter:
    return Counter(record[name] for _, record in records)


def test_a_count_is_exact_and_the_rest_is_shared() -> None:
    things = Group(name="things", share=3, attributes={"subject": ["fox"]})
    scenes = Group(name="scenes", share=1, attributes={"subject": ["lake"]})
    both = Taxonomy(groups=[things, people(share=None, count=7), scenes])
    assert Counter(g.name for g, _ in draw_records(both, 100, 0)) == {"things": 70, "people": 7, "scenes": 23}
    assert Counter(g.name for g, _ in draw_records(both, 7, 0)) == {"people": 7}
    with pytest.raises(RecipeError, match="come to 7, but 6"):
        draw_records(both, 6, 0)
    with pytest.raises(RecipeError, match="come to 7, but 9"):
        draw_records(Taxonomy(groups=[people(share=None, count=7)]), 9, 0)
    with pytest.raises(ValueError, match="share or count"):
        people(count=7)


@pytest.mark.parametrize("count", [1, 7, 10, 99])
def test_weights_are_met_to_one(count: int) -> None:
    weights = {"man": 3.0, "woman": 6, "person": 1}
    group = people(attributes={"role": ["judge"], "gender": weights})
    found = counts(draw_records(Taxonomy(groups=[group]), count, 4), "gender")
    assert found.total() == count
    assert all(abs(found[value] - count * weight / 10) < 1 for value, weight in weights.items())


def test_exclusions_hold_and_every_value_comes_up_as_often_as_without_them() -> None:
    rules = [{"role": "nun", "gender": "man"}, {"role": ["judge", "pilot"], "age": "young", "gender": "woman"}]
    free, bound = Taxonomy(groups=[people()]), Taxonomy(groups=[people()], exclude=rules)
    before, after = draw_records(free, 300, 5), draw_records(bound, 300, 5)
    assert any(is_excluded(record, rules) for _, record in before)
    assert not any(is_excluded(record, rules) for _, record in after)
    for name in ("role", "gender", "age"):
        assert counts(before, name) == counts(after, name)
    assert after == draw_records(bound, 300, 5)


def test_where_quotas_and_exclusions_collide_exclusions_win() -> None:
    """Of ten women at most, twenty nuns cannot all be: some nuns become something else, nobody becomes a male nun."""
    group = people(
        attributes={"role": {"nun": 2, "judge": 1}, "gender": {"man": 2, "woman": 1}},
        exclude=[{"role": "nun", "gender": "man"}],
    )
    found = draw_records(Taxonomy(groups=[group]), 30, 5)
    assert len(found) == 30 and not any(r["role"] == "nun" and r["gender"] == "man" for _, r in found)
    assert counts(found, "gender")["woman"] >= 10
    hopeless = people(exclude=[{"gender": ["man", "woman"]}])
    with pytest.raises(RecipeError, match="leave no way"):
        draw_records(Taxonomy(groups=[hopeless]), 3, 0)


def roles(allowed: dict[str, list[str]], tools: list[str]) -> Group:
    """One attribute decides which of another are allowed."""
    exclude = [{"role": role, "tool": [t for t in tools if t not in some]} for role, some in allowed.items()]
    return people(attributes={"role": list(allowed), "tool": tools}, exclude=exclude)


def test_where_no_single_exchange_helps_a_chain_does() -> None:
    """a holds x and may only have z, but whoever has z cannot take x: three must move."""
    group = roles({"a": ["z"], "b": ["x", "y"], "c": ["y", "z"]}, ["x", "y", "z"])
    given = [{"role": "a", "tool": "x"}, {"role": "b", "tool": "y"}, {"role": "c", "tool": "z"}]
    found = keep_apart(given, group, group.exclude, "0", fixed=["role"])
    assert [record["tool"] for record in found] == ["z", "x", "y"]


@given(st.data())
def test_quotas_are_kept_wherever_they_can_be(data: st.DataObject) -> None:
    """Against a search through all assignments: as many records keep their quota as ever can."""
    names, tools = ["a", "b", "c"], ["w", "x", "y", "z"]
    some = st.lists(st.sampled_from(tools), min_size=1, max_size=3, unique=True)
    group = roles(data.draw(st.fixed_dictionaries({name: some for name in names})), tools)
    have = data.draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(tools)), min_size=2, max_size=6))
    given_records = [{"role": role, "tool": tool} for role, tool in have]
    found = keep_apart(given_records, group, group.exclude, "0", fixed=data.draw(st.sampled_from([[], ["role"]])))
    assert not any(is_excluded(record, group.exclude) for record in found)
    column = [tool for _, tool in have]
    possible = any(
        not any(
            is_excluded({"role": role, "tool": tool}, group.exclude)
            for (role, _), tool in zip(have, order, strict=True)
        )
        for order in set(itertools.permutations(column))
    )
    if possible:
        assert Counter(record["tool"] for record in found) == Counter(column)


def test_a_quota_that_cannot_be_kept_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    group = people(
        attributes={"role": {"nun": 2, "judge": 1}, "gender": {"man": 2, "woman": 1}},
        exclude=[{"role": "nun", "gender": "man"}],
    )
    bound = Taxonomy(groups=[group])
    assert "group people: 20 of role nun" not in (told := "; ".join(off_quota(bound, draw_records(bound, 30, 5))))
    assert "not 20" in told or "not 10" in told
    assert off_quota(TAXONOMY, draw_records(TAXONOMY, 97, 1)) == []


def test_many_records_that_cannot_be_kept_apart_take_seconds() -> None:
    group = roles({"a": ["x"], "b": ["x"]}, ["x", "y", "z"])
    began = time.process_time()  # of this process, whoever else has the cores
    draw_records(Taxonomy(groups=[group]), 30_000, 1)
    assert time.process_time() - began < 20


def test_the_shipped_taxonomies_load_and_bad_ones_are_refused(tmp_path) -> None:
    assert len(load_taxonomy("zoo:taxonomy.yaml").groups) == 2
    load_taxonomy("recipes/taxonomies/people-and-scenes.yaml")
    path = tmp_path / "t.yaml"
    path.write_text("groups: [{name: a, share: 1, must_mention: [colour], attributes: {subject: [fox]}}]")
    with pytest.raises(RecipeError, match="colour"):
        load_taxonomy(str(path))
    path.write_text("groups: [{name: a, share: 1, attributes: {subject: []}}]")
    with pytest.raises(RecipeError, match="without values"):
        load_taxonomy(str(path))
    path.write_text("groups: [{name: a, share: -1, attributes: {subject: [fox]}}]")
    with pytest.raises(RecipeError, match=r"groups\.0\.share"):
        load_taxonomy(str(path))


GOOD = {"groups": [{"name": "a", "share": 1, "attributes": {"subject": ["fox", "owl"], "style": ["flat"]}}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exclude": [{"stile": "flat"}]}, "no attribute stile; did you mean style"),
        ({"exclude": [{"subject": "fux"}]}, "subject is never fux; did you mean fox"),
        ({"exclude": [{}]}, "excludes everything"),
        ({"exclude": [{"subject": "fox", "style": ["flat", "3d"]}]}, "style is never 3d"),
        ({"groups": [*GOOD["groups"], *GOOD["groups"]]}, "two groups a"),
        ({"groups": [{**GOOD["groups"][0], "count": 3}]}, "share or count"),
        ({"groups": [{**GOOD["groups"][0], "attributes": {"subject": {"fox": 0}}}]}, "greater than 0"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(RecipeError, match=words):
        load_taxonomy(str(path))


def test_a_taxonomy_that_changes_under_a_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first part and gone on with other words in the file, a plan would be of both."""
    place, out = tmp_path / "taxonomy.yaml", tmp_path / "data"
    tree = {"groups": [{"name": "things", "share": 1, "attributes": {"subject": ["fox", "owl"]}}]}
    place.write_text(yaml.safe_dump(tree))
    recipe = FactoryRecipe.model_validate(
        {
            "plan": {"taxonomy": str(place), "prompts": 600, "writer": {"kind": "transformers", "model": "none"}},
            "make": {
                "teacher": {"kind": "diffusers", "model": "none"},
                "scorer": {"kind": "open_clip", "model": "none"},
            },
        }
    )
    written: list[str] = []

    def part(recipe: object, path: Path, writer: object, some: list, start: int, *_: object) -> pa.Table:
        if start and not written:
            raise KeyboardInterrupt
        row = {"id": f"{start}", "prompt": "p", "outcome": "pending", "reason": ""}
        publish_bytes(path, table_bytes(table := pa.Table.from_pylist([row], schema=PLAN_SCHEMA)))
        return table

    monkeypatch.setattr("factory.plan.written_part", part)
    with pytest.raises(KeyboardInterrupt):
        make_plan(recipe, 0, out)
    written.append("on")
    place.write_text(yaml.safe_dump(tree).replace("owl", "cat"))
    with pytest.raises(RecipeError, match="was changed since the plan was begun"):
        make_plan(recipe, 0, out)
    assert not (out / "plan.parquet").exists()
    place.write_text("# only a remark\n" + yaml.safe_dump(tree))
    assert make_plan(recipe, 0, out).exists()
    assert digest_taxonomy(load_taxonomy(str(place))) == (out / "plan" / "taxonomy.sha256").read_text()
