"""The front door: `edgefusion doctor` and `edgefusion zoo build`; each wing adds its own commands as it becomes real."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From prompts and GPUs to a small, fast, on-device text-to-image model.",
)
zoo = typer.Typer(no_args_is_help=True, help="The embedded zoo: small real models that make the chain honest offline.")
app.add_typer(zoo, name="zoo")

_NEEDED = [
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "open_clip_torch",
    "webdataset",
    "ray",
    "pyarrow",
    "fsspec",
    "safetensors",
    "pydantic",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
]
_OPTIONAL = {
    "resvg_py": "draw the zoo's pictures: pip install 'edgefusion[zoo]'",
    "vllm": "prompts by vLLM: pip install vllm, in an environment of its own (it pins torch)",
}


@app.command()
def doctor() -> None:
    """Say what this machine can do, what is missing and how to get it. Exits with 1 if a needed package is missing."""
    table = Table(title="edgefusion doctor", show_header=False)
    for name, value in _machine().items():
        table.add_row(name, value)
    table.add_section()
    missing = []
    for package in _NEEDED:
        version = _version(package)
        table.add_row(package, version or "[red]missing[/]")
        missing += [] if version else [package]
    for package, remedy in _OPTIONAL.items():
        table.add_row(package, _version(package) or f"not installed (optional; to {remedy})".replace("[", r"\["))
    Console().print(table)
    if missing:
        typer.echo(f"Missing: {', '.join(missing)}. Mend it with: pip install {' '.join(missing)}", err=True)
        raise typer.Exit(1)


@zoo.command("build")
def zoo_build(
    model: Annotated[str, typer.Argument(help="vae, clip, writer or teacher (which needs the first two)")],
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps in all, earlier runs included")],
    folder: Annotated[Path, typer.Option(help="packages, checkpoints and finished models")] = Path("runs/zoo"),
) -> None:
    """Train one of the zoo's models from public packages. Rerun the same command to resume; hours on two cores."""
    from factory.pocket.build import MODELS, build

    if model not in MODELS:
        typer.echo(f"No zoo model is called {model!r}; there are {', '.join(MODELS)}.", err=True)
        raise typer.Exit(2)
    build(model, folder, steps)


def _machine() -> dict[str, str]:
    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "Python": f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
        "bf16 on this CPU": ", ".join(fast) or "emulated, very slow: train in fp32",
        "memory": f"{memory / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
        "GPUs": ", ".join(gpus) or "none",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    app()
