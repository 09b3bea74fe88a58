import pytest

from factory.plan import check_prompt
from factory.taxonomy import Group

GROUP = Group(name="things", share=3, attributes={"subject": ["fox", "owl", "key"], "background": ["red", "blue"]})


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
    found = check_prompt(prompt, GROUP, {"subject": "fox", "background": "red"})
    assert wrong in found and bool(wrong) == bool(found)
