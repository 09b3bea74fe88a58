"""The demo in a real browser: JavaScript draws what Python draws. `pytest -m browser`.

Needs Chromium and its driver (`CHROMIUM`, `CHROMEDRIVER`, or on the PATH), npm or a cached onnxruntime-web, and `pip install 'edgefusion[web-test]'`.
"""

from __future__ import annotations

import base64
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import TargetUnavailable
from export.bundle import open_bundle
from export.demo import write_demo
from export.noise import noise
from export.parity import psnr_db
from export.words import tokenize

pytestmark = pytest.mark.browser
selenium = pytest.importorskip("selenium")

from selenium import webdriver  # noqa: E402

from tests.chromium import open_browser  # noqa: E402
from tests.chromium import until as soon  # noqa: E402

until = partial(soon, seconds=120)  # models load, and a CPU plays the GPU
TALL = "1100,1400"
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is pytest's."""


@pytest.fixture(scope="module")
def folder(student_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "page"
    try:
        write_demo(student_bundles / "onnx", out)
    except TargetUnavailable as error:
        pytest.skip(str(error))
    return out


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder behind the plainest of static servers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder) as address:
        yield address


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    with open_browser("--disable-gpu", size=TALL) as chrome:
        chrome.set_script_timeout(120)
        yield chrome


def script(browser: webdriver.Chrome, code: str, *more: Any) -> Any:
    return browser.execute_script(code, *more)


def draw(browser: webdriver.Chrome, prompt: str, seed: int) -> np.ndarray:
    """By the page's own form; H W 3 from its canvas."""
    before = script(browser, "return document.querySelectorAll('#drawn canvas').length")
    fill = """const at = (id) => document.getElementById(id);
    at('prompt').value = arguments[0]; at('seed').value = arguments[1]; at('fresh').checked = false; at('form').requestSubmit()"""
    script(browser, fill, prompt, seed)
    count = "return document.querySelectorAll('#drawn canvas').length"
    until(lambda: trouble(browser) or script(browser, count) > before, "the picture")
    assert trouble(browser) == ""
    read = """const c = document.getElementById('picture');
    return [c.width, c.height, btoa(String.fromCharCode(...c.getContext('2d').getImageData(0, 0, c.width, c.height).data))]"""
    width, height, data = script(browser, read)
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]


def trouble(browser: webdriver.Chrome) -> str:
    return script(browser, "return document.getElementById('trouble').textContent")


def is_ready(browser: webdriver.Chrome) -> str:
    return script(browser, "return document.body.dataset.backend ?? document.getElementById('trouble').textContent")


def check_pictures(browser: webdriver.Chrome, bundle: Path) -> None:
    build, facts = open_bundle(bundle, "fp32", 1)
    for prompt, seed in (("a penguin on a pink background, 3d render", 5), ("a flat icon of a fox", 2**40 + 3)):
        wanted = build.picture(tokenize(bundle, facts["tokenizer"], [prompt])[0], seed)
        other = build.picture(tokenize(bundle, facts["tokenizer"], [prompt])[0], seed + 1)
        got = draw(browser, prompt, seed)
        assert psnr_db(wanted, got) >= 35
        assert psnr_db(other, got) < 35  # so that the bar tells pictures apart


def test_same_prompt_and_seed_give_pythons_picture(browser: webdriver.Chrome, url: str, student_bundles: Path) -> None:
    browser.get(url)
    assert until(lambda: is_ready(browser), "the models") == "wasm"
    assert script(browser, "return document.getElementById('guided').hidden"), "its guidance is fixed"
    check_pictures(browser, student_bundles / "onnx")
    assert script(browser, "return document.querySelectorAll('#timings tr').length") == 5
    script(browser, "document.getElementById('prove').click()")
    assert until(lambda: script(browser, "return Number(document.body.dataset.least ?? 0)"), "the proof") >= 35
    assert "Yes" in script(browser, "return document.getElementById('verdict').textContent")
    assert (
        script(browser, "return document.getElementById('caption').textContent")
        == f"a flat icon of a fox (seed {2**40 + 3})"
    )
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
    loaded = script(browser, "return performance.getEntriesByType('resource').map((one) => one.name)")
    assert loaded and all(name.startswith((url, "data:", "blob:")) for name in loaded)


@pytest.mark.timeout(900)  # a GPU played by the CPU
def test_webgpu_draws_pythons_picture(url: str, student_bundles: Path) -> None:
    with open_browser(*WEBGPU, size=TALL) as chrome:
        chrome.set_script_timeout(120)
        chrome.get(f"{url}/?backend=webgpu")
        if (said := until(lambda: is_ready(chrome), "the models")) != "webgpu":
            pytest.skip(f"this Chromium has no WebGPU: {said}")
        check_pictures(chrome, student_bundles / "onnx")


def test_the_page_draws_at_the_scale_that_it_is_given(
    browser: webdriver.Chrome, guided_bundles: Path, tmp_path: Path
) -> None:
    bundle = guided_bundles / "onnx"
    try:
        write_demo(bundle, tmp_path / "page")
    except TargetUnavailable as error:
        pytest.skip(str(error))
    build, facts = open_bundle(bundle, "fp32", 1)
    row = tokenize(bundle, facts["tokenizer"], ["a fox"])[0]
    own, low, high = (build.at(scale).picture(row, 5) for scale in (None, 3, 6.5))
    with served(tmp_path / "page") as address:
        browser.get(address)
        assert until(lambda: is_ready(browser), "the models") == "wasm"
        assert not script(browser, "return document.getElementById('guided').hidden")
        assert script(browser, "return document.getElementById('range').textContent").startswith("3 to 7;")
        assert script(browser, "return document.getElementById('guidance').value") == "5"
        assert psnr_db(own, draw(browser, "a fox", 5)) >= 35
        for scale, wanted, other in ((3, low, high), (6.5, high, low)):
            script(browser, "document.getElementById('guidance').value = arguments[0]", scale)
            got = draw(browser, "a fox", 5)
            assert psnr_db(wanted, got) >= 35
            assert psnr_db(other, got) < 35 and psnr_db(own, got) < 35  # so that the bar tells scales apart
        assert (
            script(browser, "return document.getElementById('caption').textContent") == "a fox (seed 5, guidance 6.5)"
        )
        script(browser, "document.getElementById('guidance').value = 7.5")
        assert not script(browser, "return document.getElementById('form').checkValidity()")
        # The proof is at the bundle's own scale, whatever the field holds.
        script(browser, "document.getElementById('prove').click()")
        assert until(lambda: script(browser, "return Number(document.body.dataset.least ?? 0)"), "the proof") >= 35


ODD = [
    "",
    "  A Red\tAPPLE,\n3D render!! ",
    "l'été n'est pas fini, it's; they'll we've I'm you'd 'S 't ''s !'s",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ ǅ İstanbul ß ﬁ",
    "cafe\u0301 e\u0301 \u1e9b\u0323 \uac00\u1100\u1161 नमस्ते ไทย",
    "🦊🏽‍🚒 👩🏾‍🌾 ½ ² ٣ 12345 3.14 a1b2",
    "<|endoftext|> x<|startoftext|>y <|STARTOFTEXT|>!! <|endoftext|",
    "a\u00a0b\u3000c\u2028d\u0085e\ufefff\u200bg\u180eh\x1ci\x00j",
    "word " * 40,
    "supercalifragilisticexpialidocious" * 3,
]


def test_the_pages_tokenizer_is_the_bundles(browser: webdriver.Chrome, url: str, student_bundles: Path) -> None:
    browser.get(url)
    draw_from, rng = "abcXYZ  '-.,!?<|>ÀéßΣσςΐŁ中日1２³\t\u00a0\u0301👩🏽‍", random.Random(0)
    lines = [*ODD, *("".join(rng.choices(draw_from, k=rng.randrange(40))) for _ in range(400))]
    facts = open_bundle(student_bundles / "onnx", "fp32", 1)[1]
    wanted = [row[0].tolist() for row in tokenize(student_bundles / "onnx", facts["tokenizer"], lines)]
    code = """const [lines, done] = arguments;
    (async () => {
      const { Tokenizer } = await import('./tokenizer.js');
      const [model, facts] = await Promise.all(['tokenizer/tokenizer.json', 'demo.json'].map(async (f) => (await fetch(f)).json()));
      const words = new Tokenizer(model, facts.tokenizer);
      return lines.map((line) => words.encode(line));
    })().then(done, (error) => done(String(error)));"""
    got = browser.execute_async_script(code, lines)
    assert not isinstance(got, str), got
    wrong = [line for line, a, b in zip(lines, wanted, got, strict=True) if a != b]
    assert wrong == []


def test_the_pages_noise_is_pythons(browser: webdriver.Chrome, url: str) -> None:
    browser.get(url)
    code = """const [seed, draw, done] = arguments;
    import('./noise.js').then(({ noise }) => done(Array.from(noise(seed, draw, 1000))), (error) => done(String(error)));"""
    for seed, step in ((0, 0), (7, 1), (2**32 - 1, 0), (2**53 - 1, 3)):
        got = browser.execute_async_script(code, seed, step)
        assert not isinstance(got, str), got
        np.testing.assert_allclose(np.array(got, np.float32), noise(seed, step, (1000,)), rtol=1e-6, atol=1e-7)


def test_a_flipped_bit_is_refused_by_the_page(
    browser: webdriver.Chrome, folder: Path, tmp_path: Path, url: str
) -> None:
    copy = tmp_path / "page"
    shutil.copytree(folder, copy)
    model = copy / "models" / "vae_decoder.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with served(copy) as address:
        browser.get(address)
        said = until(lambda: is_ready(browser), "the refusal")
    assert said == "models/vae_decoder.onnx is not what demo.json says"
