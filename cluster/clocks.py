# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How far the clocks of a running Ray's nodes are from this machine's.

Nothing of a run depends on it: signs of life are watched, claims on a store go by the store's clock, files by the storage's. But logs are dated by
the host that writes them, and S3 refuses requests of a clock that is a quarter of an hour wrong.
"""

from __future__ import annotations

import time
from typing import Any

_ASK_S = 30.0
WRONG_S = 5.0
"""What a busy node may seem to be apart for other reasons."""


def clocks_apart() -> dict[str, float]:
    """Node (host and address) to the seconds by which its clock is ahead; nodes that do not answer in time are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[Any, tuple[str, float]] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        task: Any = ray.remote(_now).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        asked[task.remote()] = (f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", time.time())
    found: dict[str, float] = {}
    end = time.monotonic() + _ASK_S
    left = list(asked)
    while left and (wait_s := end - time.monotonic()) > 0:
        done, left = ray.wait(left, num_returns=1, timeout=wait_s)
        for one in done:
            name, began = asked[one]
            try:
                theirs, now = float(ray.get(one)), time.time()
            except Exception:  # the node went away meanwhile
                continue
            # The answer was given at some moment between: within that, the clocks agree.
            found[name] = theirs - now if theirs > now else min(0.0, theirs - began)
    return found


def _now() -> float:
    return time.time()
