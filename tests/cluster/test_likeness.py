"""Keys that decide nothing are taken out wherever they stand; what is left is compared key by key."""

from __future__ import annotations

from cluster.likeness import first_difference, without


def test_keys_are_taken_out_of_a_copy_at_any_depth() -> None:
    tree = {"a": {"x": 1, "y": 2}, "list": [{"x": 1}, {"x": 2, "y": 3}, 4], "named": {"one": {"x": 1}, "two": 5}}
    left = without(tree, [("a", "x"), ("list", "*", "x"), ("named", "*", "x"), ("none", "x"), ("a", "y", "z")])
    assert left == {"a": {"y": 2}, "list": [{}, {"y": 3}, 4], "named": {"one": {}, "two": 5}}
    assert tree["a"] == {"x": 1, "y": 2}


def test_the_first_difference_is_named_by_its_key() -> None:
    assert first_difference({"a": 1}, {"a": 1}) == ""
    assert first_difference({"a": {"b": 1}, "c": 2}, {"a": {"b": None}, "c": 3}) == "a.b is 1 there and null now"
    assert first_difference({"a": [1]}, {"a": [1], "d": "x"}) == 'd is null there and "x" now'
