"""What fits where, and the reasons when it does not."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cluster.errors import EdgeFusionError
from cluster.needs import Need, Node, groups, parse_nodes, place
from edgefusion import app


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


def test_groups_hold_the_largest_step() -> None:
    needs = [Need("make", "render", 8, 1, 1, 12), Need("make", "score", 9, 1), Need("train", "train", 6, 1, 1)]
    gpu, cpu = groups(needs, gpus_per_node=4, cpus_per_node=4)
    assert (gpu.nodes, gpu.gpus, cpu.nodes) == (2, 4, 3)
    nodes = [Node("g", gpu.cpus, gpu.gpus, gpu.memory_gib)] * 2 + [Node("c", cpu.cpus)] * 3
    assert not any(fit.why for fit in place(needs, nodes))


@pytest.mark.parametrize("text", ["4", "x:cpus=1", "4:gpus=1", "4:cpus=1,disks=2", "2:cpus"])
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
