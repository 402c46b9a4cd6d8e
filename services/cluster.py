"""Ray, as the controller uses it: starting or joining it, and slots whose dead actors are replaced.

No stage's logic is here (`services.pipeline`), and no actor's (`workers.actors`).
"""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from services.config import ClusterConfig
from services.exporter import Exporter
from services.placement import Node, actor_environment
from workers.actors.shell import Reply
from workers.telemetry import ACTOR_RESTARTS_TOTAL, Telemetry

PROJECT = Path(__file__).parent.parent
_MOST_DEATHS_IN_A_ROW = 5


class StageError(RuntimeError):
    """A stage could not go on; the message is one sentence for the user."""


def start(cluster: ClusterConfig, *, hub_is_needed: bool) -> list[Node]:
    """Start Ray on this machine with explicit sizes, or join `cluster.address`; returns the nodes that are up.

    A cluster that is joined gets this project's folder as the working directory, so that it runs the code of this
    controller.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; it warns until set
    environment: dict[str, Any] = {"env_vars": actor_environment(hub_is_needed)}
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "dollhouse"}
    if cluster.address in {None, "local"}:
        ray.init(
            address="local",
            num_cpus=cluster.num_cpus,
            object_store_memory=cluster.object_store_bytes,
            include_dashboard=False,
            runtime_env=environment,
            **common,
        )
    else:
        ray.init(address=cluster.address, runtime_env={**environment, "working_dir": str(PROJECT)}, **common)
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(resources.get("CPU", 0)), float(resources.get("GPU", 0))) for resources in found]


class Slot:
    """One place for an actor, such as `harvester-0`; what dies in it is replaced by an actor of the same arguments."""

    def __init__(
        self, stage: str, index: int, make: Callable[[str], Any], exporter: Exporter, telemetry: Telemetry
    ) -> None:
        self.stage, self.name = stage, f"{stage}-{index}"
        self._make, self._exporter, self._telemetry = make, exporter, telemetry
        self.num_restarts = 0
        self._deaths_in_a_row = 0
        telemetry.count(ACTOR_RESTARTS_TOTAL, 0, stage=stage)  # a total that is absent until it counts alarms nobody
        exporter.begin(self.name)
        self.actor = make(self.name)

    def replace(self, cause: Exception) -> None:
        """Put a new actor in the place of a dead one. StageError when actors keep dying without any progress."""
        if getattr(cause, "actor_init_failed", False):
            raise StageError(_users_sentence(str(cause))) from cause
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > _MOST_DEATHS_IN_A_ROW:
            raise StageError(
                f"{self.name} died {self._deaths_in_a_row} times without progress "
                f"(last: {str(cause).splitlines()[0]}): see Ray's log of its worker, memory is the usual cause"
            ) from cause
        self.num_restarts += 1
        self._telemetry.count(ACTOR_RESTARTS_TOTAL, stage=self.stage)
        self._exporter.replaced(self.name)
        self.actor = self._make(self.name)

    def begin(self) -> None:
        """Say that the actor was handed work."""
        self._exporter.begin(self.name)

    def rest(self) -> None:
        """Say that the actor has nothing to do."""
        self._exporter.rest(self.name)

    def receive(self, reply: Reply[Any]) -> Any:
        """Take a reply's samples, return its result."""
        self._deaths_in_a_row = 0
        self._exporter.update(self.name, reply.snapshot)
        return reply.result

    def stream(self, call: Callable[[Any], Any]) -> Iterator[Any]:
        """The results of a generator call on the actor; when it dies, the whole call is made again on a new one."""
        self.begin()
        while True:
            try:
                for reference in call(self.actor):
                    yield self.receive(ray.get(reference))
                return
            except RayActorError as error:
                self.replace(error)

    def close(self) -> None:
        """End the actor; its totals stay in the metrics."""
        ray.kill(self.actor, no_restart=True)
        self._exporter.drop(self.name)


def _users_sentence(trace: str) -> str:
    """What an actor that could not start says: its ValueError's sentence, else the whole trace."""
    _, found, sentence = trace.strip().rpartition("ValueError: ")
    return sentence if found else f"a worker could not start: {trace}"


def users_error(error: RayTaskError) -> Exception:
    """What an actor's exception means to the user: a ValueError's own sentence, else the actor's traceback."""
    cause = error.cause
    if isinstance(cause, ValueError):
        return StageError(str(cause))
    return StageError(f"a worker failed: {error}")
