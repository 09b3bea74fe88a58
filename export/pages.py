"""Parts that the exporter's pages share."""

from __future__ import annotations

import base64

import numpy as np


def png_url(picture: np.ndarray) -> str:
    """A picture H W 3 (uint8) as a data URL."""
    from factory.stages import encode_picture

    return "data:image/png;base64," + base64.b64encode(encode_picture(picture, "png")).decode()
