"""How many workers and runs a cluster holds, beside a count of our own and Ray's."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nflab.cluster.placement import Fleet, Kind, Machine, launchable, place, slots
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import ConfigError
from tests.conftest import stop_marked

LAPTOP = Fleet([{"CPU": 2, "GPU": 0}], own=True)
CPU_CLUSTER = Fleet([{"CPU": 6}, {"CPU": 4}])
GPU_CLUSTER = Fleet([{"CPU": 32, "GPU": 4}, {"CPU": 32, "GPU": 4}])
APART = Fleet([{"CPU": 2, "GPU": 4}, {"CPU": 64}])
"""Most of the CPUs are where no GPU is."""

ONE, FOUR = {"CPU": 8, "GPU": 1}, {"CPU": 48, "GPU": 4}
LAUNCHED = Fleet([{"CPU": 0}], [Kind(ONE, 4, "one"), Kind(FOUR, 2, "four")], 4)


@pytest.mark.parametrize(
    ("fleet", "scale", "gpus_per_worker", "max_concurrent"),
    [
        (LAPTOP, ScaleConfig(num_workers=1), 0, 2),
        (LAPTOP, ScaleConfig(num_workers=2), 0, 1),
        (LAPTOP, ScaleConfig(num_workers=3), 0, 1),
        (LAPTOP, ScaleConfig(num_workers=16), 0, 1),
        (CPU_CLUSTER, ScaleConfig(num_workers=1), 0, 10),
        (CPU_CLUSTER, ScaleConfig(num_workers=4), 0, 2),
        (CPU_CLUSTER, ScaleConfig(num_workers=3, placement="strict_pack"), 0, 3),
        (CPU_CLUSTER, ScaleConfig(num_workers=5, placement="strict_pack"), 0, 1),
        (GPU_CLUSTER, ScaleConfig(num_workers=1), 1, 8),
        (GPU_CLUSTER, ScaleConfig(num_workers=3), 1, 2),
        (GPU_CLUSTER, ScaleConfig(num_workers=1, gpus_per_worker=0.5), 0.5, 16),
        # Of each GPU a fifth stays free: no worker has parts of two.
        (GPU_CLUSTER, ScaleConfig(num_workers=1, gpus_per_worker=0.4), 0.4, 16),
        (GPU_CLUSTER, ScaleConfig(num_workers=4, gpus_per_worker=0), 0, 16),
        (APART, ScaleConfig(num_workers=1), 1, 2),
        (APART, ScaleConfig(num_workers=2), 1, 1),
        (APART, ScaleConfig(num_workers=4, gpus_per_worker=0), 0, 16),
        (LAUNCHED, ScaleConfig(num_workers=1), 1, 10),
        (LAUNCHED, ScaleConfig(num_workers=2), 1, 4),
        (LAUNCHED, ScaleConfig(num_workers=2, placement="spread"), 1, 5),
        (LAUNCHED, ScaleConfig(num_workers=3, placement="strict_pack"), 1, 2),
        (LAUNCHED, ScaleConfig(num_workers=5), 1, 2),
    ],
)
def test_runs_fit_the_cluster(
    fleet: Fleet, scale: ScaleConfig, gpus_per_worker: float, max_concurrent: int
) -> None:
    placement = place(scale, fleet)
    assert placement.gpus_per_worker == gpus_per_worker
    assert placement.max_concurrent == max_concurrent
    assert ("GPU" in placement.per_worker) == (gpus_per_worker > 0)


@pytest.mark.parametrize(
    ("fleet", "scale", "words"),
    [
        (LAPTOP, ScaleConfig(num_workers=17), "num_workers 17 .* hold 16$"),
        (LAPTOP, ScaleConfig(num_workers=99_999), "num_workers 99999 .* hold 16$"),
        (CPU_CLUSTER, ScaleConfig(num_workers=11), "num_workers 11 .* hold 10$"),
        (GPU_CLUSTER, ScaleConfig(num_workers=9), "num_workers 9 .* hold 8$"),
        (APART, ScaleConfig(num_workers=4), "num_workers 4 .* a CPU and a GPU for each, hold 2$"),
        (
            GPU_CLUSTER,
            ScaleConfig(num_workers=5, placement="strict_pack"),
            "num_workers 5 .* wants one machine for all, and the largest can hold 4$",
        ),
        (CPU_CLUSTER, ScaleConfig(gpus_per_worker=1), r"gpus_per_worker 1 .* 0 GPUs$"),
        (
            Fleet([{"CPU": 8, "GPU": 1}] * 2),
            ScaleConfig(gpus_per_worker=2),
            "gpus_per_worker 2 is more than any machine has, which is 1 GPUs$",
        ),
    ],
)
def test_what_can_never_run_is_refused(fleet: Fleet, scale: ScaleConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        place(scale, fleet)


def test_no_more_runs_of_several_workers_begin_than_the_heads_memory_holds() -> None:
    """The process that waits for each of them, and Ray Train's, are there."""
    head = {"CPU": 0, "node:__internal_head__": 1.0, "memory": 4e9}
    cluster = Fleet([head, *[{"CPU": 48, "GPU": 4, "memory": 1e11}] * 8])
    assert place(ScaleConfig(num_workers=4), cluster).max_concurrent == 3
    assert place(ScaleConfig(num_workers=1), cluster).max_concurrent == 32
    small = Fleet([{**head, "memory": 1e9}, {"CPU": 48, "GPU": 4}])
    assert place(ScaleConfig(num_workers=2), small).max_concurrent == 1


def test_a_run_asks_for_machines_that_hold_all_of_it_where_there_are_smaller_ones() -> None:
    def labels(fleet: Fleet, workers: int | str, how: str = "pack") -> tuple[str, ...]:
        return place(ScaleConfig(num_workers=workers, placement=how), fleet).labels

    assert labels(LAUNCHED, 1) == ()
    assert labels(LAUNCHED, 2) == labels(LAUNCHED, 4) == labels(LAUNCHED, 3, "strict_pack")
    assert labels(LAUNCHED, 4) == ("four",)
    assert labels(LAUNCHED, 5) == ()  # no machine holds it
    assert labels(LAUNCHED, 2, "spread") == labels(LAUNCHED, "2:4") == ()
    unnamed = Fleet([{"CPU": 0}], [Kind(ONE, 4), Kind(FOUR, 2)], 4)
    assert labels(unnamed, 4) == ()
    never = Fleet([{"CPU": 0}], [Kind(ONE, 4, "one"), Kind(FOUR, 0, "four")], 4)
    assert labels(never, 4) == ()
    placement = place(ScaleConfig(num_workers=4), GPU_CLUSTER, LAUNCHED)
    assert placement.label_selector == {"nflab-type": "in(four)"}
    types: dict[str, dict[str, Any]] = {
        "one": {"resources": ONE, "labels": {"nflab-type": "one"}},
        "four": {"resources": FOUR, "labels": {"nflab-type": "four"}},
        "mine": {"resources": FOUR},
    }
    assert [name for name in types if placement.takes(types[name])] == ["four"]
    assert place(ScaleConfig(num_workers=4), GPU_CLUSTER).takes(types["mine"])


def test_a_run_of_few_to_many_workers_asks_for_the_least_that_there_are() -> None:
    placement = place(ScaleConfig(num_workers="2:16"), CPU_CLUSTER)
    assert (placement.min_workers, placement.num_workers, placement.max_concurrent) == (2, 16, 1)
    assert str(placement).startswith("2 to 16 workers a run")
    assert place(ScaleConfig(num_workers="1:5"), CPU_CLUSTER).max_concurrent == 2
    with pytest.raises(ConfigError, match=r"num_workers 11:12 .* hold 10$"):
        place(ScaleConfig(num_workers="11:12"), CPU_CLUSTER)


@pytest.mark.parametrize(
    ("machine", "scale", "cores"),
    [
        ({"CPU": 8, "GPU": 1}, ScaleConfig(), 8),
        ({"CPU": 96, "GPU": 8}, ScaleConfig(num_workers=8), 12),
        ({"CPU": 96, "GPU": 8}, ScaleConfig(gpus_per_worker=0.25), 3),
        ({"CPU": 16}, ScaleConfig(num_workers=4), 1),
        ({"CPU": 16}, ScaleConfig(), 1),
    ],
)
def test_a_worker_has_its_share_of_a_machines_cores(
    machine: dict[str, float], scale: ScaleConfig, cores: int
) -> None:
    assert place(scale, Fleet([machine])).cores_on(machine) == cores


def test_workers_that_share_cores_have_no_more_than_there_are() -> None:
    """As Ray counts them, in parts of a ten-thousandth."""
    for cores, workers in itertools.product(range(1, 17), range(1, 129)):
        if workers <= 8 * cores:
            own = Fleet([{"CPU": cores}], own=True)
            placement = place(ScaleConfig(num_workers=workers), own)
            assert slots({"CPU": cores}, placement.per_worker) >= workers
            assert max(1, cores // workers) == placement.max_concurrent


def test_a_launcher_file_tells_of_kinds_of_machines() -> None:
    launcher = {
        "max_workers": 6,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}},
            "spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4},
            "big": {"resources": {"CPU": 96, "GPU": 8}, "labels": {"nflab-type": "big"}},
        },
    }
    fleet = launchable(launcher)
    assert fleet.present == [{"CPU": 1}] and fleet.most == 6
    assert [(kind.count, kind.label) for kind in fleet.kinds] == [(4, None), (6, "big")]
    assert fleet.room(lambda machine: slots(machine, {"CPU": 1})) == 1 + 6 * 96


MACHINES = st.fixed_dictionaries({"CPU": st.integers(0, 9), "GPU": st.integers(0, 4)})
KINDS = st.builds(Kind, MACHINES, st.integers(0, 3), st.just("kind"))
FLEETS = st.builds(
    Fleet,
    st.lists(MACHINES, min_size=1, max_size=4),
    st.lists(KINDS, max_size=3),
    st.integers(0, 4),
)


def packed(machines: Sequence[Machine], worker: Machine, together: int) -> int:
    """Groups of workers that are put onto machines one by one until none fits, each on one."""
    parts = 10 if worker.get("GPU", 1) < 1 else 1
    free = [
        {"CPU": m["CPU"], **{f"GPU {i}": parts for i in range(int(m["GPU"]))}} for m in machines
    ]

    def put_one(machine: dict[str, float]) -> bool:
        for name in [name for name in machine if name != "CPU"] if "GPU" in worker else [None]:
            needed = {"CPU": worker["CPU"], **({name: worker["GPU"] * parts} if name else {})}
            if all(machine[key] >= amount for key, amount in needed.items()):
                machine.update({key: machine[key] - amount for key, amount in needed.items()})
                return True
        return False

    count = 0
    for machine in free:
        while all(put_one(machine) for _ in range(together)):
            count += 1
    return count


@given(
    fleet=FLEETS,
    workers=st.integers(1, 6),
    gpus=st.sampled_from([0, 1, 0.5, 0.3, 0.4]),
    how=st.sampled_from(["pack", "strict_pack", "spread"]),
)
def test_it_counts_as_one_who_packs_machines_one_by_one(
    fleet: Fleet, workers: int, gpus: float, how: str
) -> None:
    """Of all that an autoscaler may launch the best choice counts."""
    scale = ScaleConfig(num_workers=workers, gpus_per_worker=gpus, placement=how)
    worker = {"CPU": 1.0, **({"GPU": gpus} if gpus else {})}

    def best(kinds: Sequence[Kind], present: Sequence[Machine], together: int) -> int:
        choices = itertools.product(*(range(kind.count + 1) for kind in kinds))
        return max(
            packed(
                [
                    *present,
                    *(k.machine for k, n in zip(kinds, some, strict=True) for _ in range(n)),
                ],
                worker,
                together,
            )
            for some in choices
            if sum(some) <= fleet.most
        )

    kinds, present = fleet.kinds, fleet.present
    there = [kind for kind in kinds if min(kind.count, fleet.most)]
    fit = [kind for kind in there if packed([kind.machine], worker, 1)]
    whole = [kind for kind in fit if packed([kind.machine], worker, workers)]
    if how != "spread" and whole and len(whole) < len(fit):
        kinds, present = whole, []
    together = workers if how == "strict_pack" else 1
    expected = best(kinds, present, together) * together // workers
    if expected:
        assert place(scale, fleet).max_concurrent == expected
    else:
        with pytest.raises(ConfigError):
            place(scale, fleet)


ASK_RAY = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from nflab.cluster.placement import Fleet, place
from nflab.settings.config import ScaleConfig

machines, asked = json.loads(sys.argv[1])
cluster = Cluster()
for machine in machines:
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster.add_node(num_cpus=machine["CPU"], num_gpus=machine["GPU"], **small)
ray.init(cluster.address, logging_level="ERROR")
cluster.wait_for_nodes()
present = Fleet([node["Resources"] for node in ray.nodes()])
found = []
for scale in asked:
    placement = place(ScaleConfig(**scale), present)
    runs = [[placement.per_worker] * placement.num_workers] * placement.max_concurrent
    groups = [placement_group(run, strategy=placement.strategy) for run in runs]
    ready = all(group.wait(60) for group in groups)
    more = placement_group([placement.per_worker] * placement.num_workers, placement.strategy)
    found.append((placement.max_concurrent, ready, more.wait(1)))
    for group in (*groups, more):
        remove_placement_group(group)
print(json.dumps(found))
"""
"""Puts as many runs onto a cluster as we say that it holds, and one more."""


@pytest.mark.slow
def test_ray_places_as_many_runs_as_we_say_and_no_more(tmp_path: Any) -> None:
    machines = [{"CPU": 2, "GPU": 4}, {"CPU": 64, "GPU": 0}, {"CPU": 7, "GPU": 3}]
    scales: list[tuple[dict[str, Any], int]] = [
        ({"num_workers": 1}, 5),
        ({"num_workers": 2}, 2),
        ({"num_workers": 5}, 1),
        ({"num_workers": 2, "placement": "spread"}, 2),
        ({"num_workers": 2, "placement": "strict_pack"}, 2),
        ({"num_workers": 3, "placement": "strict_pack"}, 1),
        ({"num_workers": 7, "gpus_per_worker": 0, "placement": "strict_pack"}, 10),
        ({"num_workers": 6, "gpus_per_worker": 0}, 12),
        ({"num_workers": 1, "gpus_per_worker": 0.4}, 8),
    ]
    mark = f"placement-of-test-{tmp_path}"
    env = {**os.environ, "NFLAB_TEST": mark, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", ASK_RAY, json.dumps([machines, [s for s, _ in scales]])]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found == [[at_once, True, False] for _, at_once in scales]
    finally:
        stop_marked(mark)
