"""The targets that a recipe can name. A target's module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from export.targets.contract import EdgeTarget

MODULES = {
    "onnx": "onnx_runtime",
    "cuda": "onnx_runtime",
    "tensorrt": "onnx_runtime",
    "openvino": "openvino_cpu",
    "qnn": "qnn",
    "executorch": "executorch_xnnpack",
    "coreml": "coreml",
    "litert": "litert",
    "ethos": "ethos_unet",
    "exynos": "exynos",
}
"""Target to the module of this package that holds it in `TARGETS`."""


def find_target(name: str, device: str | None = None) -> EdgeTarget:
    """Raises KeyError for a name that no recipe lets through. `device`: of the chips that a target knows by name, which one."""
    target: EdgeTarget = import_module(f"export.targets.{MODULES[name]}").TARGETS[name]
    return replace(target, device=device) if device and target.device else target


def target_of(facts: Mapping[str, Any]) -> EdgeTarget:
    """A bundle's, by its bundle.json."""
    return find_target(facts["target"], facts.get("device"))
