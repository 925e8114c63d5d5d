"""A search is a function of its configuration, on a real Ray of any size, killed or not."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.faults.runs import Run, train_on
from tests.faults.stores import Stores

TRIALS = 9
FLAGS = f"--name s --trials {TRIALS} --epochs 6 --warmup-epochs 1 --seed 2".split()


def search(folder: Path, cpus: int, kills: int, chance: random.Random) -> list[Any]:
    """What the study of a sweep holds, `cpus` of whose trials run at once."""
    folder.mkdir()
    stores = Stores(folder, "agc_sweep", "s")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    stores.env["RAY_ADDRESS"] = cluster.address
    try:
        arguments = FLAGS
        for _ in range(kills):
            run = Run(stores, "agc_sweep.py", *arguments)
            train_on(run, stores)
            time.sleep(chance.uniform(0, 4))
            run.process.kill()
            run.wait()
            arguments = ["--resume", "s"]
        run = Run(stores, "agc_sweep.py", *arguments)
        assert run.wait() == 0, run.output()
    finally:
        cluster.shutdown()
    stores.agree(TRIALS)
    return [
        (t.state, t.values, t.params, t.user_attrs, t.system_attrs, t.intermediate_values)
        for t in stores.study().trials
    ]


@pytest.mark.long
def test_one_at_a_time_and_four_at_a_time_killed_twice_are_one_search(
    tmp_path: Path, chance: random.Random
) -> None:
    one = search(tmp_path / "one", 1, 0, chance)
    four = search(tmp_path / "four", 4, 2, chance)
    assert len({str(trial[2]) for trial in one}) == TRIALS
    assert one == four
