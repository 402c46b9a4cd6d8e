"""Resources per actor: one table. Nothing else decides how many cores, threads or GPUs an actor gets."""

import os
from dataclasses import dataclass
from typing import Any

from services.config import ClusterConfig

_CORES_FOR_BOTH = 4


@dataclass(frozen=True)
class Placement:
    """What one kind of actor asks Ray for, and how many torch threads it runs."""

    num_actors: int
    num_cpus: int
    num_gpus: float

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of Ray's `options`. Restarts are the controller's: it alone knows what a lost call was for."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "max_restarts": 0, "max_task_retries": 0}


@dataclass(frozen=True)
class Plan:
    """The table: stages follow each other, and actors that work at the same time never exceed the cores."""

    harvester: Placement
    trainer: Placement
    evaluator: Placement
    evaluate_while_training: bool


def plan(cluster: ClusterConfig, node_cpus: list[int]) -> Plan:
    """Place the actors on nodes of so many cores each.

    A harvester has one thread, so that its results do not depend on the number of cores; there are as many as fit. The
    trainer and the evaluator each lie on one node, so the largest one bounds them. With four cores there or more, or
    with GPUs, the evaluator follows the trainer's checkpoints while it trains; else it waits for the trainer's end.
    """
    largest = max(node_cpus)
    together = largest >= _CORES_FOR_BOTH or cluster.gpus_per_actor > 0
    evaluator_cpus = max(1, largest // 4) if together else largest
    return Plan(
        harvester=Placement(min(cluster.num_harvesters, sum(node_cpus)), 1, cluster.gpus_per_actor),
        trainer=Placement(1, max(1, largest - evaluator_cpus) if together else largest, cluster.gpus_per_actor),
        evaluator=Placement(1, evaluator_cpus, cluster.gpus_per_actor),
        evaluate_while_training=together,
    )


def actor_environment(hub_is_needed: bool) -> dict[str, str]:
    """Environment of every actor: no telemetry, and no hub calls where every model and text is local."""
    environment = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not hub_is_needed:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if commit := os.environ.get("DOLLHOUSE_COMMIT"):
        environment["DOLLHOUSE_COMMIT"] = commit
    return environment
