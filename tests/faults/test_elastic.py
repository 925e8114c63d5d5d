"""A run whose machines come and go."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from tests.conftest import edited_copy
from tests.faults.runs import Run, check_exact, reported, wait_until
from tests.faults.stores import Stores


@pytest.fixture
def machines() -> Iterator[Cluster]:
    """A Ray of one machine for the driver, and one for a worker."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.long
def test_a_run_takes_machines_that_come_and_outlives_those_that_go(
    tmp_path: Path, machines: Cluster
) -> None:
    """Ray Train looks for machines each minute, but here each second; a step takes one."""
    group = "platform/nflab/running/worker_group.py"
    slow = f"{' ' * 12}__import__('time').sleep(1)\n"
    copy = edited_copy(
        tmp_path / "copy",
        {
            group: ("        use_gpu", f"{' ' * 8}elastic_resize_monitor_interval_s=1,\n"),
            "platform/nflab/learning/loop.py": ("            profile.before_step()", slow),
        },
    )
    stores = Stores(tmp_path, "train", "e")
    stores.env["RAY_ADDRESS"] = machines.address
    # A rate at which rounding does not grow: two cuts of a batch part by 1e-8, at 0.02 by 6e-5, and
    # at the recipe's own by 1 %.
    flags = "--epochs 4 --base-learning-rate 0.005 --batch-size 64 --num-workers 1:2".split()
    run = Run(stores, "train.py", "--name", "e", *flags, root=copy)
    wait_until(lambda: reported(stores) >= 1, run)
    second = machines.add_node(num_cpus=1)

    def worlds() -> list[float]:
        (recorded,) = stores.runs()
        history = MlflowClient(stores.uri).get_metric_history(recorded.info.run_id, "world_size")
        return [point.value for point in sorted(history, key=lambda point: point.step)]

    wait_until(lambda: 2 in worlds(), run)
    machines.remove_node(second, allow_graceful=False)
    assert run.wait() == 0, run.output()
    assert worlds()[0] == 1 and 2 in worlds() and worlds()[-1] == 1, run.output()
    (ours,) = stores.runs()
    assert stores.steps(ours) == [1, 2, 3, 4]
    # The second epoch was cut where the machine came; nothing of it was trained twice.
    said = "".join(file.read_text() for file in (tmp_path / "runs" / "e" / "logs").iterdir())
    assert "the number of workers changes: a checkpoint is made" in said, said
    assert re.search(r"continues after epoch \d and \d+ steps", said), said
    check_exact(stores, ours, rel=1e-5)
