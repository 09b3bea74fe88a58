"""What no run can be put into."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError
from cluster.storage import refuse_url
from edgefusion import app


@pytest.mark.parametrize("words", [["run"], ["factory", "run"], ["trainer", "run"], ["export", "run"]])
@pytest.mark.parametrize("out", ["s3://bucket/x", "gs://bucket", "file:///tmp/x"])
def test_a_url_is_no_output_folder(words: list[str], out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, [*words, "--out", out])
    assert isinstance(said.exception, EdgeFusionError) and "need a file system" in str(said.exception)
    assert not list(tmp_path.iterdir())


def test_a_folder_may_have_a_colon() -> None:
    for folder in ("runs/a:b", "/x:/y", "a:b/c"):
        refuse_url(folder)
