"""Parts that the exporter's pages share."""

from __future__ import annotations

import base64
import shlex
from pathlib import Path

import numpy as np


def png_url(picture: np.ndarray) -> str:
    """A picture H W 3 (uint8) as a data URL."""
    from factory.stages import encode_picture

    return "data:image/png;base64," + base64.b64encode(encode_picture(picture, "png")).decode()


def serve_line(folder: Path) -> str:
    """The command that serves a folder to this machine's browser; without --bind, Python's server listens on every interface."""
    return f"python3 -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(folder))}"
