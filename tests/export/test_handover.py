"""What a person finds after a run: the pages, and command lines that do what they say."""

import base64
import hashlib
import io
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from export import ort_web
from export.cli import app
from export.handover import doors, has_pages, write_pages
from export.proof import write_sums
from export.recipe import ExportRecipe
from export.report import _bundle_part

RECIPE = ExportRecipe(latency_runs=1, threads=1)


@pytest.fixture
def run(student_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with the onnx bundle, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(student_bundles / "onnx", tmp_path / "my out" / "export" / "onnx")
    return tmp_path / "my out"


def cache_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tarball with the names of onnxruntime-web's files in the cache, and its digest for the published one."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name in ort_web.FILES:
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"code"))
    kept = ort_web.cache_folder() / f"onnxruntime-web-{ort_web.VERSION}.tgz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(sink.getvalue())
    monkeypatch.setattr(ort_web, "_SHA512", base64.b64encode(hashlib.sha512(sink.getvalue()).digest()).decode())


def test_without_the_browsers_runtime_the_report_says_how_to_get_the_page(run: Path) -> None:
    recipe = RECIPE.model_copy(update={"targets": ["onnx"]})
    assert not has_pages(run, recipe)
    write_pages(run, recipe)
    assert has_pages(run, recipe) and "PyTorch fp32" in (run / "compare.html").read_text()
    found = doors(run)
    assert found is not None and found["compare"] and not found["demo"]
    commands = [line for _, line in found["lines"]]
    assert f"edgefusion export demo '{run / 'export/onnx'}' --out '{run / 'demo'}'" in commands
    # A line that stands on the page is a line that works.
    words = shlex.split(next(line for line in commands if line.startswith("edgefusion export try")))
    drawn = run / "picture.png"
    result = CliRunner().invoke(app, [str(drawn) if word == "picture.png" else word for word in words[2:]])
    assert result.exit_code == 0, result.output
    assert np.asarray(Image.open(drawn)).shape == (64, 64, 3)


def test_with_the_runtime_in_the_cache_the_page_is_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_a_package(monkeypatch)
    monkeypatch.setattr(ort_web, "_fetch", lambda: pytest.fail("a run asks no network"))
    monkeypatch.setattr("export.handover.write_compare", lambda *_, **__: None)  # measured in the test before
    write_pages(run, RECIPE)
    facts = json.loads((run / "demo" / "demo.json").read_text())
    assert facts["build"] == "fp32" and (run / "demo" / "ort" / ort_web.FILES[0]).read_bytes() == b"code"
    found = doors(run)
    assert found is not None and found["demo"]
    assert [line for what, line in found["lines"] if "8000" in what] == [
        f"python3 -m http.server --bind 127.0.0.1 --directory '{run / 'demo'}'"
    ]
    assert not any("export demo" in line for _, line in found["lines"])


def test_a_student_that_browsers_cannot_run_ends_no_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_a_package(monkeypatch)
    said: list[str] = []
    path = run / "export" / "onnx" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("</w>", "</x>"))
    write_sums(run / "export" / "onnx")  # another tokenizer, not a broken file
    monkeypatch.setattr("export.handover.write_compare", lambda *_, **__: None)
    write_pages(run, RECIPE, said.append)
    assert any("no page for the browser: is not CLIP's byte-pair encoding" in line for line in said)
    assert not (run / "demo").exists()


def test_a_build_that_does_not_run_here_stands_in_the_report(run: Path) -> None:
    from jinja2 import Environment, FileSystemLoader

    path = run / "export" / "onnx" / "bundle.json"
    facts = json.loads(path.read_text())
    facts["builds"]["w8"] |= {"not_run": "it runs on the moon", "parity": None, "measured_ms": None}
    path.write_text(json.dumps(facts))
    source = Path("export/report.html.j2").read_text()
    part = source[source.index("{% if bundles %}") : source.index("<h2>The run</h2>")]
    page = Environment(loader=FileSystemLoader("export")).from_string(part).render(bundles=_bundle_part(run / "export"))
    assert "not run here: it runs on the moon" in page


def test_no_line_that_we_suggest_serves_to_the_whole_network() -> None:
    """Without --bind, Python's server listens on every interface."""
    asked = []
    for path in [*Path("export").rglob("*"), *Path("docs").glob("*.md"), Path("README.md"), Path("edgefusion.py")]:
        if path.suffix in (".py", ".html", ".j2", ".md", ".js"):
            asked += re.findall(r"python3? -m http\.server.*", path.read_text())
    assert len(asked) >= 3 and [line for line in asked if "--bind 127.0.0.1" not in line] == []


def test_no_page_is_wanted_or_possible(tmp_path: Path) -> None:
    assert has_pages(tmp_path, RECIPE.model_copy(update={"pages": False}))
    assert doors(tmp_path) is None
