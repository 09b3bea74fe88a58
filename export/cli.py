"""`edgefusion export ...`: look at builds and run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.tables import print_tables

app = typer.Typer(no_args_is_help=True, help="Student to proven edge builds.")


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="a bundle folder: OUT/export/onnx")]) -> None:
    """Sizes, parity and latency of the builds in a bundle, what stays off the accelerator, and what a compiler estimates."""
    from export.proof import check_bundle

    check_bundle(folder)
    from export.bundle import read_bundle
    from export.card import picture_ms
    from export.guidance import guidance_words
    from export.off_chip import off_lines

    facts = read_bundle(folder)
    table = Table(
        "build", "UNet MiB", "UNet SNR dB", "pictures PSNR dB", "UNet ms", "picture ms", title=facts["runtime"]
    )
    for name, build in facts["builds"].items():
        if build.get("not_run"):
            table.add_row(name, f"{build['bytes']['unet'] / 2**20:.1f}", f"not run here: {build['not_run']}")
            continue
        proof, ms = build["parity"], build["measured_ms"] or build["emulated_ms"]
        table.add_row(
            name if build["measured_ms"] else f"{name} (ms emulated)",
            f"{build['bytes']['unet'] / 2**20:.1f}",
            str(proof["graph_snr_db"]["unet"]),
            str(proof["psnr_db"]),
            str(ms["unet"]),
            picture_ms(build),
        )
    print_tables(table)
    if words := guidance_words(facts["scheduler"]):
        typer.echo(f"guidance scale: {words}")
    for name, build in facts["builds"].items():
        for line in off_lines(name, build):
            typer.echo(line)


@app.command()
def student(
    model: Annotated[str, typer.Argument(help="a student folder, or zoo:NAME")] = "zoo:student-fewstep",
    out: Annotated[Path, typer.Option(help="folder of the bundles; finished ones are left alone")] = Path("bundles"),
    prompts: Annotated[Path | None, typer.Option(help="text file, a prompt a line, to calibrate and prove on")] = None,
    vae: Annotated[
        str | None, typer.Option(help="a VAE whose decoder to take instead: OUT/model of `edgefusion trainer decoder`")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a key of the recipe's export part: --set steps=4 (repeatable)")
    ] = None,
) -> None:
    """Build and prove bundles of a finished student, without a run."""
    from cluster.recipe import as_overrides, load_recipe
    from export.bundle import export_student
    from export.prompts import read_prompts
    from export.proof import BUNDLE
    from export.recipe import ExportRecipe
    from factory.models import quiet, resolve

    recipe = load_recipe(ExportRecipe, None, [*as_overrides({"vae": vae}), *(overrides or [])])
    quiet()
    there = [target for target in recipe.targets if (out / target / BUNDLE).exists()]
    export_student(Path(resolve(model)), read_prompts(prompts), recipe, out, typer.echo)
    for target in recipe.targets:
        typer.echo(f"{out / target} is there already" if target in there else f"built {out / target}")


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(help="a student folder, or zoo:NAME")] = "zoo:student-fewstep",
    out: Annotated[Path, typer.Option(help="folder for sensitivity.json and sensitivity.png")] = Path("sensitivity"),
    by: Annotated[str, typer.Option(help="block (a resnet, an attention) or layer")] = "block",
    precision: Annotated[str, typer.Option(help="w8a8 or w8a16")] = "w8a8",
    budget: Annotated[float, typer.Option(min=0, max=1, help="share of the weights that may stay in float")] = 0.1,
    prompts: Annotated[Path | None, typer.Option(help="text file, a prompt a line")] = None,
    count: Annotated[int, typer.Option(min=1, help="pictures that judge each part")] = 4,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a key of the recipe's export part: --set steps=4 (repeatable)")
    ] = None,
) -> None:
    """What quantising each part of the UNet alone does to the final picture, and which parts to keep in float."""
    from cluster.errors import RecipeError
    from cluster.recipe import load_recipe
    from export.bundle import scan_student
    from export.prompts import read_prompts
    from export.recipe import ExportRecipe
    from export.sensitivity_view import proof_lines, scan_table, write_scan
    from factory.models import quiet, resolve

    if by not in ("block", "layer") or precision not in ("w8a8", "w8a16"):
        raise RecipeError("--by is block or layer, --precision w8a8 or w8a16", remedy="Choose one of these")
    recipe = load_recipe(ExportRecipe, None, overrides or [])
    quiet()
    found = scan_student(
        Path(resolve(model)),
        read_prompts(prompts),
        recipe.model_copy(update={"keep_budget": budget}),
        by,
        precision,
        count,
        lambda what: typer.echo(what, err=True),
    )
    print_tables(scan_table(found))
    for line in proof_lines(found):
        typer.echo(line)
    for path in write_scan(found, out):
        typer.echo(f"wrote {path}")


@app.command("try")
def try_build(
    folder: Annotated[Path, typer.Argument(help="a bundle folder: OUT/export/onnx")],
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    precision: Annotated[str, typer.Option(help="which build: fp32, w8a16, ...")] = "fp32",
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="guidance scale, of a bundle that takes one; default: the bundle's own")
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("out.png"),
) -> None:
    """Draw a picture with a build, through its own runtime and without PyTorch."""
    from cluster.errors import EdgeFusionError
    from export.proof import check_bundle
    from factory.picture_file import check_picture_path, write_picture

    if not prompt.strip():
        raise EdgeFusionError("the prompt is empty", remedy="Say what to draw")
    check_picture_path(out)
    check_bundle(folder)
    from export.bundle import open_bundle
    from export.words import tokenize

    build, facts = open_bundle(folder, precision)
    write_picture(out, build.at(guidance).picture(tokenize(folder, facts["tokenizer"], [prompt])[0], seed))
    typer.echo(f"wrote {out}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a bundle folder: OUT/export/onnx")],
    build: Annotated[list[str] | None, typer.Option(help="only this build (repeatable)")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="pictures to compare; default: all stored ones")] = None,
    runs: Annotated[int, typer.Option(min=1, help="timed runs after one warm-up")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write what was found to this file")] = None,
) -> None:
    """Repeat a bundle's proof from the bundle alone. Exit code 4: a damaged file; 6: a gate is missed; 0: all hold."""
    import json

    from cluster.storage import publish_bytes
    from export.proof import check_bundle

    check_bundle(folder)
    from export.verify import raise_failed, verify_bundle
    from export.verify_view import block_lines, end_lines, gates_table, recorded_lines, speed_table

    found = verify_bundle(folder, build or (), prompts, runs, threads, lambda what: typer.echo(what, err=True))
    if json_file is not None:
        publish_bytes(json_file, (json.dumps(found, indent=2) + "\n").encode())
    if found["builds"]:
        print_tables(gates_table(found), speed_table(found))
        for line in [*end_lines(found), *block_lines(found), *recorded_lines(found)]:
            typer.echo(line)
    raise_failed(found)
    typer.echo(f"{folder}: every file and every gate holds")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="bundle folders: OUT/export/onnx OUT/export/openvino ...")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("compare.html"),
    prompts: Annotated[int, typer.Option(min=1, help="prompts whose pictures are shown")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="timed runs after one warm-up")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """One page with bundles side by side: pictures, quality, size, latency, memory, all measured anew."""
    from export.proof import check_bundle

    for folder in folders:
        check_bundle(folder)
    from export.compare import write_compare

    write_compare(folders, out, prompts, runs, threads, lambda what: typer.echo(what, err=True))
    typer.echo(f"wrote {out}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="an onnx bundle: OUT/export/onnx")],
    out: Annotated[Path, typer.Option(help="folder to write; serve it by any web server")] = Path("demo"),
    precision: Annotated[str, typer.Option(help="which build: fp32, w8a16, ...")] = "fp32",
    ort_web: Annotated[
        Path | None, typer.Option("--ort-web", help="onnxruntime-web as npm packs it, where there is no network")
    ] = None,
) -> None:
    """A page that draws pictures on the visitor's own device, by WebGPU or WebAssembly; works without the network."""
    from export.proof import check_bundle

    check_bundle(folder)
    from export.demo import write_demo
    from export.pages import serve_line

    write_demo(folder, out, precision, ort_web)
    typer.echo(f"wrote {out}. Look: {serve_line(out)}, then http://localhost:8000")


@app.command("fetch-web")
def fetch_web() -> None:
    """Fetch what the browser's page needs (onnxruntime-web, by npm, once), so that runs write the page without the network."""
    from export.ort_web import keep

    typer.echo(f"kept in {keep()}")


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="a model folder, zoo:NAME, a UNet's config.json, or bk-sdm-tiny, sd15, ...")
    ],
    profile: Annotated[str, typer.Option(help="an NPU profile such as ethos-u85-1024, or a YAML file")],
    size_px: Annotated[int | None, typer.Option(help="side of the picture in pixels; default: the model's own")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for plan.json and plan.png")] = None,
    judge: Annotated[
        bool, typer.Option("--compile", help="also ask the chip's offline compiler (the npu extra)")
    ] = False,
) -> None:
    """Choose tiles for every attention block on an NPU: predicted working set, DRAM traffic and latency before and after."""
    from export.blocks import attention_blocks, read_architecture
    from export.plan_view import compiled_table, plan_table, write_plan
    from export.profile import load_profile
    from export.solve import solve

    chip = load_profile(profile)
    found = solve(attention_blocks(*read_architecture(model, size_px)), chip)
    print_tables(plan_table(found, chip))
    compiled = None
    if judge:
        from export.targets.judge import compile_plan

        compiled = compile_plan(found.blocks, chip)
        print_tables(compiled_table(found, compiled))
    if out is not None:
        for path in write_plan(found, chip, model, out, compiled):
            typer.echo(f"wrote {path}")


@app.command()
def npu(
    model: Annotated[
        str, typer.Argument(help="a model folder, zoo:NAME, a UNet's config.json, or bk-sdm-tiny, sd15, ...")
    ],
    profile: Annotated[str, typer.Option(help="an ethos-u85 profile, or a YAML file")] = "ethos-u85-1024",
    size_px: Annotated[int | None, typer.Option(help="side of the picture in pixels; default: the model's own")] = None,
    out: Annotated[Path, typer.Option(help="folder for the files and npu.json")] = Path("npu"),
    cut: Annotated[list[str] | None, typer.Option(help="untiled, tiled or parts (repeatable); default: all")] = None,
) -> None:
    """A whole UNet as W8A16 TFLite and what Arm's compiler says of it: operators left to the CPU, DRAM traffic, latency (the npu extra)."""
    from export.npu_report import CUTS, judge_unet, unet_table

    found = judge_unet(model, profile, out, size_px, tuple(cut or CUTS), lambda what: typer.echo(what, err=True))
    print_tables(unet_table(found))
    typer.echo(f"wrote {out / 'npu.json'}")


@app.command()
def profiles() -> None:
    """The NPU profiles that plan and the recipe's export.tiling know."""
    from export.profile import load_profile, profile_names

    table = Table("profile", "chip", "MiB for tiles", "assumed figures")
    for name in profile_names():
        chip = load_profile(name)
        assumed = sum(getattr(getattr(chip, field), "assumed", None) is not None for field in type(chip).model_fields)
        table.add_row(name, chip.chip, f"{chip.budget_bytes / 2**20:.1f}", str(assumed))
    print_tables(table)
