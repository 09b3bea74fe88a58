"""onnxruntime-web from the npm registry: one pinned version, checked against its digest, kept in a cache.

Owns how the package gets here. Nothing is fetched when a page is looked at.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from cluster.errors import TargetUnavailable
from cluster.machine import cache_folder
from cluster.storage import publish_bytes

VERSION = "1.30.0"
LICENCE = "MIT"
_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""The registry's `dist.integrity` of that version."""

FILES = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
"""WebGPU's library and its WebAssembly, then those of the CPU: a browser loads one of the two."""

LICENCE_TEXT = f"""onnxruntime-web {VERSION} (folder ort/), https://github.com/microsoft/onnxruntime, {LICENCE} License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the
"Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to
the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR
ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH
THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def copy_ort_web(folder: Path, tarball: Path | None = None) -> None:
    """Put FILES into `folder`, from `tarball` or the cache or the registry. Raises TargetUnavailable."""
    package = tarball or keep()
    if not _is_sound(package):
        raise TargetUnavailable(
            f"is not onnxruntime-web {VERSION} as it was published",
            where=str(package),
            remedy=f"Delete it, or fetch it again: npm pack onnxruntime-web@{VERSION}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package, "r:gz") as archive:
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            if member is None:
                raise TargetUnavailable(f"lacks {name}", where=str(package), remedy="Fetch it again by npm pack")
            with member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)


def is_cached() -> bool:
    """Whether a page can be written without the network."""
    return _kept().exists()


def keep() -> Path:
    """The package in the cache, fetched if it is not there. Raises TargetUnavailable."""
    if not _kept().exists():
        publish_bytes(_kept(), _fetch())
    return _kept()


def _kept() -> Path:
    return cache_folder() / f"onnxruntime-web-{VERSION}.tgz"


def _fetch() -> bytes:
    npm = shutil.which("npm")
    by_hand = f"On a machine that has both: npm pack onnxruntime-web@{VERSION}; then give the file as --ort-web FILE"
    if npm is None:
        raise TargetUnavailable("the demo needs npm to fetch onnxruntime-web", remedy=f"Install Node.js. {by_hand}")
    with tempfile.TemporaryDirectory() as place:
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--fetch-retries=1"]
        try:
            said = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired as error:
            raise TargetUnavailable("npm did not end in ten minutes", remedy=by_hand) from error
        found = sorted(Path(place).glob("*.tgz"))
        if said.returncode or not found:
            wrong = [line for line in said.stderr.splitlines() if line.startswith("npm error")]
            reason = wrong[0].removeprefix("npm error ") if wrong else f"exit code {said.returncode}"
            raise TargetUnavailable(
                f"npm could not fetch onnxruntime-web {VERSION} ({reason})",
                remedy=f"It needs the network once. {by_hand}",
            )
        return found[0].read_bytes()


def _is_sound(package: Path) -> bool:
    try:
        digest = hashlib.sha512(package.read_bytes()).digest()
    except OSError:
        return False
    return base64.b64encode(digest).decode() == _SHA512
