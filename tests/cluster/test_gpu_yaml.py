"""`cluster/gpu.yaml` by the seven lines of docs/clusters.md, on an emulated AWS (see ec2.py).

What differs from a person's cluster is written down in `overrides`; the machines' image has the
pinned environment already, and a GPU is there in name only.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.cluster.ec2 import SUBNET, Cloud
from tests.cluster.hosts import USER
from tests.cluster.laptop import Laptop
from tests.conftest import ROOT

BUCKET = "nflab-results"

_AWS = (ROOT / "docs" / "clusters.md").read_text().partition("\n## AWS\n")[2]

LINES = [line.partition("  #")[0].strip() for line in _AWS.split("```")[1].splitlines()[1:]]
"""What the page on clusters tells a person to type."""

MAKE = "make --old-file .venv/installed"  # the laptop reaches no registry

UP, TUNNEL, EXPORT, TOKEN, SUBMIT, STATUS, DOWN = (line.replace("make", MAKE) for line in LINES)

ON_HEAD = dict(word.split("=", 1) for word in EXPORT.removeprefix("export ").split())
"""With which a job is submitted where Ray finds the token by itself."""

JOBS = ON_HEAD | {"RAY_AUTH_TOKEN_PATH": TOKEN.partition("=")[2].replace("~", f"/home/{USER}")}

SERVER = "-m mlflow server --port 5000"
"""In the command of MLflow's server."""

SMALL = "--trials 2 --epochs 1"

LONG_JOB = "ray job submit -- bash -c 'sleep 120; echo worked on'"

RUNS = """
import json
from mlflow import MlflowClient
client = MlflowClient("http://127.0.0.1:5000")
experiments = [e.experiment_id for e in client.search_experiments()]
runs = [{"id": r.info.run_id, "status": r.info.status, "tags": r.data.tags,
         "cost": r.data.metrics.get("cost_usd")}
        for r in client.search_runs(experiments)]
print(json.dumps(runs))
"""

TRIALS = """
import json
from ray.util.state import list_actors, list_nodes
nodes = {node.node_id: node.node_ip for node in list_nodes()}
actors = list_actors(filters=[("class_name", "=", "ImplicitFunc")], detail=True)
trials = [{"address": nodes[a.node_id],
           "gpus": [v for k, v in a.required_resources.items() if k.startswith("GPU_group_0_")]}
          for a in actors]
print(json.dumps(trials))
"""


def overrides(launcher: dict[str, Any]) -> None:
    """What is different here."""
    # The laptop is in the machines' own network; they have no other address.
    launcher["provider"]["use_internal_ips"] = True
    # What a person changes: the Python that they have.
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    launcher["setup_commands"][0] = launcher["setup_commands"][0].replace("3.12", here)
    # It would refuse the machines, which have a GPU in name only.
    launcher["worker_setup_commands"].remove("bash ~/nflab/cluster/check_gpu.sh")
    launcher["idle_timeout_minutes"] = 1


def write_launcher(laptop: Laptop, idle_hours: str = "8") -> None:
    """The launcher file as a person has edited it."""
    launcher = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    overrides(launcher)
    first = launcher["setup_commands"][0]
    launcher["setup_commands"][0] = first.replace("IDLE_HOURS=8", f"IDLE_HOURS={idle_hours}")
    (laptop.home / "gpu.yaml").write_text(yaml.safe_dump(launcher, sort_keys=False))


@pytest.fixture(scope="module")
def up(laptop: Laptop, cloud: Cloud) -> Iterator[str]:
    """A cluster that was just brought up; what the first of those lines printed."""
    write_launcher(laptop)
    laptop.env |= {
        "CLUSTER": f"/home/{USER}/gpu.yaml",
        "SSH_FROM": SUBNET,
    }
    cloud.client("s3").create_bucket(Bucket=BUCKET)
    yield laptop.run(UP, ARGS="--yes")
    assert cloud.error is None


@pytest.fixture(scope="module")
def tunnel(laptop: Laptop, up: str) -> Iterator[None]:
    """Ports 8265 and 5000 of the head, on the laptop."""
    log = laptop.home / "tunnel.log"
    ready = lambda: laptop.answers("http://127.0.0.1:5000/health")  # noqa: E731
    with laptop.running(TUNNEL, log, ready):
        yield


def head_of(cloud: Cloud) -> Laptop:
    """The newest head, for commands that are run on it."""
    heads = [i for i in cloud.launched if i["InstanceType"] == "m7i.large"]
    return Laptop(cloud.network.hosts[heads[-1]["PrivateIpAddress"]], {})


def run_and_hear(laptop: Laptop, cloud: Cloud, command: str, sentence: str) -> str:
    """What a command prints; no machine boots before it has printed that sentence."""
    log = laptop.home / "said.log"
    log.unlink(missing_ok=True)
    cloud.boots.clear()
    try:
        with laptop.running(command, log, lambda: sentence in log.read_text()) as process:
            cloud.boots.set()
            process.wait(600)
    finally:
        cloud.boots.set()
    assert process.returncode == 0, log.read_text()
    return log.read_text()


def test_up_launches_a_head_that_only_its_user_reaches(up: str, cloud: Cloud) -> None:
    assert [i["InstanceType"] for i in cloud.launched] == ["m7i.large"]
    groups = cloud.client("ec2").describe_security_groups(GroupNames=["nflab-gpu"])
    (group,) = groups["SecurityGroups"]
    outside = [r for r in group["IpPermissions"] if r["IpRanges"] or r["Ipv6Ranges"]]
    assert [(r["FromPort"], r["ToPort"]) for r in outside] == [(22, 22)]
    assert [r["CidrIp"] for rule in outside for r in rule["IpRanges"]] == [SUBNET]
    used = cloud.instances()[0]["SecurityGroups"]
    assert [g["GroupId"] for g in used] == [group["GroupId"]]


@pytest.mark.parametrize("token", [None, "0" * 64])
@pytest.mark.parametrize(
    "asked",
    ['--json \'{"entrypoint": "true"}\' /api/jobs/', "/api/jobs/", "/nodes?view=summary"],
)
def test_what_comes_without_the_token_is_refused(
    laptop: Laptop, tunnel: None, token: str | None, asked: str
) -> None:
    *words, path = asked.rsplit(maxsplit=1)
    header = f"--header 'Authorization: Bearer {token}'" if token else ""
    code = laptop.run(
        "curl --silent --output /dev/null --write-out '%{http_code}' "
        f"{' '.join(words)} {header} 'http://127.0.0.1:8265{path}'"
    )
    assert code in ("401", "403")


def test_a_sweep_trains_on_gpu_workers_that_come_for_it(
    laptop: Laptop, cloud: Cloud, tunnel: None
) -> None:
    assert len(cloud.launched) == 1  # the head
    # Both are asked for at once, before there is a machine.
    asked = "the cluster waits for 2 x 1 GPU, 1 CPU"
    said = run_and_hear(laptop, cloud, f"{EXPORT}; {TOKEN}; {SUBMIT} {SMALL}", asked)
    assert "Five best trials" in said

    workers = cloud.launched[1:]
    assert workers and {w["InstanceType"] for w in workers} == {"g5.2xlarge"}
    assert {w.get("InstanceLifecycle") for w in workers} == {"spot"}
    trials = laptop.ask(TRIALS, **JOBS)
    assert trials
    for trial in trials:
        assert trial["gpus"] == [1.0]
        assert trial["address"] in {w["PrivateIpAddress"] for w in workers}

    runs = laptop.ask(RUNS)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run["tags"]]
    children = [r for r in runs if r["tags"].get("mlflow.parentRunId") == parent["id"]]
    assert parent["status"] == "FINISHED"
    assert [run["tags"]["outcome"] for run in children] == ["finished"] * 2
    assert all(run["cost"] > 0 for run in children)
    assert parent["cost"] == pytest.approx(sum(run["cost"] for run in children))
    stored = objects(cloud)
    assert sum(key.endswith("/logs/rank-0.log") for key in stored) == 2
    assert any(key.endswith("/best_trial/weights.pt") for key in stored)


def test_the_token_stands_in_no_log_and_no_command(
    laptop: Laptop, cloud: Cloud, up: str, tunnel: None
) -> None:
    assert not (laptop.home / ".ray" / "auth_token").exists()
    token = (laptop.home / ".ray" / "nflab" / "nflab-gpu.token").read_text().strip()
    assert len(token) >= 32
    assert token not in up
    head = head_of(cloud)
    assert files_with(head, "gcs_server") != "" and files_with(head, token) == ""
    _, running = head.attempt("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
    assert "gcs_server" in running and token not in running


def files_with(head: Laptop, word: str) -> str:
    """The logs on the head that have a word in them."""
    return head.attempt(f"grep -rla {word} /tmp/ray/session_latest/logs ~/mlflow")[1]


def test_mlflow_starts_again_by_itself(laptop: Laptop, cloud: Cloud, tunnel: None) -> None:
    head = cloud.network.hosts[cloud.launched[0]["PrivateIpAddress"]]
    before = laptop.ask(RUNS)
    (server,) = head.processes(SERVER)
    os.kill(server, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while head.processes(SERVER) in ([], [server]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    while not laptop.answers("http://127.0.0.1:5000/health"):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert laptop.ask(RUNS) == before


def test_when_there_is_no_spot_machine_the_sweep_says_so_and_one_on_demand_comes(
    laptop: Laptop, cloud: Cloud, tunnel: None
) -> None:
    deadline = time.monotonic() + 400
    while len(cloud.instances()) > 1:  # the workers of the sweep go when they have been idle
        assert time.monotonic() < deadline
        time.sleep(2)
    before = len(cloud.launched)
    cloud.front.no_spot.set()
    submit = f"{MAKE} submit ARGS='python experiments/agc_sweep.py --trials 1 --epochs 1'"
    reason = "InsufficientInstanceCapacity: There is no Spot capacity available"
    said = run_and_hear(laptop, cloud, submit, f"there is no gpu-spot ({reason}")
    cloud.front.no_spot.clear()
    assert "gpu-on-demand is asked for instead" in said
    assert "Five best trials" in said
    workers = cloud.launched[before:]
    assert [w["InstanceType"] for w in workers] == ["g5.2xlarge"]
    assert [w.get("InstanceLifecycle") for w in workers] == [None]
    assert "gpu-spot: LaunchFailed" in laptop.run(STATUS)
    log = laptop.home / "logs.log"
    with laptop.running(f"{MAKE} logs", log, lambda: "gpu-on-demand" in log.read_text()):
        pass


NODES = """
import json
from ray.util.state import list_nodes
nodes = list_nodes(
    filters=[("state", "=", "ALIVE")], detail=True, raise_on_missing_output=False
)
print(json.dumps({node.labels.get("nflab-type", ""): node.node_ip for node in nodes}))
"""


def await_type(laptop: Laptop, name: str) -> str:
    """The address of a machine that bears the label of a type, when it has joined."""
    deadline = time.monotonic() + 300
    while name not in (found := laptop.ask(NODES, **JOBS)):
        assert time.monotonic() < deadline, laptop.run(STATUS)
        time.sleep(2)
    return str(found[name])


@pytest.mark.long
def test_make_up_ends_no_job_and_a_new_token_does_when_told_to(
    laptop: Laptop, cloud: Cloud, tunnel: None
) -> None:
    laptop.run("ray job submit --no-wait --submission-id kept -- sleep 3000", **JOBS)
    file = laptop.home / "gpu.yaml"
    before = file.read_text()
    launcher = yaml.safe_load(before)
    types = launcher["available_node_types"]

    def up_with_changes() -> tuple[int, str]:
        file.write_text(yaml.safe_dump(launcher, sort_keys=False))
        return laptop.attempt(UP, ARGS="--yes --no-restart")

    types["new"] = {**types["gpu-on-demand"], "min_workers": 1}
    code, said = up_with_changes()
    assert code != 0 and "without a restart Ray would launch new of" in said, said
    del types["new"]
    types["head"]["node_config"]["InstanceType"] = "m7i.xlarge"
    code, said = up_with_changes()
    assert code != 0 and "is not that of the head that runs" in said, said
    types["head"]["node_config"]["InstanceType"] = "m7i.large"

    types["gpu-on-demand"]["min_workers"] = 1
    for commands in ("setup_commands", "worker_setup_commands"):
        launcher[commands].append(f"touch ~/{commands}")
    file.write_text(yaml.safe_dump(launcher, sort_keys=False))
    said = laptop.run(UP, ARGS="--yes")
    assert "1 job runs on nflab-gpu (kept: sleep 3000): Ray is not restarted" in said
    worker = cloud.network.hosts[await_type(laptop, "gpu-on-demand")]
    assert (head_of(cloud).home / "setup_commands").exists()
    # What the page on clusters says of machines that come before a restart.
    assert not (worker.home / "worker_setup_commands").exists()
    assert "RUNNING" in laptop.run("ray job status kept", **JOBS)

    token = laptop.home / ".ray" / "nflab" / "nflab-gpu.token"
    old = token.read_text()
    laptop.run(f"{MAKE} rotate-token", ARGS="--end-jobs")
    assert token.read_text() != old
    # Ray sets up anew what is there.
    worker = cloud.network.hosts[await_type(laptop, "gpu-on-demand")]
    assert (worker.home / ".ray" / "auth_token").read_text() == token.read_text()
    code, _ = laptop.attempt("ray job list", **ON_HEAD, RAY_AUTH_TOKEN=old)
    assert code != 0
    file.write_text(before)


def test_down_leaves_the_results_and_nothing_else(
    laptop: Laptop, cloud: Cloud, tunnel: None
) -> None:
    said = laptop.run(DOWN)
    assert "files of 2 runs are in s3://nflab-results" in said
    assert "nothing of nflab-gpu is left" in said
    assert nothing_left(cloud)
    assert {"backup/mlflow.db"} < set(objects(cloud))
    assert any(key.endswith("/study.db") for key in objects(cloud))


@pytest.mark.long
def test_a_new_head_has_all_results_and_a_forgotten_cluster_ends(
    laptop: Laptop, cloud: Cloud, tunnel: None
) -> None:
    write_launcher(laptop, idle_hours="0.025")  # a minute and a half
    laptop.run(UP, ARGS="--yes")
    head = head_of(cloud)
    said: list[str] = []
    command = f". ~/nflab/cluster/env.sh; {LONG_JOB}"  # longer than the timer
    job = threading.Thread(target=lambda: said.append(head.run(command, **ON_HEAD)))
    job.start()
    runs = head.ask(RUNS)
    assert sorted(run["tags"].get("kind", "") for run in runs) == ["sweep"] * 2 + ["trial"] * 3
    assert {run["status"] for run in runs} == {"FINISHED"}
    job.join()
    assert "worked on" in said[0]
    assert len(cloud.instances()) == 1
    deadline = time.monotonic() + 300
    while not nothing_left(cloud):
        assert time.monotonic() < deadline
        time.sleep(2)
    assert {"backup/mlflow.db"} < set(objects(cloud))


def nothing_left(cloud: Cloud) -> bool:
    """Whether the account has neither machines nor disks."""
    return not cloud.instances() and not cloud.client("ec2").describe_volumes()["Volumes"]


def objects(cloud: Cloud) -> list[str]:
    """What the bucket holds."""
    pages = cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]
