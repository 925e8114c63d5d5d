"""Reports on their way from Ray Train's controller process to the one that records them.

The controller imports this to pass them on, so it imports nothing that only the other needs.
"""

from typing import Any

import ray
from ray.train import UserCallback
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def mailbox() -> Queue:
    """A queue to this process, on its own node: as long as the driver's machine lives, so does
    what it has not yet fetched."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


class Listener(UserCallback):
    """Puts every report of rank 0 into a mailbox."""

    def __init__(self, mail: Queue) -> None:
        self._mail = mail

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: object
    ) -> None:
        self._mail.put(metrics[0])
