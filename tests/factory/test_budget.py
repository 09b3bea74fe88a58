"""A limit on what captions cost: over workers that know only the folder, over kills, and over a whole run that goes on when it is raised."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chain import what_is_made
from cluster.errors import StageError
from cluster.runner import InProcess
from cluster.usage import JOURNAL, Meter, Prices, files_of_usage, read_usage
from factory.budget import ASIDE, Budget, budget_of, forget_set_aside
from factory.make import make
from factory.plan import make_plan
from factory.recipe import FactoryRecipe, OpenAiCaptioner, TransformersCaptioner
from factory.units import units_left
from tests.answering import Answer, Answering

ONE = Prices(0.0, 1e6)
"""A written token costs 1."""


def ask(budget: Budget, unit: int, answers: int, tokens: int = 1, within: Any = lambda: None) -> None:
    """What a captioning worker does with a unit."""
    journal = budget.folder / f"unit-{unit:05d}{JOURNAL}"
    meter = Meter(ONE)
    meter.note_in(journal)
    with budget.set_aside(journal, answers):
        for _ in range(answers):
            meter.add({"usage": {"prompt_tokens": 7, "completion_tokens": tokens}})
        within()


def spent(folder: Path) -> float:
    return read_usage(files_of_usage(folder)).cost or 0.0


@pytest.mark.parametrize("limit", [1.0, 37.0, 40.0, 400.0])
def test_workers_that_see_one_folder_never_spend_more_together(limit: float, tmp_path: Path) -> None:
    """24 units of 4 captions at 1 each; a stop leaves at most what the units at work would have cost."""

    def work(own: range) -> bool:
        budget = Budget(tmp_path, ONE, limit, longest=1.0)
        try:
            for unit in own:
                ask(budget, unit, 4)
        except StageError as error:
            assert "more than max_cost" in str(error)
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, (range(i, 24, 4) for i in range(4))))
    assert spent(tmp_path) <= limit and all(done) == (limit == 400)
    assert limit == 400 or spent(tmp_path) > limit - 4 * 4 - 1
    assert not list(tmp_path.glob(f"*{ASIDE}"))


def test_what_others_are_at_counts_until_it_is_spent(tmp_path: Path) -> None:
    first, second = Budget(tmp_path, ONE, 10, longest=2.0), Budget(tmp_path, ONE, 10, longest=2.0)

    def meanwhile() -> None:
        # Three at the longest are set aside, and all three came and cost 1: that is the mean by now.
        with pytest.raises(
            StageError, match=r"3\.00 is spent, 3\.00 set aside .*the next 5 captions would cost about 5\.00"
        ):
            ask(second, 1, 5)
        ask(second, 1, 4)

    ask(first, 0, 3, within=meanwhile)
    assert spent(tmp_path) == 7
    ask(second, 2, 3)
    with pytest.raises(
        StageError, match=r"10\.00 is spent, and the next 1 captions would cost about 1\.00: more than max_cost \(10\)"
    ):
        ask(first, 3, 1)


def test_a_killed_worker_s_answers_count_and_what_it_set_aside_does_not(tmp_path: Path) -> None:
    def killed() -> None:
        (tmp_path / f"unit-00009{ASIDE}").write_text(json.dumps({"upto": 1e9}))

    ask(Budget(tmp_path, ONE, 10, longest=1.0), 0, 3, within=killed)
    with pytest.raises(StageError, match="set aside"):
        ask(Budget(tmp_path, ONE, 10, longest=1.0), 1, 1)
    forget_set_aside(tmp_path)
    with pytest.raises(StageError, match=r"3\.00 is spent, and the next 8"):
        ask(Budget(tmp_path, ONE, 10, longest=1.0), 1, 8)
    # The same unit again, as after a kill in the midst of it: what it cost before is not given back.
    ask(Budget(tmp_path, ONE, 10, longest=1.0), 0, 7)
    assert spent(tmp_path) == 10


def test_only_a_server_with_a_limit_has_a_budget(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"model": "m", "base_url": "http://x/v1"}
    assert budget_of(TransformersCaptioner(model="m"), tmp_path) is None
    assert budget_of(OpenAiCaptioner(**keys, price_input=1, price_output=1), tmp_path) is None
    with pytest.raises(ValueError, match="max_cost needs price_input and price_output"):
        OpenAiCaptioner(**keys, max_cost=3)
    found = budget_of(OpenAiCaptioner(**keys, price_input=1, price_output=2, max_cost=3, template="12"), tmp_path)
    assert found is not None and found.longest == pytest.approx((3002 + 2 * 48) / 1e6)


class Server(Answering):
    """Says of each picture how bright it is; ten tokens a caption, unless it counts nothing."""

    def __init__(self) -> None:
        self.asked, self.counts, self.lock = 0, True, threading.Lock()
        super().__init__()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        with self.lock:
            self.asked += 1
        shown = body["messages"][0]["content"][1]["image_url"]["url"]
        usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 10}} if self.counts else {}
        return 200, {"choices": [{"message": {"content": f"a picture of {len(shown)}"}}], **usage}, {}


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen."""
    (folder := tmp_path / "pictures").mkdir()
    for i in range(16):
        sink = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(sink, "PNG")
        (folder / f"{i:02d}.png").write_bytes(sink.getvalue())
        (folder / f"{i:02d}.txt").write_text(f"text {i}")
    return folder


def recipe_of(models: Path, pictures: Path, url: str, **captioner: Any) -> FactoryRecipe:
    own = {"kind": "openai", "model": "m", "base_url": url, "max_new_tokens": 10, **captioner}
    return FactoryRecipe.model_validate(
        {
            "plan": {"kind": "pictures", "paths": [str(pictures)]},
            "make": {
                "crop": {"size_px": 64},
                "captioner": own,
                "scorer": {"kind": "open_clip", "model": str(models / "clip")},
                "unit_images": 4,
            },
        }
    )


def made(recipe: FactoryRecipe, folder: Path) -> dict[str, bytes]:
    make_plan(recipe, 0, folder)
    make(recipe, folder, InProcess())
    return {path.name: path.read_bytes() for path in (folder / "ledger").iterdir()}


def test_a_run_stops_before_its_limit_and_goes_on_when_it_is_raised(
    server: Server, tiny_models: Path, pictures: Path, tmp_path: Path
) -> None:
    """Four units, each 40 tokens at 1; the third would overrun. A rerun asks nobody, and at the end every picture was asked for once."""
    keys: dict[str, Any] = {"price_input": 0.0, "price_output": 1e6}
    tight, data = recipe_of(tiny_models, pictures, server.url, **keys, max_cost=100.0), tmp_path / "data"
    for _ in range(2):
        with pytest.raises(
            StageError, match=r"captioner\.max_cost: 80\.00 is spent, and the next 4 captions .* 40\.00"
        ):
            made(tight, data)
        assert server.asked == 8 and len(units_left(data, 4)) == 2
    raised = recipe_of(tiny_models, pictures, server.url, **keys, max_cost=160.0)
    found = made(raised, data)
    assert server.asked == 16 and read_usage(files_of_usage(data / "captions")).cost == 160
    assert found == made(recipe_of(tiny_models, pictures, server.url), tmp_path / "unlimited")

    def tree(recipe: FactoryRecipe) -> dict[str, Any]:
        return what_is_made({"factory": recipe.model_dump(mode="json"), "cluster": {}}, trained=True)

    assert tree(tight) == tree(raised), "the same folder takes the raised limit"


def test_captions_that_nobody_counts_count_as_the_longest(
    server: Server, tiny_models: Path, pictures: Path, tmp_path: Path
) -> None:
    server.counts = False
    keys: dict[str, Any] = {"price_input": 0.0, "price_output": 1e6, "max_cost": 90.0}
    with pytest.raises(StageError, match=r"80\.00 is spent, and the next 4 captions .* 40\.00"):
        made(recipe_of(tiny_models, pictures, server.url, **keys), tmp_path / "data")
    assert server.asked == 8
    with pytest.raises(StageError, match=r"0\.00 is spent, and the next 4 captions .* 40\.00"):
        made(recipe_of(tiny_models, pictures, server.url, **{**keys, "max_cost": 39.0}), tmp_path / "first")
    assert server.asked == 8
