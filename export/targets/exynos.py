"""Samsung Exynos: the file of `litert` with the tiles of the recipe's plan, ready for Samsung's compiler, which is not here, with the command that compiles it.

Nothing is known of what that compiler would leave on the CPU; NAME.operators.json counts what it will be shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import publish_bytes
from export.targets.contract import Source
from export.targets.litert import LiteRt, operators

if TYPE_CHECKING:
    from export.solve import Plan

_PROGRAM = (
    "from ai_edge_litert.aot import aot_compile; from ai_edge_litert.aot.vendors.samsung import target as t; "
    "aot_compile.aot_compile('{name}', output_dir='exynos', target=t.Target(t.SocModel.E9965), keep_going=False)"
)
"""E9965 (Exynos 2600) is the one chip that ai-edge-litert 2.3's plugin for Samsung knows."""


NEEDS = (
    "ai-edge-litert, and Samsung's SDK as the Python module ai_edge_litert_sdk_samsung, from Samsung: it is not on PyPI"
)
"""What the command needs; its plugin asks for that module."""


def vendor_command(name: str) -> str:
    """The line that compiles a file for the chip."""
    return f'python -c "{_PROGRAM.format(name=name)}"'


class Exynos(LiteRt):
    def lower(self, source: Source, precision: str, path: Path) -> None:
        super().lower(source, precision, path)
        if source.graph.name == "unet":
            facts = {
                "status": "not compiled here",
                "compile": vendor_command(path.name),
                "needs": NEEDS,
                "operators": operators(path),
            }
            publish_bytes(coverage_path(path), (json.dumps(facts, indent=2) + "\n").encode())

    def plan(self, source: Source) -> Plan | None:
        """The recipe's, for whatever chip it is: whoever asks for tiles in a Samsung bundle wants them in its file."""
        return source.plan

    def fallback(self, path: Path) -> dict[str, Any] | None:
        if not coverage_path(path).exists():
            return None
        return {
            "accelerated": None,
            "not_accelerated": None,
            "said_by": "nobody: not compiled here",
            **json.loads(coverage_path(path).read_text()),
        }


def coverage_path(path: Path) -> Path:
    """What the vendor's compiler will be shown."""
    return path.with_suffix(".operators.json")


TARGETS = {
    "exynos": Exynos(
        "exynos",
        ".tflite",
        "ai-edge-litert",
        packages={"ai_edge_litert": "ai-edge-litert"},
        extra="npu",
        sample="litert",
        from_onnx=False,
        sample_needs=("onnxruntime", "pillow"),
        emulated=("w8a16",),
    )
}
