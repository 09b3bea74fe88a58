"""From decisions to shards: factory select, decisions export and import, and what the manifest remembers."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import CorruptShard, EdgeFusionError, LedgerConflict, RecipeError
from cluster.progress import progress_bars
from cluster.recipe import load_recipe
from edgefusion import DEFAULT_RECIPE, Chain, Recipe
from factory.cli import _FactoryPart, app
from factory.decisions import Decision, Overlay, read_decisions
from factory.exchange import export_decisions, import_decisions
from factory.make import is_packed, select_and_pack
from factory.pack import packed_decisions, read_manifest, read_shard
from factory.recipe import SelectRecipe
from factory.retry import refuse_if_built
from factory.verify import verify


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


HEARD = ("factory.select.people=apply", "factory.views={}")
"""People have the last word on the one selection; the pocket recipe gives them one beside it."""


def select_command(dataset: Path) -> str:
    return run("select", dataset, "--recipe", dataset.parent / "recipe.yaml")


def test_decisions_reach_the_shards_and_without_them_nothing_changes(dataset: Path, ids: list[str]) -> None:
    assert "kept 18 + rejected 5 + dead 1" in select_command(dataset)
    plain = {p.name: p.read_bytes() for p in dataset.glob("*.*")}
    overlay = Overlay(dataset)
    overlay.decide(ids[0], {"verdict": "keep"}, "ada")  # scores 0
    overlay.decide(ids[20], {"verdict": "reject", "reason": "odd: hands"}, "ada")
    overlay.decide(ids[21], {"caption": "an owl in the snow"}, "bob")
    assert not is_packed(dataset, SelectRecipe())
    output = select_command(dataset)
    assert "kept 18 + rejected 5 + dead 1" in output and "rejected: human: 1" in output and "1 captions fixed" in output
    assert is_packed(dataset, SelectRecipe()) and packed_decisions(dataset) and verify(dataset) == 18
    prompts = {row["id"]: row["prompt"] for row in read_manifest(dataset)}
    assert ids[0] in prompts and ids[20] not in prompts and prompts[ids[21]] == "an owl in the snow"
    members = dict(read_shard(dataset / "shard-000000.tar"))
    assert members[ids[21]]["txt"].decode() == "an owl in the snow"
    assert json.loads(members[ids[21]]["json"])["original_prompt"].startswith("a fox number 21")
    assert "original_prompt" not in json.loads(members[ids[0]]["json"])
    for key in (ids[0], ids[20]):
        overlay.decide(key, {"verdict": None}, "ada")
    overlay.decide(ids[21], {"caption": None}, "ada")
    select_command(dataset)
    assert {name: (dataset / name).read_bytes() for name in plain} == plain


def digests(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_selections_lie_side_by_side_over_one_ledger(dataset: Path, ids: list[str]) -> None:
    """`synt` as the rules say, `synt-cur` what people kept, and one that only the command line knows."""
    recipe = dataset.parent / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("trainer:", "  views: {synt: {people: ignore}, synt-cur: {people: only}}\ntrainer:")
    )
    overlay = Overlay(dataset)
    overlay.decide(ids[20], {"verdict": "reject", "reason": "odd"}, "ada")
    overlay.decide(ids[21], {"verdict": "keep", "caption": "an owl in the snow"}, "bob")
    overlay.decide(ids[0], {"verdict": "keep"}, "ada")
    output = select_command(dataset)
    assert (
        "kept 18 " in output
        and f"{dataset / 'views' / 'synt-cur'}: planned 24 = kept 2 + rejected 21 + dead 1" in output
    )
    assert output.endswith("people decided on 3 pictures, 1 captions fixed\n"), "the main one of this recipe hears them"
    assert "of which this selection hears nothing" in run("select", dataset, "--name", "synt", "--recipe", recipe)
    synt, curated = dataset / "views" / "synt", dataset / "views" / "synt-cur"
    assert (verify(dataset), verify(synt), verify(curated)) == (18, 18, 2)
    prompts = {row["id"]: row["prompt"] for row in read_manifest(curated)}
    assert prompts == {ids[0]: "a fox number 0 <b>&amp;", ids[21]: "an owl in the snow"}
    assert "an owl in the snow" not in {row["prompt"] for row in read_manifest(synt)} and packed_decisions(synt) == ""
    main = digests(dataset)
    output = run(
        "select", dataset, "--name", "best-4", "--recipe", recipe, "--rule", "best=4", "--rule", "people=ignore"
    )
    assert "kept 4 " in output and "not among the best 4: 14" in output
    assert {row["id"] for row in read_manifest(dataset / "views" / "best-4")} == set(ids[20:])
    assert digests(dataset) == main, "another selection leaves the main one alone"
    before = digests(curated)
    run("select", dataset, "--name", "synt-cur", "--recipe", recipe)
    assert digests(curated) == before
    listed = run("views", dataset)
    assert "best-4: kept 4 of 24" in listed and "synt-cur: kept 2 of 24" in listed and "(main): kept 18" in listed
    assert "evenness of subject: 1.0 planned" in listed


def test_bad_names_and_rules_say_what_is_wrong(dataset: Path) -> None:
    recipe = dataset.parent / "recipe.yaml"
    for words, told in (
        (["--name", "../x"], r"'\.\./x' is no name"),
        (["--name", "a", "--rule", "best"], "--rule takes key=value"),
        (["--name", "a", "--rule", "min_clop=1"], "Did you mean min_clip"),
        (["--name", "a", "--rule", "scores.beauty.least=1"], r"no score beauty.*clip_score"),
        (
            ["--name", "a", "--rule", "caps=[{attributes: [tone], most: 1}]"],
            r"no sample has an attribute tone.*subject",
        ),
        (["--rule", "best=4"], "--rule is for a selection with a --name"),
    ):
        with pytest.raises(RecipeError, match=told):
            run("select", dataset, "--recipe", recipe, *words)
    recipe.write_text(recipe.read_text().replace("trainer:", "  views: {a: {min_clip: 3}}\ntrainer:"))
    with pytest.raises(RecipeError, match=r"views\.a\.min_clip"):
        run("select", dataset, "--recipe", recipe)


def test_what_was_trained_on_stays_as_it_is(dataset: Path, ids: list[str]) -> None:
    recipe, training = dataset.parent / "recipe.yaml", dataset.parent / "training"
    recipe.write_text(recipe.read_text().replace("trainer:", "  views: {few: {best: 6}}\ntrainer:"))
    select_command(dataset)
    run("select", dataset, "--name", "late", "--recipe", recipe, "--rule", "best=4")
    training.mkdir()
    (training / "data.json").write_text(json.dumps([{"data": str(dataset / "views" / "late"), "samples": 4}]))
    views = [dataset / "views" / name for name in ("few", "late")]

    def packed() -> list[dict[str, bytes]]:
        return [{n: d for n, d in digests(p).items() if n != "decisions.jsonl"} for p in (dataset, *views)]

    before = packed()
    assert "kept 18 " in select_command(dataset), "the same comes out"
    run("select", dataset, "--name", "late", "--recipe", recipe, "--rule", "best=4")
    assert packed() == before
    for change in ("factory.select.min_clip=0.5", "factory.select.best=17", "factory.pack.samples_per_shard=5"):
        with pytest.raises(
            LedgerConflict, match=r"dataset: training in .* was made from the selection as it is.*--name NAME"
        ):
            run("select", dataset, "--recipe", recipe, "--set", change)
    with pytest.raises(LedgerConflict, match="views/late: training in"):
        run("select", dataset, "--name", "late", "--recipe", recipe, "--rule", "best=5")
    mark = Overlay(dataset).decide(ids[20], {"caption": "an owl"}, "ada")
    with pytest.raises(LedgerConflict, match="training in"):
        select_command(dataset)
    assert packed() == before
    # Nobody was trained on these.
    assert "kept 5 " in run("select", dataset, "--name", "few", "--recipe", recipe, "--rule", "best=5")
    assert "kept 3 " in run("select", dataset, "--name", "new", "--recipe", recipe, "--rule", "best=3")
    # What lost its manifest is packed again if it comes out the same.
    (dataset / "manifest.parquet").unlink()
    with pytest.raises(LedgerConflict, match="training in"):
        select_command(dataset)
    Overlay(dataset).decide(ids[20], {"caption": None}, "ada", expect=mark.number)
    select_command(dataset)
    assert packed()[0] == before[0]


@pytest.mark.parametrize("way", ["from inside", "by a link"])
def test_what_was_trained_on_is_known_by_any_way_to_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    recipe = (dataset.parent / "recipe.yaml").resolve()
    select_command(dataset)
    run("select", dataset, "--name", "late", "--recipe", recipe, "--rule", "best=4")
    (dataset.parent / "training").mkdir()
    told = [{"data": str(dataset / "views" / "late"), "samples": 4}]
    (dataset.parent / "training" / "data.json").write_text(json.dumps(told))
    monkeypatch.chdir(dataset)
    (tmp_path / "link").symlink_to(dataset)
    place = Path() if way == "from inside" else tmp_path / "link"
    with pytest.raises(LedgerConflict, match=f"training in {dataset.parent} was made from"):
        run("select", place, "--recipe", recipe, "--set", "factory.select.min_clip=0.5")
    with pytest.raises(LedgerConflict, match=f"training in {dataset.parent} was made from"):
        run("select", place, "--name", "late", "--recipe", recipe, "--rule", "best=5")
    with pytest.raises(LedgerConflict, match=f"{dataset.parent}: training there was made from"):
        refuse_if_built(place)


@pytest.mark.parametrize("change", ["factory.select.min_clip=0.5", "factory.pack.samples_per_shard=5"])
@pytest.mark.parametrize("at", ["factory.make.pack", "factory.pack.publish_bytes"])
def test_killed_while_it_packs_anew_the_old_manifest_vouches_for_nothing(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, change: str, at: str
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    select_command(dataset)
    words = ["select", str(dataset), "--recipe", str(dataset.parent / "recipe.yaml")]
    monkeypatch.setattr(at, killed)
    CliRunner().invoke(app, words)
    assert verify(dataset) == 18, "the same again: it was true all the time"
    CliRunner().invoke(app, [*words, "--set", change])
    with pytest.raises(CorruptShard, match="there is no manifest"):
        verify(dataset)
    monkeypatch.undo()
    select_command(dataset)
    assert verify(dataset) == 18


def test_the_recipe_of_the_run_is_the_default(dataset: Path) -> None:
    recipe = load_recipe(_FactoryPart, dataset.parent / "recipe.yaml", ["factory.select.min_clip=0.5"])
    record = {"recipe": {**recipe.model_dump(mode="json"), "trainer": {}}}
    (dataset.parent / "run.json").write_text(json.dumps(record))
    assert "kept 12 + rejected 11 + dead 1" in run("select", dataset)
    assert select_and_pack(recipe.factory, dataset)["kept"] == 12


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_decisions_go_out_and_come_back(dataset: Path, ids: list[str], tmp_path: Path, kind: str) -> None:
    overlay = Overlay(dataset)
    overlay.decide(ids[0], {"verdict": "keep"}, "ada")
    overlay.decide(ids[1], {"verdict": "reject", "reason": 'comma, "quote"; =1+1'}, "ada")
    overlay.decide(ids[2], {"caption": "ein Füchschen, rot"}, "bob")
    overlay.decide(ids[3], {"verdict": "keep"}, "bob")
    overlay.decide(ids[3], {"verdict": None}, "bob")
    before = read_decisions(dataset)
    table = tmp_path / f"decisions.{kind}"
    assert "wrote 3 decisions" in run("decisions", "export", dataset, table)
    (dataset / "decisions.jsonl").unlink()
    assert "3 new decisions" in run("decisions", "import", dataset, table)
    assert read_decisions(dataset) == before
    assert import_decisions(dataset, table) == 0  # they stand already


def test_a_bad_row_imports_nothing(dataset: Path, ids: list[str], tmp_path: Path) -> None:
    table = tmp_path / "some.csv"
    for bad in (
        {"id": "f" * 64, "verdict": "keep"},
        {"id": ids[1], "verdict": "perhaps"},
        {"id": ids[1], "verdict": "reject"},
    ):
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "verdict"])
            writer.writeheader()
            writer.writerows([{"id": ids[0], "verdict": "keep"}, bad])
        with pytest.raises(EdgeFusionError, match="row 2"):
            import_decisions(dataset, table)
        assert read_decisions(dataset) == {}
    table.write_text("id,opinion\n" + ids[0] + ",good\n")
    with pytest.raises(EdgeFusionError, match="opinion is no column"):
        import_decisions(dataset, table)
    (tmp_path / "some.parquet").write_bytes(b"PAR1")
    with pytest.raises(EdgeFusionError, match="cannot be read as Parquet") as caught:
        import_decisions(dataset, tmp_path / "some.parquet")
    assert "Delete" not in str(caught.value), "it is the user's own file"
    with pytest.raises(EdgeFusionError, match=r"neither \.csv nor"):
        export_decisions(dataset, tmp_path / "x.txt")


def test_an_import_wins_over_what_stands(dataset: Path, ids: list[str], tmp_path: Path) -> None:
    overlay = Overlay(dataset)
    overlay.decide(ids[0], {"verdict": "keep"}, "ada")
    export_decisions(dataset, tmp_path / "d.csv")
    overlay.decide(ids[0], {"verdict": "reject", "reason": "odd"}, "bob")
    assert import_decisions(dataset, tmp_path / "d.csv") == 1
    assert read_decisions(dataset)[ids[0]] == Decision(
        ids[0], "keep", "", None, "ada", read_decisions(dataset)[ids[0]].when
    )


def test_the_chain_packs_again_after_decisions_but_not_under_a_training(
    dataset: Path, ids: list[str], tmp_path: Path
) -> None:
    small = ["factory.make.unit_images=8", "factory.make.teacher.batch_images=8", *HEARD]
    chain = Chain(load_recipe(Recipe, DEFAULT_RECIPE, small), tmp_path / "out")
    shutil.copytree(dataset, chain.data)
    with progress_bars() as bars:
        chain.facts |= chain._select(bars)
        assert chain._is_done("select")
        mark = Overlay(chain.data).decide(ids[20], {"verdict": "reject", "reason": "odd"}, "ada")
        assert not chain._is_done("select")
        chain.training.mkdir()
        with pytest.raises(LedgerConflict, match="after training began"):
            chain.run("report")
        chain.training.rmdir()
        chain.facts |= chain._select(bars)
    assert chain._is_done("select") and chain.facts["funnel"]["reasons"]["rejected: human"] == 1
    Overlay(chain.data).decide(ids[20], {"verdict": None}, "ada", expect=mark.number)
    select_and_pack(chain.recipe.factory, chain.data)  # as `factory select` does: the run's own counts are stale now
    assert not chain._is_done("select")


def test_where_people_count_for_nothing_the_chain_does_not_wait_for_them(
    dataset: Path, ids: list[str], tmp_path: Path
) -> None:
    small = ["factory.make.unit_images=8", "factory.make.teacher.batch_images=8", "factory.select.people=ignore"]
    chain = Chain(load_recipe(Recipe, DEFAULT_RECIPE, [*small, "factory.views={}"]), tmp_path / "out")
    heard = Chain(load_recipe(Recipe, DEFAULT_RECIPE, [*small, "factory.views={cur: {people: apply}}"]), tmp_path / "b")
    for one in (chain, heard):
        shutil.copytree(dataset, one.data)
        Overlay(one.data).decide(ids[20], {"verdict": "reject", "reason": "odd"}, "ada")
        with progress_bars() as bars:
            one.facts |= one._select(bars)
        assert one._is_done("select")
        Overlay(one.data).decide(ids[21], {"verdict": "reject", "reason": "odd"}, "ada")
    assert chain._is_done("select") and not heard._is_done("select"), "one of its selections listens"
    chain.training.mkdir()
    assert chain._todo(("select", "train", "student")) == ["train", "student"]


def test_licences_that_are_named_later_reach_the_cards_of_a_finished_run(dataset: Path, tmp_path: Path) -> None:
    small = ["factory.make.unit_images=8", "factory.make.teacher.batch_images=8", "factory.views={few: {best: 4}}"]
    named = [*small, "factory.sources=[{name: pictures of somebody, licence: CC-BY-4.0}]"]

    def chain(changes: list[str]) -> Chain:
        return Chain(load_recipe(Recipe, DEFAULT_RECIPE, changes), tmp_path / "out")

    first = chain(small)
    shutil.copytree(dataset, first.data)
    with progress_bars() as bars:
        first.facts |= first._select(bars)
        del first.facts["card_sources"]  # as an earlier version left it
        first._save()
        assert chain(small)._is_done("select")
        first.training.mkdir()
        shards = {p: p.stat().st_mtime_ns for p in first.data.rglob("*") if p.suffix in (".tar", ".parquet")}
        later = chain(named)
        assert later._todo(("select",)) == ["select"]
        later._save()  # killed after its first file: the cards are still to be written
        later = chain(named)
        later.facts |= later._select(bars)
        later._save()
    assert chain(named)._is_done("select") and not chain(small)._is_done("select")
    for place in (first.data, first.data / "views" / "few"):
        assert "| `pictures of somebody` |  | CC-BY-4.0 |" in (place / "README.md").read_text()
        assert "CC-BY-4.0" in (place / "croissant.json").read_text()
    assert {p: p.stat().st_mtime_ns for p in shards} == shards, "no shard is written anew"
