"""Tells all machines of a Ray that they are about to be taken away, so that runs make checkpoints.

Usage: RAY_ADDRESS=HOST:PORT python drain.py SECONDS
"""

import sys
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nflab.cluster.preemption import drain


@ray.remote(num_cpus=0)
class Hold:
    """Has something to do: Ray ends a drained machine that has not."""

    def ready(self) -> None:
        """It is there."""


def main(seconds: float) -> None:
    """Drains all machines, and ends when the time is up; none ends before that."""
    ray.init(log_to_driver=False)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    holds = [Hold.options(scheduling_strategy=node).remote() for node in there]  # type: ignore[attr-defined]
    ray.get([hold.ready.remote() for hold in holds], timeout=60)
    end = time.time() + seconds
    for node in nodes:
        drain(node, end + 600)  # who calls this ends them, not Ray
    time.sleep(max(0.0, end - time.time()))


if __name__ == "__main__":
    main(float(sys.argv[1]))
