# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Plain words for a Ray that cannot be joined, and for a stage that no node has room for: never a wait without a message."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Sequence
from typing import Any

from cluster.errors import StageError
from cluster.places import suits
from cluster.stage import Stage

_KNOCK_S = 10.0
_WHERE = "cluster.address"
log = logging.getLogger("edgefusion")


def knock(address: str) -> None:
    """Raises StageError if nothing answers at host:port; Ray itself would try for minutes. Other spellings are left to Ray."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise StageError(
            f"nothing answers at {address} ({error})",
            where=_WHERE,
            remedy="Start the cluster, open the port, or use --set cluster.address=local or --set cluster.runner=in-process",
        ) from None


def explain(address: str, error: Exception) -> StageError:
    """What `ray.init` raised, in words that a user can act on."""
    # Ray says "failed to connect" and hides why in the cause.
    said = [str(one) or type(one).__name__ for one in _causes(error)]
    text = "\n".join(said)
    if re.search(r"version mismatch", text, re.IGNORECASE):
        versions = " ".join(text.split())
        return StageError(
            f"Ray or Python here is of another version than the cluster's: {versions[:300]}",
            where=_WHERE,
            remedy="Install the cluster's versions where the run is started, or start the cluster from this environment",
        )
    if re.search(r"auth.*token|token.*auth|Unauthenticated|unauthenticated|InvalidAuthToken", text):
        return StageError(
            f"the cluster at {address} refuses the token of this process",
            where=_WHERE,
            remedy="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own token",
        )
    if address == "local" and "timed out" in text:
        return StageError(
            "Ray did not start in time on this machine",
            where=_WHERE,
            remedy="It may be too busy: run the same command again, or use --set cluster.runner=in-process",
        )
    why = dict.fromkeys(one.strip().splitlines()[0] for one in (said[0], said[-1]) if one.strip())
    return StageError(
        f"Ray at {address} cannot be reached ({': '.join(why)})",
        where=_WHERE,
        remedy="Start the cluster, see that its token is here (RAY_AUTH_TOKEN) and that it is not too busy to answer; "
        "or use --set cluster.address=local or --set cluster.runner=in-process",
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error, and what it says it came of."""
    found: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in found:
        found.append(inner)
        cause = getattr(inner, "cause", None)
        inner = cause if isinstance(cause, BaseException) else inner.__cause__
    return found


def explain_work(error: BaseException) -> StageError | None:
    """What Ray raised while stages worked, where it is the machine's fault and no stage's; else None."""
    names = {kind.__name__ for one in _causes(error) for kind in type(one).__mro__}
    text = str(error)
    if names & {"OutOfDiskError", "ObjectStoreFullError"} or "OutOfDiskError" in text or "ObjectStoreFullError" in text:
        return StageError(
            "Ray's object store is full, and so is the disk that it would spill to",
            where="cluster",
            remedy="Free space below Ray's folder (/tmp/ray, or --temp-dir of ray start), give the store more memory (cluster.object_store_mib, "
            "or --object-store-memory of ray start), or make units smaller (factory.make.unit_images); the same command then goes on",
        )
    if "OutOfMemoryError" in names or "ray.exceptions.OutOfMemoryError" in text:
        return StageError(
            "Ray ended a worker, for its node ran out of memory",
            where="cluster",
            remedy="Say what workers need (cluster.memory_gib), so that fewer share a node, or use larger nodes; the same command then goes on",
        )
    return None


def see_that_it_fits(stages: Sequence[Stage], memory_bytes: dict[str, int], local: bool) -> None:
    """Raises StageError if a local Ray can never hold a worker; on a cluster, where nodes may still join, says what is waited for."""
    import ray

    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    for stage in stages:
        wants = {"CPU": stage.cpus, "GPU": stage.gpus, "memory": float(memory_bytes.get(stage.name, 0))}
        wants |= dict(stage.resources)
        if any(
            all(node["Resources"].get(key, 0) >= want for key, want in wants.items())
            and suits(stage.labels, node.get("Labels") or {})
            for node in nodes
        ):
            continue
        words = [f"{stage.cpus:g} CPU", *([f"{stage.gpus:g} GPU"] if stage.gpus else [])]
        words += [f"{wants['memory'] / 2**30:g} GiB"] if wants["memory"] else []
        words += [f"{amount:g} {name}" for name, amount in stage.resources.items()]
        words += [f"a node with {key}={value}" for key, value in stage.labels.items()]
        what = f"a worker of stage {stage.name} needs {', '.join(words)}, and no node has that"
        remedy = "edgefusion cluster check RECIPE shows what fits where"
        if local:
            raise StageError(what, where="cluster", remedy=f"Change the recipe or use a larger machine; {remedy}")
        log.warning("%s now; waiting for one to join. %s", what, remedy)
    slots = sum(float(node["Resources"].get("CPU", 0)) for node in nodes)
    if (wanted := sum((stage.workers_min or stage.workers) * stage.cpus for stage in stages)) > slots:
        log.warning(
            "the stages want %g CPU slots at the same time, and Ray has %g: later stages wait until earlier ones need theirs no more, and "
            "nothing is kept before. Lower workers (factory.make.render_workers, cluster.stages), or raise cluster.cpus of a local Ray",
            wanted,
            slots,
        )
