"""Resources per actor: one table. Nothing else decides how many cores, threads or GPUs an actor gets."""

from dataclasses import dataclass
from typing import Any

from services.config import ClusterConfig

_CORES_FOR_BOTH = 4
_CORES_FOR_BOTH_WITH_GPUS = 2


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster offers."""

    num_cpus: int
    num_gpus: float = 0.0


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


def plan(cluster: ClusterConfig, nodes: list[Node]) -> Plan:
    """Place the actors on the nodes that have a core, and GPUs where actors need them.

    A harvester has one thread, so that its results do not depend on the number of cores; there are as many as fit. The
    trainer and the evaluator each lie on one node, so the largest one bounds them. With four cores there or more (two
    where GPUs do the work), and GPUs for both, the evaluator follows the trainer's checkpoints while it trains; else it
    waits for the trainer's end. Raises ValueError where no node could take any actor: Ray would wait for ever.
    """
    gpus = cluster.gpus_per_actor
    usable = [node for node in nodes if node.num_cpus >= 1 and node.num_gpus >= gpus]
    if not usable:
        raise ValueError(f"cluster.gpus_per_actor is {gpus:g}, but no node has a core and so many GPUs: lower it")
    places = sum(min(node.num_cpus, int(node.num_gpus / gpus)) if gpus else node.num_cpus for node in usable)
    largest = max(node.num_cpus for node in usable)
    together = largest >= (_CORES_FOR_BOTH_WITH_GPUS if gpus else _CORES_FOR_BOTH) and places > 1
    evaluator_cpus = max(1, largest // 4) if together else largest
    return Plan(
        harvester=Placement(min(cluster.num_harvesters, places), 1, gpus),
        trainer=Placement(1, largest - evaluator_cpus if together else largest, gpus),
        evaluator=Placement(1, evaluator_cpus, gpus),
        evaluate_while_training=together,
    )


def actor_environment(hub_is_needed: bool) -> dict[str, str]:
    """Environment of every actor: no telemetry, no hub calls where model and text are local, memory kept for reuse.

    Without the last, glibc gives each large tensor back to the system, and fresh pages cost more than the arithmetic on
    them: `tests.benchmarks.bench_harvest` tells how much.
    """
    environment = {
        "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not hub_is_needed:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return environment
