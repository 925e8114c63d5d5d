import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from nflab.cluster import connection
from nflab.cluster.placement import TYPE_LABEL
from nflab.settings.config import ScaleConfig
from nflab.settings.errors import ConfigError
from tests.clouds import head
from tests.conftest import free_port, stop_marked

TRAIN_TOGETHER = """
import ray
from ray import tune
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from nflab.cluster import connection
from nflab.cluster.placement import ON_HEAD
from nflab.running.worker_group import scaling
from nflab.settings.config import ScaleConfig

placement = connection.connect(ScaleConfig(num_workers=2))
print(placement)

def trial(_):
    DataParallelTrainer(lambda: None, scaling_config=scaling(placement)).fit()

tune.Tuner(tune.with_resources(trial, ON_HEAD)).fit()
print(sorted(node["Resources"].get("GPU", 0) for node in ray.nodes()))
"""
"""A run of two workers, as a sweep starts one, but for what its workers do."""


@pytest.mark.slow
def test_the_gpus_that_an_autoscaler_may_launch_count_and_workers_come_up_together(
    tmp_path: Path,
) -> None:
    """Without the label Ray would launch two of the small machines for the workers, and for the
    process that waits for them a third."""
    gpus: dict[str, dict[str, Any]] = {
        "one": {"resources": {"CPU": 2, "GPU": 1}, "max_workers": 3},
        "four": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 1},
    }
    for name, node_type in gpus.items():
        node_type |= {"node_config": {}, "labels": {TYPE_LABEL: name}}
    cpus = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    with head(tmp_path, {"head": cpus, **gpus}) as driver:
        done = subprocess.run(
            [sys.executable, "-c", TRAIN_TOGETHER],
            env={**os.environ, **driver},
            capture_output=True,
            text=True,
            timeout=240,
        )
    told = done.stdout.splitlines()
    assert told[:1] == ["2 workers a run, 1 GPU each; 2 at once"], done.stderr
    assert told[-1] == "[0, 4.0]", done.stderr


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
