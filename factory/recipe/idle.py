"""Keys of a recipe's `factory` part that decide nothing that is made."""

from __future__ import annotations

_SERVED = (("plan", "writer"), ("make", "captioner"))
_OPENED = (
    *_SERVED,
    ("make", "teacher"),
    ("make", "teachers", "*"),
    ("make", "scorer"),
    ("make", "scores", "*", "clip"),
)
# `make.threads` is none of them: sums of other threads round otherwise, which the last bits of a picture show, and its name is its bytes' digest.
IDLE = (
    *(
        (*model, key)
        for model in _SERVED
        for key in ("max_cost", "key_variable", "timeout_s", "tries", "concurrent", "server", "environment", "device")
    ),
    *((*model, "allow_pickle") for model in _OPENED),
    *(
        ("plan", "download", key)
        for key in ("max_failed_share", "failed_after", "timeout_s", "tries", "back_off_s", "concurrent", "per_host")
    ),
    *(("make", key) for key in ("render_workers", "render_gpus", "score_workers", "score_gpus", "crop_gpus")),
    ("sources",),
    ("make", "max_dead_share"),
    ("make", "dead_after"),
)
"""Where a run computes, which weights may be opened, how servers and URLs are asked, when it stops, what a card says of licences. `*`: whatever is there."""
