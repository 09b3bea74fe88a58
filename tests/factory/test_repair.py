"""What is broken comes back to the byte, as long as the ledger stands."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import CorruptShard, LedgerConflict
from factory.cli import app
from factory.dead import captions_before
from factory.decisions import Overlay
from factory.ledger import read_entry, read_pictures
from factory.pack import MANIFEST
from factory.verify import verify


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def packed(dataset: Path, ids: list[str]) -> Path:
    """`dataset` in shards of 5, with a view by a rule of the command line and decisions."""
    recipe = dataset.parent / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("trainer:", "  pack: {samples_per_shard: 5}\ntrainer:"))
    Overlay(dataset).decide(ids[21], {"verdict": "keep", "caption": "an owl in the snow"}, "bob")
    run("select", dataset, "--recipe", recipe)
    run("select", dataset, "--recipe", recipe, "--name", "few", "--rule", "best=7", "--rule", "people=ignore")
    return dataset


def flip(path: Path, place: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of a shard": lambda d: flip(d / "shard-000001.tar"),
    "a missing shard": lambda d: (d / "shard-000002.tar").unlink(),
    "a truncated shard": lambda d: (d / "shard-000000.tar").write_bytes((d / "shard-000000.tar").read_bytes()[:900]),
    "two shards": lambda d: [flip(d / "shard-000000.tar"), (d / "shard-000003.tar").unlink()],
    "a stray shard": lambda d: (d / "shard-000009.tar").write_bytes(b"x"),
    "a missing manifest": lambda d: (d / MANIFEST).unlink(),
    "a bit of the manifest": lambda d: flip(d / MANIFEST, 40),
    "a truncated manifest": lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:300]),
    "a bit of the selection": lambda d: flip(d / "selection.parquet", 30),
    "a missing summary": lambda d: (d / "selection.json").unlink(),
    "a missing card": lambda d: (d / "README.md").unlink(),
    "a view's shard": lambda d: flip(d / "views" / "few" / "shard-000001.tar"),
    "a view's manifest": lambda d: (d / "views" / "few" / MANIFEST).unlink(),
    "everything but the ledger": lambda d: (
        [p.unlink() for p in d.iterdir() if p.suffix in (".tar", ".png", ".md")]
        + [(d / MANIFEST).unlink(), (d / "selection.parquet").unlink()]
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_the_ledger_can_rebuild_comes_back_to_the_byte(packed: Path, what: str) -> None:
    whole = contents(packed)
    recipe = packed.parent / "recipe.yaml"
    DAMAGE[what](packed)
    assert contents(packed) != whole
    run("repair", packed, "--recipe", recipe)
    assert contents(packed) == whole
    assert "whole, nothing to do" in run("repair", packed, "--recipe", recipe)


@pytest.mark.parametrize(
    "what", ["a bit of the manifest", "a missing manifest", "two shards", "a bit of the selection"]
)
def test_what_a_run_was_trained_on_comes_back_too(packed: Path, what: str) -> None:
    whole, recipe = contents(packed), packed.parent / "recipe.yaml"
    (packed.parent / "training").mkdir()
    DAMAGE[what](packed)
    run("repair", packed, "--recipe", recipe)
    assert contents(packed) == whole


def test_what_is_refused_is_left_as_it_is(packed: Path, ids: list[str]) -> None:
    """It cannot come back as it was: people decided anew, and a run was trained on it."""
    (packed.parent / "training").mkdir()
    Overlay(packed).decide(ids[22], {"verdict": "reject", "reason": "odd"}, "ada")
    flip(packed / MANIFEST, 40)
    broken = contents(packed)
    with pytest.raises(LedgerConflict, match="training in"):
        run("repair", packed, "--recipe", packed.parent / "recipe.yaml")
    assert contents(packed) == broken


def test_only_what_is_broken_is_written(packed: Path) -> None:
    flip(packed / "shard-000001.tar")
    before = {p: p.stat().st_mtime_ns for p in packed.glob("*.tar")}
    output = run("repair", packed, "--recipe", packed.parent / "recipe.yaml")
    assert output.splitlines() == ["written anew: shard-000001.tar"]
    changed = [p.name for p, then in before.items() if p.stat().st_mtime_ns != then]
    assert changed == ["shard-000001.tar"]


def test_a_damaged_unit_is_given_back_to_make(packed: Path) -> None:
    flip(packed / "pictures" / "unit-00001.parquet")
    entry = packed / "ledger" / "unit-00002.parquet"
    entry.write_bytes(entry.read_bytes()[:200])
    output = run("repair", packed, "--recipe", packed.parent / "recipe.yaml")
    assert "unit-00001: its pictures" in output and "unit-00002" in output and "run the recipe again" in output
    assert sorted(p.name for p in (packed / "ledger").iterdir()) == ["unit-00000.parquet"]
    assert len(captions_before(packed, "unit-00001")) == 8, "what the entry still tells is not asked for again"
    assert captions_before(packed, "unit-00002") == {}, "this one tells nothing"
    with pytest.raises(CorruptShard, match="no manifest"):
        verify(packed)


def test_a_damaged_unit_stays_once_something_was_built_on_it(packed: Path) -> None:
    (packed.parent / "student").mkdir()
    flip(packed / "pictures" / "unit-00001.parquet")
    broken = contents(packed)
    with pytest.raises(LedgerConflict, match="student there was made from the data set as it is"):
        run("repair", packed, "--recipe", packed.parent / "recipe.yaml")
    assert contents(packed) == broken


def test_damaged_pictures_name_their_remedy(packed: Path) -> None:
    flip(packed / "pictures" / "unit-00001.parquet")
    with pytest.raises(CorruptShard, match=r"edgefusion factory repair .* makes unit-00001 anew"):
        list(read_pictures(packed, "unit-00001", read_entry(packed, "unit-00001")[0]["pictures_sha256"]))


def test_pictures_are_read_once_however_many_shards_are_broken(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = contents(packed), list[str]()

    def counted(folder: Path, unit: str, sha256: str) -> Iterator[tuple[str, bytes]]:
        read.append(unit)
        return read_pictures(folder, unit, sha256)

    for number in range(3):
        flip(packed / f"shard-{number:06d}.tar")
    monkeypatch.setattr("factory.make.read_pictures", counted)
    run("repair", packed, "--recipe", packed.parent / "recipe.yaml")
    assert contents(packed) == whole and len(read) == len(set(read)) == 3
