import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from cluster.errors import EdgeFusionError, TargetUnavailable
from export.bundle import export_student, open_bundle
from export.card import _text
from export.graph import Graph, decoder_graph
from export.layers import HIGH_PRECISION
from export.openvino_core import openvino_core
from export.parity import failures, snr_db
from export.proof import read_reference, reference_inputs, write_sample
from export.quantise_openvino import quantise_openvino
from export.recipe import PRECISIONS, ExportRecipe, GateRecipe, Target
from export.targets import openvino_cpu
from export.targets.contract import EdgeTarget, Source, bytes_of, check_open
from export.targets.registry import MODULES, find_target, target_of
from factory.models import resolve

PROMPTS = ("a 3d render of a red apple on a white background", "a flat icon of a fox on a blue background")
STUDENT = Path(resolve("zoo:student-fewstep"))


def test_every_target_of_a_recipe_has_one_contract() -> None:
    assert set(get_args(Target)) == set(MODULES) == set(PRECISIONS)
    samples = Path("export/samples")
    for name in MODULES:
        target = find_target(name)
        assert target.name == name and target.suffix.startswith(".")
        assert len((samples / f"{target.sample or name}_sample.py").read_text().splitlines()) < 60
        assert ExportRecipe(targets=[name], precisions=["fp32", "w8a16"]).builds(name)


def test_a_missing_package_is_told_with_the_line_that_installs_it() -> None:
    target = EdgeTarget("odd", ".odd", "odd-runtime", packages={"no_such_package_here": "odd-runtime"}, extra="odd")
    with pytest.raises(TargetUnavailable, match=r"odd needs odd-runtime.*pip install 'edgefusion\[odd\]'"):
        target.require()


EXTRAS = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", [name for name in MODULES if find_target(name).packages])
def test_the_line_that_installs_a_targets_packages_is_pyprojects(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = find_target(name)
    brought = {re.split("[<>=[]", one)[0] for one in EXTRAS[target.extra]}
    assert set(target.packages.values()) <= brought and target.library in brought
    monkeypatch.setattr("export.targets.contract.find_spec", lambda module: None)
    line = rf"target {name} needs .*pip install 'edgefusion\[{target.extra}\]'"
    with pytest.raises(TargetUnavailable, match=line):
        target.require()
    with pytest.raises(TargetUnavailable, match=line):
        export_student(STUDENT, PROMPTS, ExportRecipe(targets=[name], precisions=["fp32", "w8a16"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if target.not_here():
        line = target.not_here()  # no package would help
    if name != "qnn":  # whose bundles are played by ONNX Runtime
        with pytest.raises(TargetUnavailable, match=line):
            target.open(tmp_path, {}, 1)


def test_every_extra_that_an_error_names_is_there() -> None:
    said = [
        (path, extra)
        for folder in ("cluster", "factory", "trainer", "export")
        for path in Path(folder).rglob("*.py")
        for extra in re.findall(r"edgefusion\[([a-z0-9-]+)\]", path.read_text())
    ]
    assert len(said) > 5 and [one for one in said if one[1] not in EXTRAS] == []


def test_the_cards_line_brings_what_the_sample_imports(student_bundles: Path) -> None:
    facts = json.loads((student_bundles / "onnx" / "bundle.json").read_text())
    for name in MODULES:
        target = find_target(name)
        first = (Path("export/samples") / f"{target.sample or name}_sample.py").read_text().splitlines()[0]
        needs = set(first.split("pip install ")[1].split(".")[0].replace(" (on macOS)", "").split())
        if target.library == "onnxruntime-gpu":
            needs = needs - {"onnxruntime"} | {"onnxruntime-gpu"}
        line = next(one for one in _text(facts | {"target": name}).splitlines() if "pip install" in one)
        assert set(line.split()[2:]) == needs, name


def test_the_docs_say_what_sample_programs_need_besides() -> None:
    told = re.search(r"Needed besides: (.*?)\. The", Path("docs/export.md").read_text())
    assert told is not None
    needs: dict[str, tuple[str, ...]] = {}
    for part in told[1].split("; "):
        names, things = part.split(": ")
        needs |= dict.fromkeys(re.findall(r"`(\w+)`", names), tuple(things.split(", ")))
    assert needs == {name: find_target(name).sample_needs for name in MODULES if find_target(name).sample_needs}


def test_a_target_that_quantises_every_layer_does_not_claim_otherwise(student_bundles: Path) -> None:
    facts = json.loads((student_bundles / "onnx" / "bundle.json").read_text())
    assert facts["keep"] == list(HIGH_PRECISION) == find_target("onnx").kept(HIGH_PRECISION)
    assert "tools of" not in _text(facts)
    kept = find_target("coreml").kept(facts["keep"])
    card = _text(facts | {"target": "coreml", "keep": kept})
    assert kept == [] and "is quantised: nothing. The tools of coreml quantise every layer" in card


def test_onnx_runtimes_version_is_told_whoever_brought_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu takes the place of onnxruntime, of which no distribution is left then."""
    import onnxruntime

    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail(f"there is no {name}"))
    assert find_target("cuda").runtime() == f"onnxruntime-gpu {onnxruntime.__version__}"
    assert find_target("onnx").runtime() == f"onnxruntime {onnxruntime.__version__}"


def test_times_are_labelled_with_what_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100")
    assert find_target("onnx").hardware(2).endswith("CPU, 2 threads")
    assert find_target("cuda").hardware(2) == "NVIDIA H100 by CUDAExecutionProvider"
    # Of threads that nobody asked for nothing is said.
    assert find_target("executorch").hardware(2).endswith(f"CPU, all {os.cpu_count()} cores")
    assert find_target("coreml").hardware(2).endswith("what Core ML chose of CPU, GPU and Neural Engine")
    mixed = {"text_encoder": "fp16", "unet": "w8a16", "vae_decoder": "fp16"}
    assert find_target("litert").times_kind(mixed) == "emulated", "ONNX Runtime's CPU plays the halves"
    assert (
        find_target("litert").times_kind(mixed | dict.fromkeys(("text_encoder", "vae_decoder"), "fp32")) == "measured"
    )


def test_tensorrt_takes_halves_for_half_graphs_only() -> None:
    target: Any = find_target("tensorrt")
    halves = {name: target._providers(name)[0][1]["trt_fp16_enable"] for name in ("unet.onnx", "unet.fp16.onnx")}
    assert halves == {"unet.onnx": False, "unet.fp16.onnx": True}


@pytest.mark.parametrize("name", ["onnx", "cuda", "tensorrt"])
def test_the_sample_asks_for_what_was_proven(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = find_target(name)
    graphs = {"text_encoder": "text_encoder.fp16.onnx", "unet": "unet.onnx", "vae_decoder": "vae_decoder.fp16.onnx"}
    (tmp_path / "bundle.json").write_text(
        json.dumps({"target": name, "builds": {"mine": {"graphs": graphs}}, "scheduler": {}})
    )
    write_sample(tmp_path, target.sample or name)
    asked: dict[str, list[Any]] = {}

    class Session:
        def __init__(self, path: str, providers: list[Any]) -> None:
            asked[Path(path).name] = providers
            self.got = [one if isinstance(one, str) else one[0] for one in providers]

        def get_providers(self) -> list[str]:
            return self.got[starts:]

    preloaded: list[bool] = []
    fake = SimpleNamespace(InferenceSession=Session, preload_dlls=lambda: preloaded.append(True))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr("sys.argv", ["sample.py", "a fox"])
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    starts = 0
    with pytest.raises(Exception, match="No such file"):  # it goes on as far as this bundle does
        runpy.run_path(str(tmp_path / "sample.py"))
    assert asked == {file: target._providers(file) for file in graphs.values()}
    assert preloaded and os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    starts = 1  # the first one does not
    with pytest.raises(Exception, match="No such file" if name == "onnx" else "ExecutionProvider does not start"):
        runpy.run_path(str(tmp_path / "sample.py"))


def test_float32_is_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, tensorrt = (find_target(name)._providers("unet.onnx") for name in ("cuda", "tensorrt"))  # type: ignore[attr-defined]
    assert cuda[0] == tensorrt[1] == ("CUDAExecutionProvider", {"use_tf32": "0"})
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["TensorrtExecutionProvider"])
    find_target("tensorrt").not_here()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_a_provider_that_does_not_start_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """get_available_providers says what the wheel was built with, and a session without it runs on the CPU and says so nowhere."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this wheel is built with it")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(TargetUnavailable, match=r"CUDAExecutionProvider does not start.*leave cuda out"):
        export_student(STUDENT, PROMPTS, ExportRecipe(targets=["cuda"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_session_that_the_cpu_took_over_is_no_gpus(student_bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this wheel is built with it")
    target: Any = find_target("cuda")
    monkeypatch.setattr(type(target), "not_here", lambda self: "")
    names = {graph: f"{graph}.onnx" for graph in ("text_encoder", "unet", "vae_decoder")}
    with pytest.raises(TargetUnavailable, match=r"by CPUExecutionProvider and not by CUDAExecutionProvider"):
        target.open(student_bundles / "onnx", names, 1)


def test_what_tensorrt_leaves_to_cuda_stands_apart() -> None:
    from export.targets.onnx_runtime import CPU, CUDA, TENSORRT, _tally

    ran = [("TRTKernel_graph", TENSORRT), ("Conv", CUDA), ("Conv", CUDA), ("Sin", CPU)]
    events = [{"cat": "Node", "args": {"op_name": kind, "provider": by}} for kind, by in ran]
    events.append({"cat": "Session", "args": {}})
    told = _tally(events, TENSORRT)
    assert told["accelerated"] == 1 and told["on_cuda"] == {"Conv": 2} and told["not_accelerated"] == {"Sin": 1}
    told = _tally(events[1:], CUDA)
    assert told["accelerated"] == 2 and told["not_accelerated"] == {"Sin": 1} and "on_cuda" not in told


def test_tiles_are_looked_for_where_they_can_be_seen(tmp_path: Path) -> None:
    """Qualcomm's file is one operator, the context binary."""
    path, origin = tmp_path / "unet.w8a16.onnx", tmp_path / "unet.w8a16.source.onnx"
    path.touch()
    assert find_target("qnn").readable(path) == path == find_target("onnx").readable(path)
    origin.touch()
    assert find_target("qnn").readable(path) == origin


@pytest.mark.parametrize(
    ("name", "there", "shipped"),
    [
        ("qnn", ("u.onnx", "u_qnn.bin", "u.source.onnx"), {"u.onnx", "u_qnn.bin"}),
        ("qnn", ("u.onnx",), {"u.onnx"}),
        ("ethos", ("u.tflite", "u_vela.tflite", "u.vela.json", "u.host.onnx"), {"u_vela.tflite", "u.host.onnx"}),
        ("ethos", ("u.onnx",), {"u.onnx"}),  # its encoder and decoder
        ("exynos", ("u.tflite", "u.operators.json", "u.host.onnx"), {"u.tflite", "u.host.onnx"}),
        ("litert", ("u.tflite", "u.host.onnx"), {"u.tflite", "u.host.onnx"}),
        ("openvino", ("u.xml", "u.bin"), {"u.xml", "u.bin"}),
        ("onnx", ("u.onnx", "u.onnx.data"), {"u.onnx", "u.onnx.data"}),
    ],
)
def test_a_size_is_of_what_a_device_needs(name: str, there: tuple[str, ...], shipped: set[str], tmp_path: Path) -> None:
    for file in there:
        (tmp_path / file).write_bytes(b"12345")
    target = find_target(name)
    assert {path.name for path in target.shipped(tmp_path / there[0])} == shipped
    assert bytes_of(target, tmp_path / there[0]) == 5 * len(shipped)


def test_what_is_no_number_is_never_near() -> None:
    zero, one = np.zeros(4), np.ones(4)
    wrong = np.array([1, 1, 1, np.nan])
    assert snr_db(one, one) == 200 and snr_db(one, wrong) == snr_db(one, one / 0.0) == snr_db(zero, one) == -200
    build = {"text_encoder": "fp32", "unet": "w8a16", "vae_decoder": "fp32"}
    proof = {"graph_snr_db": {"text_encoder": 99.0, "unet": snr_db(one, wrong), "vae_decoder": 99.0}}
    proof |= {"psnr_db": 99.0, "psnr_db_min": 99.0, "ssim_mean": 1.0}
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert failures(build, proof, [picture], GateRecipe()) == [
        "unet: gives what is not a number, or anything but zero where PyTorch gives zero"
    ]


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_told_before_any_work(name: str, tmp_path: Path) -> None:
    if not find_target(name).not_here():
        pytest.skip("this machine has it")
    with pytest.raises(TargetUnavailable, match=r"only .*CPUExecutionProvider.*onnxruntime-gpu"):
        export_student(STUDENT, PROMPTS, ExportRecipe(targets=[name]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_signals_are_heard_after_builds_have_come_and_gone(student_bundles: Path) -> None:
    """OpenVINO takes the stack that signals come on for itself, and Ctrl-C once ended the process by a fault of memory."""
    code = """
import gc, signal, sys
from pathlib import Path
from export.targets.registry import find_target
names = {graph: f"{graph}.xml" for graph in ("text_encoder", "unet", "vae_decoder")}
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
first, second = (find_target("openvino").open(Path(sys.argv[1]), names, 1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.raise_signal(signal.SIGUSR1)
"""
    words = [sys.executable, "-c", code, str(student_bundles / "openvino")]
    said = subprocess.run(words, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "heard\n"), said.stderr


def test_an_openvino_device_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_target("openvino").device == "CPU" and find_target("onnx", "NPU").device == ""
    assert target_of({"target": "openvino", "device": "NPU"}).device == "NPU"
    with pytest.raises(ValueError, match="openvino_device"):
        ExportRecipe(openvino_device="TPU")
    asked: list[dict[str, str]] = []

    class Core:
        available_devices: ClassVar = ["CPU", "GPU.0", "GPU.1"]

        def compile_model(self, model: str, device: str, config: dict[str, str]) -> object:
            asked.append({"model": Path(model).name, "device": device, **config})
            return object()

    monkeypatch.setattr(openvino_cpu, "openvino_core", Core)
    assert not find_target("openvino", "GPU").not_here() and not find_target("openvino", "GPU.1").not_here()
    recipe = ExportRecipe(targets=["openvino"], openvino_device="NPU")
    with pytest.raises(
        TargetUnavailable, match=r"finds no NPU here, only CPU, GPU\.0, GPU\.1.*export\.openvino_device"
    ):
        export_student(STUDENT, PROMPTS, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = {graph: f"{graph}.xml" for graph in ("text_encoder", "unet", "vae_decoder")}
    find_target("openvino", "GPU.1").open(tmp_path, names, 3)
    assert asked[1] == {"model": "unet.xml", "device": "GPU.1", "INFERENCE_PRECISION_HINT": "f32"}
    Core.available_devices.append("NPU")
    find_target("openvino", "NPU").open(tmp_path, names, 3)
    assert asked[-1]["INFERENCE_PRECISION_HINT"] == "f16" and "INFERENCE_NUM_THREADS" not in asked[-1]
    find_target("openvino").open(tmp_path, names, 3)
    assert asked[-1]["INFERENCE_NUM_THREADS"] == 3


def test_int8_weights_with_bf16_arithmetic(student_bundles: Path, tmp_path: Path) -> None:
    core = openvino_core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    reference = read_reference(student_bundles / "onnx")
    inputs = reference_inputs(reference, "unet")
    path = tmp_path / "unet.w8bf16.xml"
    quantise_openvino(student_bundles / "onnx" / "unet.onnx", path, "w8bf16", [], ["conv_in"])
    model = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    assert 20 < snr_db(reference["unet.out"], np.array(model(inputs)[0])) < 60
    plain = (student_bundles / "openvino" / "unet.w8.bin").stat().st_size
    assert path.with_suffix(".bin").stat().st_size < plain


def test_a_build_that_does_not_run_here_says_so_everywhere(student_bundles: Path) -> None:
    facts = json.loads((student_bundles / "onnx" / "bundle.json").read_text())
    build = facts["builds"]["w8"]
    build |= {"not_run": "it runs on the moon", "parity": None, "measured_ms": None}
    card = _text(facts)
    assert "| w8 | not run on the machine that built it: it runs on the moon |" in card

    class Elsewhere(EdgeTarget):
        def not_here(self) -> str:
            return "it runs on the moon"

    with pytest.raises(EdgeFusionError, match="no far bundle runs on this machine: it runs on the moon"):
        check_open(Elsewhere("far", ".far", "far"), Path("bundle"))


def small_graphs() -> list[Graph]:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.words(input_ids)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.line = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 8)
            self.out = nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            seen = self.norm(self.conv(latent)) + self.line(text).mean(1)[..., None, None]
            return self.out(nn.functional.silu(seen) + (timestep / 1000).sin()[:, None, None, None])

    torch.manual_seed(0)
    latent = torch.randn(1, 4, 8, 8)
    net = {"latent": latent, "timestep": torch.tensor([999.0]), "text": torch.randn(1, 5, 8)}
    vae = AutoencoderTiny(decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
    return [
        Graph("text_encoder", Text().eval(), {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}, "text"),
        Graph("unet", Net().eval(), net, "prediction"),
        decoder_graph(vae, latent),
    ]


@pytest.mark.parametrize(("name", "precision"), [("executorch", "fp32"), ("coreml", "fp16")])
def test_small_graphs_lower_by_an_extra_and_agree(name: str, precision: str, tmp_path: Path) -> None:
    target = find_target(name)
    try:
        target.require()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    names = {}
    for graph in (graphs := small_graphs()):
        rows = [{label: tensor.numpy() for label, tensor in graph.inputs.items()}]
        names[graph.name] = f"{graph.name}{target.suffix}"
        source = Source(graph, tmp_path / "none.onnx", rows, ["out"])
        target.lower(source, precision, tmp_path / names[graph.name])
        assert bytes_of(target, tmp_path / names[graph.name]) > 100
    if target.not_here():
        with pytest.raises(TargetUnavailable, match=target.not_here()):
            target.open(tmp_path, names, 1)
        return
    calls = target.open(tmp_path, names, 1)
    for graph in graphs:
        wanted = graph.module(*graph.inputs.values()).detach().numpy()
        got = calls[graph.name]({label: tensor.numpy() for label, tensor in graph.inputs.items()})
        assert snr_db(wanted, got) > 90
    assert (target.fallback(tmp_path / names["unet"]) or {})["accelerated_parts"] > 0


@pytest.mark.long
def test_core_ml_is_given_no_aliases() -> None:
    from export.targets.coreml import without_aliases

    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            alias = torch.ops.aten.alias.default
            return alias(alias(x) * 2)

    x = torch.arange(6.0).reshape(2, 3)
    program = torch.export.export(Named(), (x,)).run_decompositions({})
    assert "alias" in str(program.graph)
    program = without_aliases(program)
    assert "alias" not in str(program.graph) and torch.equal(program.module()(x), 2 * x)


@pytest.mark.parametrize("name", ["executorch", "coreml", "qnn"])
def test_an_extra_keeps_guidance_as_an_input(name: str, guided_students: Path, tmp_path: Path) -> None:
    try:
        find_target(name).require()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    few = {"calibration_prompts": 2, "parity_prompts": 2, "latency_runs": 1, "threads": 1}
    recipe = ExportRecipe.model_validate({"targets": [name], "precisions": ["fp32"], "guidance_range": [3, 7], **few})
    export_student(guided_students / "guided", ("a fox", "a red apple"), recipe, tmp_path)
    facts = json.loads((tmp_path / name / "bundle.json").read_text())
    assert facts["scheduler"]["guidance"] == {"scale": 5, "low": 3, "high": 7, "width": 256}
    if not facts["builds"]["fp32"]["not_run"]:
        ends = facts["builds"]["fp32"]["parity"]["ends"]
        assert [ends["low"]["scale"], ends["high"]["scale"]] == [3, 7]
        assert min(one["psnr_db"] for one in ends.values()) > 60


@pytest.mark.parametrize("name", ["executorch", "coreml"])
def test_a_bundle_of_an_extra(name: str, tmp_path: Path) -> None:
    try:
        find_target(name).require()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    recipe = ExportRecipe(
        targets=[name], precisions=["fp32"], calibration_prompts=1, parity_prompts=1, latency_runs=1, threads=1
    )
    export_student(STUDENT, PROMPTS, recipe, tmp_path)
    facts = json.loads((tmp_path / name / "bundle.json").read_text())
    build = facts["builds"]["fp32"]
    if build["not_run"]:
        assert build["parity"] is build["measured_ms"] is build["emulated_ms"] is None
        assert all(build["bytes"].values())
        return
    assert min(build["parity"]["graph_snr_db"].values()) > 60
    opened, _ = open_bundle(tmp_path / name, "fp32", 1)
    assert opened.picture(np.full((1, facts["tokenizer"]["length"]), 5), 0).shape[2] == 3


def test_a_cold_start_brings_no_pytorch_in() -> None:
    """`verify` measures it, in a process that imports the targets and draws."""
    code = "import sys, export.runtime, export.targets.registry as r, export.words; [r.find_target(n) for n in ('onnx', 'openvino', 'coreml', 'litert', 'qnn')]; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout == "False\n", said.stderr
