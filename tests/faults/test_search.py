"""A search is a function of its configuration, on a real Ray of any size, killed or not."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.faults.runs import Run, train_on
from tests.faults.stores import Stores

TRIALS = 9
EPOCHS = "--epochs 6 --warmup-epochs 1"
SEARCH = "--search clipping=0.02..0.32:log,none batch_size=16..128:pow2"
EARLIER = f"{SEARCH} --name early --trials 5 --seed 7 --pruner none {EPOCHS}".split()
FLAGS = f"--name s --trials {TRIALS} --seed 2 --from early {EPOCHS}".split()


def search(folder: Path, cpus: int, kills: int, chance: random.Random) -> list[Any]:
    """What the study of a sweep holds, `cpus` of whose trials run at once."""
    folder.mkdir()
    stores = Stores(folder, "agc_sweep", "s")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    stores.env["RAY_ADDRESS"] = cluster.address
    try:
        earlier = Run(stores, "sweep.py", *EARLIER)
        assert earlier.wait() == 0, earlier.output()
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
    assert len(json.loads((folder / "runs/s/beforehand.json").read_text())) == 5
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
