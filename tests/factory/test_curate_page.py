"""The page in a real browser, by keys alone: mark, caption, undo, reload, then select and pack. `pytest -m browser`.

Needs Chromium and its driver (`CHROMIUM`, `CHROMEDRIVER`, or on the PATH) and `pip install 'edgefusion[web-test]'`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.recipe import load_recipe
from factory.cli import _FactoryPart
from factory.curate.server import Server
from factory.decisions import Overlay, read_decisions
from factory.make import select_and_pack
from factory.pack import read_manifest, read_shard

pytestmark = pytest.mark.browser
selenium = pytest.importorskip("selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from tests.chromium import open_browser, until  # noqa: E402


@pytest.fixture
def server(dataset: Path) -> Iterator[Server]:
    select_and_pack(load_recipe(_FactoryPart, dataset.parent / "recipe.yaml").factory, dataset)
    with Server(dataset, who="ada") as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.close()
        thread.join()


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    with open_browser("--disable-gpu") as chrome:
        yield chrome


def press(browser: webdriver.Chrome, *keys: str) -> None:
    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def text(browser: webdriver.Chrome, id: str) -> str:
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", id)


def cards(browser: webdriver.Chrome) -> list[str]:
    script = "return [...document.querySelectorAll('.card')].map((card) => card.getAttribute('aria-label'))"
    return browser.execute_script(script)


def focus(browser: webdriver.Chrome) -> str:
    return browser.execute_script("return document.activeElement.id")


def show(browser: webdriver.Chrome, url: str) -> None:
    browser.get(url)
    until(lambda: cards(browser), "the grid")
    until(lambda: focus(browser) == "grid", "focus on the grid")


def test_a_person_curates_by_keys_alone(server: Server, browser: webdriver.Chrome, ids: list[str]) -> None:
    folder = server.folder
    show(browser, server.url)
    assert "<b>&amp;" in cards(browser)[0]  # text of the data set is text
    press(browser, "k", "2", "x")
    until(lambda: focus(browser) == "own", "the question why")
    press(browser, "extra finger", Keys.ENTER, "1", "u")
    until(lambda: text(browser, "saved") == "all saved" and len(read_decisions(folder)) == 3, "three decisions")
    press(browser, Keys.END, "e")
    until(lambda: focus(browser) == "caption", "the caption to edit")
    press(browser, "an owl, as a person says it", Keys.ENTER)
    # Saved is what the page knows of, too: until then a reload would lose its undo.
    until(lambda: text(browser, "saved") == "all saved" and ids[23] in read_decisions(folder), "the caption")
    found = read_decisions(folder)
    assert (found[ids[0]].verdict, found[ids[0]].who) == ("keep", "ada")
    assert (found[ids[1]].verdict, found[ids[1]].reason) == ("reject", "broken anatomy")
    assert (found[ids[2]].verdict, found[ids[2]].reason) == ("reject", "extra finger")
    assert found[ids[23]].caption == "an owl, as a person says it" and ids[3] not in found

    browser.refresh()
    until(lambda: "an owl, as a person says it" in " ".join(cards(browser)), "the caption after a reload")
    assert "3 of 23 decided: 1 keep, 2 reject, 1 captions" in text(browser, "counts")
    until(lambda: focus(browser) == "grid", "focus on the grid")
    press(browser, "u")  # undo outlives the reload
    until(lambda: ids[23] not in read_decisions(folder), "undo of the caption")
    press(browser, Keys.END, "e")
    until(lambda: focus(browser) == "caption", "the caption to edit")
    press(browser, "the last word", Keys.ENTER)
    until(lambda: ids[23] in read_decisions(folder), "the caption again")

    funnel = select_and_pack(load_recipe(_FactoryPart, folder.parent / "recipe.yaml").factory, folder)
    assert funnel["reasons"]["rejected: human"] == 2
    prompts = {row["id"]: row["prompt"] for row in read_manifest(folder)}
    assert ids[0] in prompts and prompts[ids[23]] == "the last word"
    facts = json.loads(dict(read_shard(folder / "shard-000000.tar"))[ids[23]]["json"])
    assert facts["original_prompt"].startswith("a owl number 23")
    trouble = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert trouble == []


def test_filters_by_keys_and_what_the_other_person_does(
    server: Server, browser: webdriver.Chrome, ids: list[str]
) -> None:
    show(browser, server.url)
    press(browser, "/")
    press(browser, "fox")
    until(lambda: len(cards(browser)) == 8, "eight foxes")
    press(browser, Keys.ESCAPE, "k")
    until(lambda: text(browser, "saved") == "all saved" and read_decisions(server.folder), "a keep")
    Overlay(server.folder).decide(ids[3], {"verdict": "reject", "reason": "seen by bob"}, "bob")
    until(lambda: "seen by bob" in " ".join(cards(browser)), "what bob did")
    Overlay(server.folder).decide(ids[0], {"verdict": "reject", "reason": "bob again"}, "bob")
    press(browser, "u")
    until(lambda: "Not undone" in text(browser, "note"), "the refusal")
    assert read_decisions(server.folder)[ids[0]].reason == "bob again"
