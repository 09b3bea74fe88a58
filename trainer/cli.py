"""`edgefusion trainer ...`: students, small decoders, and how good they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import RecipeError
from cluster.progress import bar_each, progress_bars
from cluster.recipe import as_overrides, load_recipe
from cluster.tables import print_tables
from trainer.judging import EvaluateRecipe, PreferRecipe, check_given
from trainer.progress import follow
from trainer.recipe import DecoderRecipe, EncodeRecipe

app = typer.Typer(no_args_is_help=True, help="Shards to a few-step student.")


@app.command("decoder")
def decoder(
    recipe: Annotated[Path | None, typer.Argument(help="a YAML file of these settings; options win over it")] = None,
    model: Annotated[str | None, typer.Option(help="pipeline or VAE folder to learn from; zoo:teacher")] = None,
    data: Annotated[str | None, typer.Option(help="packed data set, or a folder of pictures")] = None,
    out: Annotated[Path, typer.Option(help="the decoder lands in OUT/model; rerun to go on")] = Path("runs/decoder"),
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser steps")] = None,
    width: Annotated[int | None, typer.Option(min=4, help="channels; the widest that is cheap enough")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a key: --set fit.batch_images=8")
    ] = None,
) -> None:
    """Distil a VAE's decoder into an AutoencoderTiny that pipelines take as their `vae`. Rerun the same command to resume."""
    given = {"model": model, "data": data, "width": width, "fit.steps": steps}
    settings = load_recipe(DecoderRecipe, recipe, [*as_overrides(given), *(overrides or [])])
    from trainer.decoder import train_decoder

    with progress_bars() as bars:
        task = bars.add_task("decoder: latents", total=None)
        with follow(bars, {"decoder: fit": (out / "fit", settings.fit.steps)}):
            report = train_decoder(settings, out, lambda done, of: bars.update(task, completed=done, total=of))
    low, high = report["psnr_db_interval"]
    typer.echo(
        f"wrote {out / 'model'}: {report['psnr_db']:.2f} dB ({low:.2f} to {high:.2f}) against the original decoder on "
        f"{report['judged_pictures']} held-out pictures\n{report['macs']:,} of {report['original_macs']:,} multiply-accumulates: "
        f"{report['original_macs'] / report['macs']:.1f} times fewer; {report['parameters']:,} parameters"
    )


@app.command("encode")
def encode(
    data: Annotated[Path, typer.Argument(help="packed data set: the `dataset` folder of a run")],
    teacher: Annotated[
        str, typer.Option(help="pipeline whose VAE and text encoder the training will use")
    ] = "zoo:teacher",
    size: Annotated[int, typer.Option(min=32, help="edge, pixels: the training's trainer.size_px")] = 64,
    half: Annotated[bool, typer.Option(help="store float16: half the space, rounded")] = False,
    to: Annotated[
        str | None, typer.Option(help="URL at which `factory pack --to` published the same data set: beside it, too")
    ] = None,
    ray: Annotated[bool, typer.Option(help="on Ray actors instead of in this process")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override: --set workers=8 --set gpus=1")] = None,
) -> None:
    """Put latents and text states beside the shards, so that training encodes nothing. Rerun the same command to resume."""
    given = {"data": data, "teacher": teacher, "size_px": size, "dtype": "float16" if half else "float32"}
    options = as_overrides(given)
    if ray:
        options.append("cluster.runner=ray")
    settings = load_recipe(EncodeRecipe, None, [*options, *(overrides or [])])
    from cluster.runner import make_runner, stop_ray
    from factory.models import quiet
    from trainer.encode import encode as run
    from trainer.encode import publish_encodings
    from trainer.encodings import ENCODINGS

    quiet()
    runner = make_runner(settings.cluster)
    try:
        with progress_bars() as bars:
            task = bars.add_task("encode: shards", total=None)
            index = run(settings, runner, lambda done, of: bars.update(task, completed=done, total=of))
    finally:
        runner.close()
        if ray:
            stop_ray()
    place = data / ENCODINGS
    size_mib = sum(path.stat().st_size for path in place.iterdir()) / 2**20
    typer.echo(f"wrote {place}: {len(index['files'])} shards, {size_mib:.1f} MiB, bound to the encoders of {teacher}")
    if to:
        with progress_bars() as bars:
            task = bars.add_task(f"sending encodings to {to}", total=None)
            sent = publish_encodings(data, to, lambda done, of: bars.update(task, completed=done, total=of))
        typer.echo(f"sent {sent} of {len(index['files'])} files to {to}/{ENCODINGS}; the others were there and right")


@app.command("evaluate")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="students, teachers: diffusers folders, hub names or zoo:NAME")],
    data: Annotated[
        str | None,
        typer.Option(
            help="packed data set: prompts and reference pictures; or, beside --prompts, a folder of pictures"
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="prompts: lines, COCO's captions, a .csv, or hub:OWNER/NAME?split=test")
    ] = None,
    judge: Annotated[str, typer.Option(help="open_clip folder, zoo:NAME or model name")] = "zoo:judge",
    judge_pretrained: Annotated[str | None, typer.Option(help="weight tag of a judge that is a model name")] = None,
    steps: Annotated[str, typer.Option(help="denoising steps of few-step students")] = "4,2,1",
    count: Annotated[int, typer.Option(min=2, help="prompts, one picture each")] = 512,
    fidelity: Annotated[bool, typer.Option(help="also IS and FID on Inception features")] = False,
    out: Annotated[Path, typer.Option(help="pictures and evaluation.json; rerun to go on")] = Path("runs/evaluation"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override: --set teacher_guidance=4")] = None,
) -> None:
    """Compare models on the same prompts and seeds: R@1, CLIP score, CMMD and FID on the judge's features, with intervals."""
    given: dict[str, Any] = {"models": models, "data": data, "prompts": prompts, "judge": judge}
    given |= {"judge_pretrained": judge_pretrained, "count": count, "fidelity": fidelity}
    settings = load_recipe(EvaluateRecipe, None, [*as_overrides(given), f"steps=[{steps}]", *(overrides or [])])
    check_given(settings.models, settings.data, settings.prompts)
    from trainer.measure import REPORT, table
    from trainer.measure import evaluate as compare

    with progress_bars() as bars:
        report = compare(settings, out, bar_each(bars))
    print_tables(table(report))
    typer.echo(f"wrote {out / REPORT}")


@app.command("prefer")
def prefer(
    a: Annotated[str, typer.Argument(help="a model: diffusers folder, hub name or zoo:NAME")],
    b: Annotated[str, typer.Argument(help="the model to compare it with")],
    data: Annotated[str | None, typer.Option(help="packed data set whose prompts are drawn")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="prompts: lines, COCO's captions, a .csv, or hub:OWNER/NAME?split=test")
    ] = None,
    steps: Annotated[str, typer.Option(help="denoising steps: one number, or A's and B's as 4,25")] = "4",
    count: Annotated[int, typer.Option(min=2, help="pairs")] = 100,
    out: Annotated[Path, typer.Option(help="pictures, votes and the result; rerun to go on")] = Path("runs/preference"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="port on the loopback; 0 takes a free one")] = 0,
    report: Annotated[bool, typer.Option("--report", help="only count the votes that are there")] = False,
    show: Annotated[bool, typer.Option("--open/--no-open", help="open the page in the default browser")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override: --set teacher_guidance=4")] = None,
) -> None:
    """The paper's human study: blind pairs on a local page, several raters, ties; A's win rate with its interval. Stop with Ctrl-C."""
    both = steps.split(",")
    if len(both) > 2:
        raise RecipeError(f"--steps {steps} names {len(both)} numbers", remedy="Give one, or A's and B's such as 4,25")
    given: dict[str, Any] = {"a": a, "b": b, "data": data, "prompts": prompts, "count": count}
    given |= {"steps_a": both[0], "steps_b": both[-1]}
    settings = load_recipe(PreferRecipe, None, [*as_overrides(given), *(overrides or [])])
    if not report:
        check_given([settings.a, settings.b], settings.data, settings.prompts)
    import webbrowser

    from trainer.prefer.server import PreferServer
    from trainer.prefer.study import RESULT, kept_study, open_study

    if report:
        study = kept_study(settings, out)
    else:
        with progress_bars() as bars:
            study = open_study(settings, out, bar_each(bars))
        with PreferServer(study, port) as server:
            typer.echo(f"Open {server.url} (the address is the key: whoever has it may vote)")
            if show:
                webbrowser.open(server.url)
            server.serve()
    found = study.result()
    rate = (
        "nobody has decided yet"
        if found["win_rate"] is None
        else (
            f"A wins {found['win_rate']:.1%} of the decided votes (95% interval {found['low']:.1%} to {found['high']:.1%})"
        )
    )
    typer.echo(
        f"{rate}: {found['wins_a']} for A, {found['wins_b']} for B, {found['ties']} ties, {found['raters']} raters\n"
        f"wrote {out / RESULT}"
    )
