"""A stand-in for S3 on loopback, for tests of what is read and written by URL."""

from __future__ import annotations

import urllib.request
from collections.abc import Generator
from contextlib import contextmanager

import fsspec
import pytest


@contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch, name: str = "runs") -> Generator[str]:
    """An empty bucket, s3://NAME. Skips the test without s3fs or moto."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[dev]'")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e '.[dev]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for variable, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(variable, value)
    try:
        # Servers of one process share what they hold.
        reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(reset).close()
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        yield f"s3://{name}"
    finally:
        server.stop()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
