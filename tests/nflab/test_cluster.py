import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from nflab.cluster import connection
from nflab.cluster.placement import Resources, most_resources, place
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import ConfigError
from tests.clouds import head
from tests.conftest import free_port, stop_marked

LAPTOP = Resources(cpus=2, gpus=0, own=True)
CPU_CLUSTER = Resources(cpus=10, gpus=0, own=False)
GPU_CLUSTER = Resources(cpus=64, gpus=8, own=False)


@pytest.mark.parametrize(
    ("resources", "scale", "gpus_per_worker", "max_concurrent"),
    [
        (LAPTOP, ScaleConfig(num_workers=1), 0, 2),
        (LAPTOP, ScaleConfig(num_workers=2), 0, 1),
        (LAPTOP, ScaleConfig(num_workers=3), 0, 1),
        (LAPTOP, ScaleConfig(num_workers=16), 0, 1),
        (CPU_CLUSTER, ScaleConfig(num_workers=1), 0, 10),
        (CPU_CLUSTER, ScaleConfig(num_workers=4), 0, 2),
        (GPU_CLUSTER, ScaleConfig(num_workers=1), 1, 8),
        (GPU_CLUSTER, ScaleConfig(num_workers=3), 1, 2),
        (GPU_CLUSTER, ScaleConfig(num_workers=1, gpus_per_worker=0.5), 0.5, 16),
        (GPU_CLUSTER, ScaleConfig(num_workers=4, gpus_per_worker=0), 0, 16),
    ],
)
def test_runs_fit_the_cluster(
    resources: Resources, scale: ScaleConfig, gpus_per_worker: float, max_concurrent: int
) -> None:
    placement = place(scale, resources)
    assert placement.gpus_per_worker == gpus_per_worker
    assert placement.max_concurrent == max_concurrent
    workers = placement.num_workers * max_concurrent
    # The trials that wait for several workers each take a hundredth of a CPU, too.
    waiting = 0.01 * max_concurrent if placement.num_workers > 1 else 0
    assert workers * placement.cpus_per_worker + waiting <= resources.cpus + 1e-9
    assert workers * placement.gpus_per_worker <= resources.gpus
    assert ("GPU" in placement.per_worker) == (gpus_per_worker > 0)


@pytest.mark.parametrize(
    ("resources", "scale", "limit"),
    [
        (LAPTOP, ScaleConfig(num_workers=17), 16),
        (CPU_CLUSTER, ScaleConfig(num_workers=11), 10),
        (GPU_CLUSTER, ScaleConfig(num_workers=9), 8),
    ],
)
def test_more_workers_than_can_ever_run_are_refused(
    resources: Resources, scale: ScaleConfig, limit: int
) -> None:
    with pytest.raises(ConfigError, match=f"num_workers {scale.num_workers} .* hold {limit}$"):
        place(scale, resources)


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
    resources = Resources(cpus=machine["CPU"], gpus=machine.get("GPU", 0), own=False)
    assert place(scale, resources).cores_on(machine) == cores


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus_per_worker 1 .* 0 GPUs"):
        place(ScaleConfig(gpus_per_worker=1), CPU_CLUSTER)


def test_the_most_resources_are_those_of_the_largest_nodes_that_there_may_be() -> None:
    launcher = {
        "max_workers": 6,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}},
            "spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4},
            "big": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 5},
        },
    }
    assert most_resources(launcher) == {"CPU": 1 + 5 * 96 + 8, "GPU": 5 * 8 + 1}


@pytest.mark.slow
def test_a_driver_on_a_cpu_head_sees_the_gpus_that_the_autoscaler_may_launch(
    tmp_path: Path,
) -> None:
    node_types = {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "node_config": {}, "max_workers": 3},
    }
    ask = "from nflab.cluster import connection; from nflab.settings import config; "
    ask += "print(connection.connect(config.ScaleConfig(num_workers=2)))"
    with head(tmp_path, node_types) as driver:
        env = {**os.environ, **driver}
        done = subprocess.run(
            [sys.executable, "-c", ask], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == "2 workers a run, 1 GPU each; 1 at once", done.stderr


OTHER_VERSIONS = """
import sys
import ray
from ray._private import utils
from ray.scripts.scripts import main
utils.compute_version_info = lambda: ("2.9.1", "3.10.4")
main()
"""
"""Ray's command line, as if of other versions: a head tells the cluster those that it has."""


@pytest.mark.slow
def test_a_cluster_of_other_versions_is_refused_in_one_sentence(tmp_path: Path) -> None:
    port, mark = free_port(), f"versions-of-test-{tmp_path}"
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "NFLAB_TEST": mark,
        "RAY_AUTH_MODE": "token",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    start = f"start --head --port {port} --include-dashboard=false --disable-usage-stats"
    start += " --node-ip-address 127.0.0.1"
    train = "from nflab.terminal import command_line; from nflab.cluster import connection; "
    train += "from nflab.settings.config import Config; "
    train += "command_line.main(Config, lambda c, _: print(connection.connect(c.scale)), '')"
    try:
        subprocess.run(["ray", "get-auth-token", "--generate"], env=env, check=True, timeout=60)
        head = [sys.executable, "-c", OTHER_VERSIONS, *start.split()]
        subprocess.run(head, env=env, check=True, timeout=120)
        done = subprocess.run(
            [sys.executable, "-c", train], env=env, capture_output=True, text=True, timeout=120
        )
        here = ".".join(map(str, sys.version_info[:3]))
        assert done.returncode == 2
        assert done.stderr == (
            f"error: the Ray cluster at 127.0.0.1:{port} has Ray 2.9.1 and Python 3.10.4 and this "
            f"machine Ray {ray.__version__} and Python {here}: install the cluster's here, or run "
            "the script there, with ray job submit\n"
        )
    finally:
        stop_marked(mark)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "RAY_ADDRESS is 'nonsense', which is no address"),
        ("host:99999", "which is no address"),
        ("ray://user:hunter2@host:10001", "the address of RAY_ADDRESS holds a password"),
        ("127.0.0.1:{port}", "cannot reach the Ray cluster at 127.0.0.1:.*: Connection refused"),
        ("ray://127.0.0.1:{port}", "cannot reach the Ray cluster at ray://127.0.0.1:"),
        ("no-such-host.invalid:6379", "cannot reach the Ray cluster at no-such-host.invalid:6379"),
    ],
)
def test_an_address_at_which_there_is_no_cluster_is_told_at_once(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address.format(port=free_port()))
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with pytest.raises(ConfigError, match=message) as caught:
        connection.connect(ScaleConfig())
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("given", [None, "disabled"])
def test_a_ray_that_is_started_here_asks_for_its_token(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless someone says otherwise, whether there is a token already or not."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_AUTH_MODE", given or "")  # which comes to an end with this test
    if given is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    found: list[str | None] = []
    known = [given]  # Ray has read its variables as it was imported
    again = SimpleNamespace(initialize=lambda _: known.append(os.environ.get("RAY_AUTH_MODE")))
    monkeypatch.setattr(ray._raylet, "Config", again)

    def init(**_: object) -> None:
        found.append(known[-1])
        raise ConnectionError("none is started in this test")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="none is started"):
        connection.connect(ScaleConfig())
    assert found == [given or "token"]
