"""IS and FID: torch-fidelity's own formulas on a small network of ours where the package is there, a stand-in for the wiring elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import trainer.fidelity as fidelity_module
from cluster.errors import StageError, TargetUnavailable
from tests.trainer.test_measure import recipe, student
from trainer.fidelity import Inception, fidelity
from trainer.measure import evaluate, table

__all__ = ["student"]  # a fixture
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="pip install 'edgefusion[fidelity]' (torch-fidelity)"
)
WIDTH = 8


class Tiny(torch.nn.Module):
    """Features and logits of pictures by fixed random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.randn((3 * 64, WIDTH + 5), generator=torch.Generator().manual_seed(0))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        small = torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 8).flatten(1)
        return tuple((small @ self.project).split([WIDTH, 5], dim=1))


@pytest.fixture
def tiny_network(monkeypatch) -> None:
    """In place of Inception and its 90 MB of weights; the formulas stay the package's."""
    import torch_fidelity  # pyright: ignore[reportMissingImports]
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # pyright: ignore[reportMissingImports]

    class Extractor(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_more: object) -> None:
            super().__init__(name, features_list)
            self.tiny = Tiny()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (str(WIDTH), "logits_unbiased")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return {"isc": "logits_unbiased", "fid": str(WIDTH)}[metric]

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
            both = dict(zip(self.get_provided_features_list(), self.tiny(pictures), strict=True))
            return tuple(both[name] for name in self.features_list)

    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "tiny", Extractor)
    monkeypatch.setattr(fidelity_module, "EXTRACTOR", "tiny")
    monkeypatch.setattr(fidelity_module, "FEATURES", str(WIDTH))


@needs_package
def test_values_are_those_of_the_packages_own_command(tiny_network, tmp_path) -> None:
    from torch_fidelity import calculate_metrics  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    sets = [rng.integers(low, 256, (40, 16, 16, 3), dtype=np.uint8) for low in (0, 60)]
    for name, pictures in zip(("made", "real"), sets, strict=True):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{i:03d}.png")
    wanted = calculate_metrics(
        input1=str(tmp_path / "made"),
        input2=str(tmp_path / "real"),
        isc=True,
        fid=True,
        feature_extractor="tiny",
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )
    network = Inception(16)
    made, real = (network.pictures(list(part)) for part in sets)
    found = fidelity(made, real)
    for name, said in (("inception_score", "inception_score_mean"), ("fid", "frechet_inception_distance")):
        interval = found[name]
        assert interval is not None and interval.value == pytest.approx(wanted[said], rel=1e-5)
        assert interval.low < interval.value < interval.high
    alone = fidelity(made, None)
    assert alone["fid"] is None and alone["inception_score"] == found["inception_score"]
    assert fidelity(made[:9], real)["inception_score"] is None


@needs_package
def test_weights_that_cannot_be_fetched_are_said_plainly(monkeypatch) -> None:
    import torch_fidelity.feature_extractor_inceptionv3 as theirs  # pyright: ignore[reportMissingImports]

    def no_network(*_: object, **__: object) -> None:
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(theirs, "load_state_dict_from_url", no_network)
    with pytest.raises(StageError, match=r"no network.*need a network once, or a filled cache"):
        Inception(256)


def test_fidelity_without_its_package_is_refused_before_anything_is_drawn(
    tiny_models, student, data, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(TargetUnavailable, match=r"pip install 'edgefusion\[fidelity\]'"):
        evaluate(recipe(tiny_models, data, student, fidelity=True), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stand_in(monkeypatch) -> list[tuple[int, ...]]:
    """The parts of the package that are used, for machines without it; the shapes of what the network was shown."""
    shown: list[tuple[int, ...]] = []

    def network(*_: object, **__: object) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
        tiny = Tiny()

        def look(pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert pictures.dtype == torch.uint8
            shown.append(tuple(pictures.shape))
            return tiny(pictures)

        return look

    def statistics(x: torch.Tensor) -> dict[str, Any]:
        return {"x": x}

    package: Any = types.ModuleType("torch_fidelity")
    utils: Any = types.ModuleType("torch_fidelity.utils")
    utils.create_feature_extractor = network
    package.metric_isc = types.SimpleNamespace(isc_features_to_metric=lambda *_: {"inception_score_mean": 1.5})
    package.metric_fid = types.SimpleNamespace(
        fid_features_to_statistics=statistics,
        fid_statistics_to_metric=lambda *_: {"frechet_inception_distance": 7.0},
    )
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    monkeypatch.setattr(fidelity_module, "FEATURES", str(WIDTH))
    return shown


def test_both_sets_are_seen_at_the_published_size_and_references_once(
    tiny_models, student, data, tmp_path, stand_in
) -> None:
    settings = recipe(tiny_models, data, student, fidelity=True, fidelity_px=64)
    row = evaluate(settings, tmp_path)["rows"][-1]
    assert set(stand_in) == {(12, 3, 64, 64)} and len(stand_in) == 3  # references, 2 steps, 1 step
    assert row["fid"]["value"] == 7.0 and row["fid"]["low"] < 7.0 < row["fid"]["high"]
    assert row["inception_score"]["low"] < row["inception_score"]["high"]
    evaluate(settings, tmp_path)
    assert len(stand_in) == 3  # all of it was kept


def test_fidelity_without_references_says_so_and_gives_the_score_alone(
    tiny_models, student, tmp_path, stand_in, caplog
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"thing {i}\n" for i in range(12)))
    report = evaluate(
        recipe(tiny_models, None, student, prompts=str(prompts), fidelity=True, steps=[1]), tmp_path / "out"
    )
    (row,) = report["rows"]
    assert row["fid"] is None and row["inception_score"]["value"] == 1.5
    assert report["absent"]["fid"] == "no reference pictures; give --data"
    assert "no cmmd and fid_judge and fid: no reference pictures" in str(table(report).caption)
    assert "there will be no FID: no reference pictures; give --data" in caplog.text  # before the hours of drawing


def test_too_few_pictures_for_the_score_are_said(tiny_models, student, data, tmp_path: Path, stand_in) -> None:
    report = evaluate(recipe(tiny_models, data, student, fidelity=True, steps=[1], count=7), tmp_path)
    assert report["rows"][-1]["inception_score"] is None
    assert report["absent"]["inception_score"] == "its 10 splits need as many pictures; raise --count"
    assert "covariances of 2048 features rest on 7 pictures" in report["notes"][-1]
