from collections import Counter

import pytest

from cluster.errors import RecipeError
from factory.plan import Group, Taxonomy, check_prompt, draw_records, load_taxonomy

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
    ("prompt", "wrong"),
    [
        ("a Fox on red", ""),
        ("", "empty"),
        ("an owl", "does not mention fox"),
        ("fox" * 200, "too long"),
        ("fox \x00", "odd"),
    ],
)
def test_a_prompt_must_say_what_it_is_about(prompt: str, wrong: str) -> None:
    found = check_prompt(prompt, TAXONOMY.groups[0], {"subject": "fox", "background": "red"})
    assert wrong in found and bool(wrong) == bool(found)


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
