"""What others than this machine said of a build, in words: operators that stay off the accelerator, and a compiler's estimates.

Reads a build's entry of bundle.json; entries of older versions lack either.
"""

from __future__ import annotations

from typing import Any


def off_lines(name: str, build: dict[str, Any]) -> list[str]:
    """A line for each graph of build `name` of which a target or its compiler told something."""
    lines = [f"{name}, {graph}, operators off the accelerator: {words}" for graph, words in fallbacks(build)]
    lines += [f"{name}, {graph}, compiler-estimated: {words}" for graph, words in estimates(build)]
    return [*lines, *([f"{name}, attention tiled: {words}"] if (words := tiled(build)) else [])]


def fallbacks(build: dict[str, Any]) -> list[tuple[str, str]]:
    """Graph and what of it stays off the accelerator, by whose word."""
    return [(graph, _fallback(said)) for graph, said in (build.get("fallback") or {}).items() if said]


def estimates(build: dict[str, Any]) -> list[tuple[str, str]]:
    """Graph and what the vendor's compiler expects of it; never a device's figures."""
    return [(graph, _estimate(said)) for graph, said in (build.get("compiler_estimated") or {}).items() if said]


def tiled(build: dict[str, Any]) -> str:
    """How many blocks for which chip; empty for an untiled build."""
    said = build.get("tiled") or {"blocks": 0}
    return f"{said['blocks']} blocks for {said['profile']}" if said["blocks"] else ""


def _fallback(said: dict[str, Any]) -> str:
    off = said["not_accelerated"]
    if off is None:
        shown = sum(said.get("operators", {}).values())
        return f"not known, {said['said_by']}" + (f"; its compiler will be shown {shown}" if shown else "")
    words = ", ".join(f"{count} {kind}" for kind, count in off.items()) or "none"
    if on_cuda := said.get("on_cuda"):
        words += f"; by CUDA {', '.join(f'{count} {kind}' for kind, count in on_cuda.items())}"
    on = f"{said['accelerated_parts']} parts" if "accelerated_parts" in said else said["accelerated"]
    return f"{words}; on it {on} ({said['said_by']})"


def _estimate(said: dict[str, Any]) -> str:
    return (
        f"{said['latency_s'] * 1e3:.2f} ms and {said['dram_bytes'] / 1e6:.1f} MB of DRAM traffic a call on {said['profile']} "
        f"({said['said_by']})"
    )
