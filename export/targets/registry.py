"""The targets that a recipe can name. A target's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

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


def find_target(name: str) -> EdgeTarget:
    """Raises KeyError for a name that no recipe lets through."""
    return import_module(f"export.targets.{MODULES[name]}").TARGETS[name]
