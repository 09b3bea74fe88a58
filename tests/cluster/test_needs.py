"""What fits where, and the reasons when it does not."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError, RecipeError
from cluster.needs import Need, Node, groups, need_of, nodes_of, parse_nodes, place
from cluster.places import suits
from cluster.recipe import build_recipe
from cluster.runner import ClusterRecipe
from cluster.stage import Stage
from edgefusion import app, cluster_view


def test_steps_take_turns_and_stages_of_one_step_share() -> None:
    nodes = [Node("a", 4, 1), Node("b", 2)]
    needs = [Need("make", "render", 1, 2, 1), Need("make", "score", 4, 1), Need("train", "train", 1, 4, 1)]
    fits = place(needs, nodes)
    assert [fit.placed for fit in fits] == [1, 4, 1] and not any(fit.why for fit in fits)
    assert fits[1].nodes == {"b": 2, "a": 2}, "CPU work goes to CPU nodes first"


@pytest.mark.parametrize(
    ("need", "placed", "words"),
    [
        (Need("s", "x", 3, 1, 1), 2, "0 GPUs are left in all and a worker needs 1"),
        (Need("s", "x", 1, 1, 2), 0, "a worker needs 2 GPUs and no node has more than 1"),
        (Need("s", "x", 1, 64), 0, "a worker needs 64 CPUs and no node has more than 8"),
        (Need("s", "x", 1, 1, 0, 48), 0, "a worker needs 48 GiB of memory and no node has more than 32"),
        (Need("s", "x", 3, 1, 0, 20), 2, "GiB of memory are left in all and a worker needs 20"),
    ],
)
def test_what_does_not_fit_says_why(need: Need, placed: int, words: str) -> None:
    (fit,) = place([need], [Node("a", 8, 1, 32), Node("b", 8, 1, 32)])
    assert fit.placed == placed and words in fit.why


def test_labels_resources_and_fewer_workers() -> None:
    nodes = [Node("a", 8, labels={"zone": "a"}), Node("b", 8, resources={"npu": 3}, labels={"zone": "b"})]
    quick = Need("s", "x", 4, 1, resources={"npu": 1})
    assert place([quick], nodes)[0].nodes == {"b": 3}
    assert "0 npu are left in all and a worker needs 1" in place([quick], nodes)[0].why
    assert place([replace(quick, workers_min=3)], nodes)[0].why == "", "three will do"
    (fit,) = place([replace(quick, workers=1, labels={"zone": "a"})], nodes)
    assert fit.placed == 0 and fit.why == "a worker needs 1 npu and no node has more than 0"
    (fit,) = place([replace(quick, labels={"zone": "c", "rack": "1"})], nodes)
    assert fit.why == "no node has the labels that it asks for (zone=c, rack=1)"


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [("a", "a"), ("!a", "b-"), ("in(a, b)", "ab"), ("!in(a,b)", "-"), ("in(b)", "b"), ("", "")],
)
def test_labels_are_asked_for_as_ray_spells_it(wanted: str, fits: str) -> None:
    for has in "ab-":
        assert suits({"zone": wanted}, {} if has == "-" else {"zone": has}) == (has in fits)


def test_a_recipe_places_its_stages() -> None:
    said = {"render": {"cpus": 2, "gpus": 0.5, "workers_min": 3, "resources": {"npu": 2}, "labels": {"zone": "a"}}}
    recipe = build_recipe(ClusterRecipe, {"stages": said, "memory_gib": {"render": 9}}, "test")
    need = need_of("make", Stage("render", dict, workers=2, gpus=1), recipe)
    assert need == Need("make", "render", 3, 2, 0.5, 9, 3, {"npu": 2}, {"zone": "a"})
    other = Stage("score", dict)
    assert recipe.placed(other) is other
    for bad, words in (
        ({"render": {"workers": 1, "workers_min": 2}}, "workers_min .2. is more than workers"),
        ({"train": {"workers": 2}}, "train_workers"),
        ({"render": {"resources": {"GPU": 1}}}, "GPU is no resource of the cluster's own"),
        ({"render": {"zone": "a"}}, "zone is not a known key"),
    ):
        with pytest.raises(RecipeError, match=words):
            build_recipe(ClusterRecipe, {"stages": bad}, "test")
    for key in ("cluster.stages={rendr: {cpus: 1}}", "cluster.memory_gib={rendr: 1}"):
        with pytest.raises(RecipeError, match=r"rendr is no stage of this recipe \(render, score, commit, train\)"):
            cluster_view(Path("recipes/edgefusion.yaml"), [key])


def test_groups_carry_what_their_stages_ask_for() -> None:
    needs = [
        Need("make", "render", 4, 1, 1, resources={"npu": 1, "disk": 0.5}, labels={"zone": "a"}),
        Need("train", "train", 4, 1, 1, labels={"zone": "a", "gpu": "h100"}),
        Need("make", "score", 2, 1, labels={"zone": "b"}),
    ]
    gpu, cpu = groups(needs, gpus_per_node=2, cpus_per_node=2)
    assert gpu.resources == {"disk": 1, "npu": 2} and gpu.labels == {"zone": "a", "gpu": "h100"}
    assert cpu.resources == {} and cpu.labels == {"zone": "b"}
    for value in ("b", "in(b,c)", "!a", "!in(a,b)", "not a label"):
        with pytest.raises(EdgeFusionError, match=f"stage train asks for nodes with zone={re.escape(value)}"):
            groups([needs[0], replace(needs[1], labels={"zone": value})], 1, 1)


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        (["in(l40s,h100)"], "l40s"),
        (["!l40s"], None),
        (["!in(l40s,h100)", "!a100"], None),
        (["in(l40s, h100)", "h100"], "h100"),
        (["!l40s", "in(l40s,h100)"], "h100"),
        (["in(l40s,h100)", "in(h100,h200)"], "h100"),
    ],
)
def test_nodes_are_labelled_so_that_all_stages_are_suited(asked: list[str], labels: str | None) -> None:
    """What is only ruled out needs no label; of a list, the first that the others allow."""
    needs = [Need("make", f"stage-{i}", 1, 1, 1, labels={"gpu": one}) for i, one in enumerate(asked)]
    gpu, _ = groups(needs, 1, 8)
    assert dict(gpu.labels) == ({"gpu": labels} if labels else {})
    assert not [fit.why for fit in place(needs, nodes_of(gpu)) if fit.why]


def test_stages_that_share_gpus_ask_for_what_they_take_together() -> None:
    needs = [Need("make", "render", 8, 1, 0.9, 18), Need("make", "score", 8, 0.5, 0.1, 4)]
    gpu, _ = groups(needs, gpus_per_node=4, cpus_per_node=4)
    assert (gpu.nodes, gpu.cpus, gpu.memory_gib) == (2, 16, 128), "1.5 CPUs and 22 GiB a GPU, not 5 and 40"
    assert not any(fit.why for fit in place(needs, [Node("g", gpu.cpus, gpu.gpus, gpu.memory_gib)] * 2))


def test_groups_hold_the_largest_step() -> None:
    needs = [Need("make", "render", 8, 1, 1, 12), Need("make", "score", 9, 1), Need("train", "train", 6, 1, 1)]
    gpu, cpu = groups(needs, gpus_per_node=4, cpus_per_node=4)
    assert (gpu.nodes, gpu.gpus, cpu.nodes) == (2, 4, 3)
    nodes = [Node("g", gpu.cpus, gpu.gpus, gpu.memory_gib)] * 2 + [Node("c", cpu.cpus)] * 3
    assert not any(fit.why for fit in place(needs, nodes))


@pytest.mark.parametrize(
    ("needs", "gpus_per_node"),
    [
        ([Need("make", "render", 1, 1, 1, 40), Need("make", "score", 3, 1, 1, 4)], 1),
        ([Need("make", "render", 1, 12, 1), Need("make", "score", 7, 0.5, 1)], 1),
        ([Need("make", "render", 4, 1, 1, 40), Need("make", "score", 4, 1, 1, 4)], 4),
        ([Need("make", "render", 3, 1, 0.6), Need("train", "train", 1, 1, 1)], 1),
        ([Need("make", "score", 3, 5), Need("make", "crop", 2, 1, 0, 20)], 1),
        ([Need("make", "score", 2, 1, 0, 3), Need("make", "commit", 1, 0, 0, 2)], 1),
        ([Need("make", "commit", 1, 0)], 1),
    ],
)
def test_every_worker_fits_on_a_node_whatever_ray_starts_first(needs: list[Need], gpus_per_node: int) -> None:
    sized = groups(needs, gpus_per_node, 8)
    assert not any(fit.why for fit in place(needs, [node for group in sized for node in nodes_of(group)]))
    for group, per in zip(sized, ("gpus", "cpus"), strict=True):
        mine = [need for need in needs if need.step == "make" and bool(need.gpus) == (per == "gpus")]
        for node in nodes_of(group)[:1]:
            for counts in itertools.product(*(range(need.workers + 1) for need in mine)):
                wants = {
                    what: sum(getattr(need, what) * count for need, count in zip(mine, counts, strict=True))
                    for what in ("cpus", "gpus", "memory_gib")
                }
                if wants[per] <= getattr(node, per):  # then nothing else keeps them from it
                    assert wants["cpus"] <= node.cpus and wants["memory_gib"] <= node.memory_gib


def test_a_worker_wider_than_a_node_is_refused() -> None:
    with pytest.raises(EdgeFusionError, match=r"stage score takes 12 CPUs and a node has 8.*--cpus-per-node 12"):
        groups([Need("make", "score", 1, 12)], 1, 8)
    with pytest.raises(EdgeFusionError, match=r"stage train takes 2 GPUs and a node has 1.*--gpus-per-node 2"):
        groups([Need("train", "train", 1, 1, 2)], 1, 8)
    assert groups([Need("make", "score", 1, 12)], 1, 12)[1].nodes == 1


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "x:cpus=1",
        "4:gpus=1",
        "4:cpus=1,disks=2",
        "2:cpus",
        "2:cpus=1,labels.zone",
        "2:cpus=1,resources.npu=x",
        "0:cpus=4",
    ],
)
def test_odd_nodes_are_refused(text: str) -> None:
    with pytest.raises(EdgeFusionError, match="--node takes"):
        parse_nodes(text)


def test_the_command_says_what_does_not_fit_and_exits_with_1() -> None:
    paper = ["cluster", "check", "recipes/edgefusion.yaml", "--node"]
    said = CliRunner().invoke(app, [*paper, "8:cpus=16,gpus=1"], env={"COLUMNS": "160"})
    assert said.exit_code == 0, said.output
    assert "runs Qwen/Qwen2.5-7B-Instruct by vLLM" in said.output
    said = CliRunner().invoke(app, [*paper, "4:cpus=16,gpus=1"], env={"COLUMNS": "160"})
    assert said.exit_code == 1 and "0 GPUs are left in all" in said.output
    more = ["--set", "cluster.stages={render: {labels: {zone: a}, workers_min: 1}}"]
    nodes = ["7:cpus=16,gpus=1,labels.zone=b", "--node", "1:cpus=16,gpus=1,labels.zone=a,resources.npu=2"]
    said = CliRunner().invoke(app, [*paper, *nodes, *more], env={"COLUMNS": "200"})
    assert said.exit_code == 0 and "1 x 16 CPUs, 1 GPUs, inf GiB, 2 npu, zone=a" in said.output, said.output
    assert "1 to " in said.output and "on 1 node, zone=a" in said.output
    more = ["--set", "cluster.memory_gib={render: 80}"]
    said = CliRunner().invoke(app, [*paper, "8:cpus=16,gpus=1,memory_gib=64", *more], env={"COLUMNS": "160"})
    assert said.exit_code == 1 and "needs 80 GiB of memory" in said.output


@pytest.mark.ray
def test_the_nodes_of_a_running_ray_are_read() -> None:
    from cluster.needs import ray_nodes
    from cluster.recipe import build_recipe
    from cluster.runner import ClusterRecipe

    (node,) = ray_nodes(build_recipe(ClusterRecipe, {"cpus": 3}, "test"))
    assert node.cpus == 3 and node.gpus == 0 and 0 < node.memory_gib < 10_000
