"""Placement and plan: actors fit the machines there are, and the figures are those of a calculation by hand."""

from pathlib import Path

import pytest

from services.config import ClusterConfig, RunConfig, parse
from services.placement import Node, actor_environment, plan
from services.planner import plan_run


@pytest.mark.parametrize(
    ("nodes", "harvesters", "trainer", "evaluator", "together"),
    [
        ([Node(1)], 1, 1, 1, False),
        ([Node(2)], 2, 2, 2, False),
        ([Node(4)], 4, 3, 1, True),
        ([Node(16)], 6, 12, 4, True),
        ([Node(2), Node(2)], 4, 2, 2, False),
        ([Node(2), Node(8), Node(4)], 6, 6, 2, True),
        ([Node(0), Node(4)], 4, 3, 1, True),  # a head that takes no actors
    ],
)
def test_actors_on_cores(nodes: list[Node], harvesters: int, trainer: int, evaluator: int, together: bool) -> None:
    placed = plan(ClusterConfig(num_harvesters=6), nodes)
    assert (placed.harvester.num_actors, placed.harvester.num_cpus) == (harvesters, 1)
    assert (placed.trainer.num_cpus, placed.evaluator.num_cpus) == (trainer, evaluator)
    assert placed.evaluate_while_training is together
    if together:  # they never exceed the largest node
        assert trainer + evaluator == max(node.num_cpus for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "share", "harvesters", "trainer", "together"),
    [
        ([Node(8, 1)], 1.0, 1, 8, False),  # one GPU: a second actor would wait for ever
        ([Node(8, 1)], 0.5, 2, 6, True),
        ([Node(8, 2)], 1.0, 2, 6, True),
        ([Node(2, 4)], 1.0, 2, 1, True),  # fewer cores than GPUs
        ([Node(1, 4)], 1.0, 1, 1, False),
        ([Node(64, 0), Node(8, 1), Node(8, 1)], 1.0, 2, 6, True),  # the large node has none
        ([Node(8, 1), Node(8, 1)], 0.5, 4, 6, True),
    ],
)
def test_actors_on_gpus(nodes: list[Node], share: float, harvesters: int, trainer: int, together: bool) -> None:
    placed = plan(ClusterConfig(num_harvesters=4, gpus_per_actor=share), nodes)
    assert placed.harvester.num_actors == harvesters
    assert placed.trainer.num_cpus == trainer
    assert placed.evaluate_while_training is together
    assert {actors.num_gpus for actors in (placed.harvester, placed.trainer, placed.evaluator)} == {share}


@pytest.mark.parametrize(("nodes", "share"), [([Node(8)], 0.5), ([Node(0)], 0.0), ([Node(0, 1), Node(4, 0)], 1.0)])
def test_actors_that_no_node_could_take_are_refused(nodes: list[Node], share: float) -> None:
    with pytest.raises(ValueError, match="no node has a core and so many GPUs"):
        plan(ClusterConfig(gpus_per_actor=share), nodes)


def test_the_controller_alone_restarts_actors() -> None:
    options = plan(ClusterConfig(), [Node(2)]).trainer.options
    assert options == {"num_cpus": 2, "num_gpus": 0.0, "max_restarts": 0, "max_task_retries": 0}


def test_actors_stay_off_the_hub_unless_it_is_needed() -> None:
    assert actor_environment(False)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in actor_environment(True)
    assert actor_environment(True)["HF_HUB_DISABLE_TELEMETRY"] == "1"


def _config(**changes: object) -> RunConfig:
    content: dict[str, object] = {
        "model": {"name": "nobody/model", "d_model": 100, "num_layers": 10, "num_parameters": 1e9, "dtype": "bfloat16"},
        "text": {"source": "hub", "dataset": "some/text"},
        "harvest": {"hooks": ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"], "max_rows": 1_000_050},
        "storage": {"rows_per_chunk": 4096, "chunks_per_shard": 4},
        "train": {"rows": 3_000_000, "batch_rows": 1000},
        "saes": [
            {"name": "a", "hook": "blocks.1.hook_resid_post", "d_latent": 1000, "k": 10},
            {"name": "b", "hook": "blocks.4.hook_resid_post", "d_latent": 500, "k": 10},
        ],
    }
    return parse(content | changes, "test")


def test_the_plan_is_the_calculation_by_hand() -> None:
    planned = plan_run(_config())
    rows = 7812 * 128  # whole windows
    assert (planned.num_rows, planned.rows_are_estimated, planned.d_model) == (rows, False, 100)
    assert planned.store_bytes == rows * (2 * 100 * 2 + 13)
    assert planned.num_objects == 245 * (2 + 4) + 62  # chunks of 4096 rows, a commit for each 4 of them
    assert planned.epochs == pytest.approx(3_000_000 / rows)
    assert planned.model_bytes == 2_000_000_000
    assert planned.trainer_bytes == 1500 * (4 * 4 * 2 * 100 + 4 * 1000)
    assert planned.forward_flops == pytest.approx(2 * 1e9 * rows * 5 / 10)
    assert planned.train_flops == pytest.approx(12 * 100 * 1500 * 3_000_000)
    assert "rows to harvest: 999,936" in planned.lines()
    assert "bytes in the store: 412.97 MB" in planned.lines()


def test_what_cannot_be_known_is_not_made_up() -> None:
    planned = plan_run(_config(model={"name": "nobody/model"}))
    assert (planned.d_model, planned.store_bytes, planned.trainer_bytes, planned.forward_flops) == (None,) * 4
    assert planned.num_rows is not None
    assert "memory of the trainer: known once the model is loaded" in planned.lines()


def test_local_text_is_estimated_from_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 7000)
    text = {"source": "files", "paths": [str(tmp_path / "*.txt")], "held_out_share": 1e-6}
    hooks = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
    planned = plan_run(_config(text=text, harvest={"hooks": hooks}))
    assert (planned.num_rows, planned.rows_are_estimated) == (2000, True)
    assert "rows to harvest: about 2,000" in planned.lines()
    bounded = plan_run(_config(text=text, harvest={"hooks": hooks, "max_rows": 1000}))
    assert (bounded.num_rows, bounded.rows_are_estimated) == (896, False)
