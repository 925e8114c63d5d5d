"""What a whole cluster on AWS costs, on an emulated one whose machines are described and priced."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow.entities import Run
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE

from nflab.cluster import connection
from nflab.cluster.bill import Bill, metered
from nflab.cluster.inventory import PROVIDER, Cluster, Item, client_of, cluster_of, inventory
from nflab.cluster.placement import Placement
from nflab.cluster.prices import disk_price
from nflab.running.budget import Budget
from nflab.settings.errors import ConfigError
from nflab.studies.costs import cost_sentences
from tests.clouds import emulated_aws, head
from tests.conftest import ROOT, run_script
from tests.records import family

HERE = Cluster("us-east-1", "fake")

HOUR = 3600.0


def machine(name: str, since: float, usd_per_hour: float | None) -> Item:
    return Item(name, since, "t3.micro", usd_per_hour)


def test_a_machine_counts_from_the_runs_begin_or_its_own_until_it_is_gone(tmp_path: Path) -> None:
    count = Bill(tmp_path / "usd", since=10 * HOUR)
    assert count.usd is None
    before, new = machine("head", 0.0, 0.1), machine("worker", 11 * HOUR, 2.0)
    count.add([before], now=10.5 * HOUR)
    assert count.usd == pytest.approx(0.05)
    count.add([before, new], now=11.5 * HOUR)
    assert count.usd == pytest.approx(0.05 + 0.1 + 1.0)
    count.add([before], now=12 * HOUR)  # gone meanwhile
    assert count.usd == pytest.approx(1.15 + 0.05 + 1.0)
    count.add([before], now=13 * HOUR)
    assert count.usd == pytest.approx(2.3)
    count.add([before], now=12.5 * HOUR)  # a clock that was set back
    count.add([before], now=13 * HOUR)
    assert count.usd == pytest.approx(2.3)


def test_while_the_run_does_not_run_nothing_is_counted(tmp_path: Path) -> None:
    there = machine("head", 0.0, 1.0)
    first = Bill(tmp_path / "usd", since=0.0)
    first.add([there, machine("worker", 0.0, 9.0)], now=2 * HOUR)
    assert first.usd == 20.0
    second = Bill(tmp_path / "usd", since=50 * HOUR)
    assert second.usd == 20.0
    second.add([there, machine("since", 40 * HOUR, 1.0)], now=51 * HOUR)
    assert second.usd == 22.0
    (tmp_path / "usd").write_text("{")
    assert Bill(tmp_path / "usd", since=0.0).usd is None


def test_what_has_no_price_makes_it_at_least(tmp_path: Path) -> None:
    count = Bill(tmp_path / "usd", since=0.0)
    count.add([machine("a", 0.0, 1.0), machine("b", 0.0, None)], now=HOUR)
    again = Bill(tmp_path / "usd", since=9 * HOUR)
    again.add([], now=10 * HOUR)
    assert (again.usd, again.unpriced) == (1.0, ("t3.micro",))
    assert cost_sentences({"cluster_usd": 1.0}, again.unpriced) == [
        "The whole cluster cost at least 1.00 USD meanwhile, its head, disks, start and waiting "
        "too: there is no price of t3.micro."
    ]
    (told,) = cost_sentences({"cluster_usd": 0.5})
    assert told.startswith("The whole cluster cost 0.5 USD meanwhile")


def test_a_budget_is_of_the_whole_cluster_where_that_is_more(tmp_path: Path) -> None:
    budget, count = Budget(1.0), Bill(tmp_path / "usd", since=0.0)
    budget.bill = count
    budget.add(0.25)
    assert budget.spent == 0.25
    count.add([machine("a", 0.0, 1.0)], now=0.5 * HOUR)
    assert budget.spent == 0.5 and not budget.reached
    count.add([machine("a", 0.0, 1.0)], now=HOUR)
    assert budget.reached and "with 1.00 USD spent" in str(budget)
    budget.add(1.0)  # trained where AWS did not tell
    assert budget.spent == 1.25


def test_a_disk_costs_by_its_size() -> None:
    assert disk_price("us-east-1", "gp3", 720) == pytest.approx(0.08)
    assert disk_price("us-east-1", "gp2", 72) == pytest.approx(0.01)
    assert disk_price("eu-west-1", "gp3", 1) is disk_price("us-east-1", "io2", 1) is None


def test_a_head_without_a_price_keeps_no_budget() -> None:
    priced = Placement(1, 1.0, 0.0, 1, {"gpu": 1.0})
    connection._require_prices(priced, {"head": 0.1})
    with pytest.raises(ConfigError, match="no price of machines of the type 'head': add it there"):
        connection._require_prices(priced, {"head": None})


def test_a_launcher_file_on_aws_names_a_cluster() -> None:
    for provider in ({"type": "aws"}, {"type": "external", "module": PROVIDER}):
        file = {"cluster_name": "x", "provider": {**provider, "region": "eu-west-1"}}
        assert cluster_of(file) == ("eu-west-1", "x")
    for provider in ({"type": "local"}, {"type": "kuberay"}, {"type": "external", "module": "x"}):
        assert cluster_of({"cluster_name": "x", "provider": provider}) is None


@pytest.fixture
def account() -> Iterator[Any]:
    """An emulated account, as a client of its machines."""
    with emulated_aws():
        yield boto3.client("ec2")


def tagged(kind: str, cluster: str, **more: str) -> dict[str, Any]:
    tags = {"ray-cluster-name": cluster, **more}
    told = [{"Key": key, "Value": value} for key, value in tags.items()]
    return {"TagSpecifications": [{"ResourceType": kind, "Tags": told}]}


def launch(account: Any, kind: str, cluster: str = HERE.name, **more: str) -> str:
    """Id of a new machine of a cluster."""
    image = account.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    made = account.run_instances(
        ImageId=image,
        InstanceType=kind,
        MinCount=1,
        MaxCount=1,
        **tagged("instance", cluster, **more),
    )
    return str(made["Instances"][0]["InstanceId"])


def add_disk(account: Any, size: int, cluster: str = HERE.name) -> str:
    """Id of a new disk of a cluster."""
    disk = account.create_volume(
        Size=size,
        VolumeType="gp3",
        AvailabilityZone="us-east-1a",
        **tagged("volume", cluster),
    )
    return str(disk["VolumeId"])


@pytest.mark.slow
def test_what_bears_the_clusters_tag_is_found_with_its_price(account: Any) -> None:
    launch(account, "g5.2xlarge", "another")
    add_disk(account, 8, "another")
    assert inventory(HERE, client_of(HERE)) == []
    began = time.time()
    head, worker, unknown = (launch(account, k) for k in ("m7i.large", "g5.2xlarge", "t3.micro"))
    disk = add_disk(account, 720)
    found = {item.id: item for item in inventory(HERE, client_of(HERE))}
    assert {key: item.usd_per_hour for key, item in found.items()} == {
        head: 0.1008,
        worker: 1.212,
        unknown: None,
        disk: pytest.approx(0.08),
    }
    assert all(abs(item.since - began) < 60 for item in found.values())
    account.terminate_instances(InstanceIds=[head, worker])
    account.stop_instances(InstanceIds=[unknown])
    account.delete_volume(VolumeId=disk)
    assert inventory(HERE, client_of(HERE)) == []


@pytest.mark.slow
def test_a_spot_machine_has_its_own_price(account: Any) -> None:
    image = account.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    account.run_instances(
        ImageId=image,
        InstanceType="g5.2xlarge",
        MinCount=1,
        MaxCount=1,
        InstanceMarketOptions={"MarketType": "spot"},
        **tagged("instance", HERE.name),
    )
    (item,) = inventory(HERE, client_of(HERE))
    assert (item.usd_per_hour, item.kind) == (0.504, "g5.2xlarge as a spot machine")


@pytest.mark.slow
def test_aws_that_does_not_answer_ends_nothing_and_is_asked_again(
    account: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch(account, "p5.48xlarge")
    answering = boto3.client("ec2").meta.endpoint_url
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with metered(HERE, tmp_path / "usd", time.time() - 60) as meter:
        assert meter is not None and meter.bill.usd is None
        assert "is counted when AWS tells what it has: Could not connect" in capsys.readouterr().out
        monkeypatch.setenv("AWS_ENDPOINT_URL", answering)
        assert meter.look() is None
        known = meter.bill.usd
        assert known is not None and known > 0
        meter.settle()
        assert json.loads((tmp_path / "usd").read_text())["usd"] == meter.bill.usd >= known
        last = meter.bill.usd
        assert meter.look() is None and meter.bill.usd == last
    with metered(None, tmp_path / "none", 0.0) as nothing:
        assert nothing is None


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster on an emulated AWS whose head trains, and costs 28 USD an hour, most of it for
    disks; machines of its other type never join."""
    folder = tmp_path_factory.mktemp("cloud")
    with emulated_aws():
        account = boto3.client("ec2")
        image = account.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        subnets = [subnet["SubnetId"] for subnet in account.describe_subnets()["Subnets"]]
        config = {"ImageId": image, "SubnetIds": subnets}
        types = {
            "head": {
                "resources": {"CPU": 2},
                "node_config": {**config, "InstanceType": "m7i.large"},
                "max_workers": 0,
            },
            "gpu": {
                "resources": {"CPU": 1, "GPU": 1},
                "node_config": {**config, "InstanceType": "g5.2xlarge"},
                "max_workers": 2,
            },
        }
        tags = {
            "ray-node-type": "head",
            "ray-node-status": "up-to-date",
            "ray-user-node-type": FAKE_HEAD_NODE_TYPE,
        }
        instance = launch(account, "m7i.large", **tags)
        for _ in range(16):
            add_disk(account, 15750)
        provider = {
            "type": "external",
            "module": PROVIDER,
            "region": HERE.region,
            "cache_stopped_nodes": False,
        }
        with head(folder, types, provider, instance) as env:
            aws = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
            yield {**env, **aws}


Here = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(cloud: dict[str, str], store: dict[str, str], tmp_path: Path) -> Here:
    """Runs a script on that cluster."""

    def run(name: str, *flags: str, root: Path = ROOT) -> "subprocess.CompletedProcess[str]":
        return run_script(tmp_path, {**cloud, **store}, name, *flags, root=root)

    return run


ON_HEAD = ("--epochs", "2", "--batch-size", "128", "--gpus-per-worker", "0")


def test_a_sweep_stops_by_what_the_whole_cluster_costs_and_goes_on_counting(
    here: Here, store: dict[str, str], tmp_path: Path
) -> None:
    def recorded() -> tuple[float, float, Run]:
        """What the cluster and what training has cost, and the parent."""
        parent, children = family(store["MLFLOW_TRACKING_URI"], "agc_sweep")
        trained = sum(child.data.metrics.get("cost_usd", 0.0) for child in children)
        return parent.data.metrics["cluster_usd"], trained, parent

    first = here("agc_sweep.py", "--trials", "60", *ON_HEAD, "--name", "s", "--max-cost", "1e-6")
    assert first.returncode == 130, first.stdout + first.stderr
    assert "the budget of 0.000001 USD is reached, with " in first.stderr
    began, trained, parent = recorded()
    assert trained == 0 < began and parent.data.tags["outcome"] == "interrupted"

    # Training costs 0.00003 USD a second at most, the cluster 0.008, which is looked at each 30 s.
    second = here("agc_sweep.py", "--resume", "s", "--max-cost", str(began + 0.2))
    assert second.returncode == 130, second.stdout + second.stderr
    whole, trained, parent = recorded()
    assert trained < 0.1 < began + 0.2 <= whole
    assert "The whole cluster cost " in second.stdout
    note = parent.data.tags["mlflow.note.content"]
    assert "The whole cluster cost " in note and "Stopped: the budget" in note
    kept = json.loads((tmp_path / "runs" / "s" / "cluster_usd.json").read_text())
    assert kept == {"usd": whole, "unpriced": []}


WAITS_A_SECOND = f"""
import runpy, sys
from nflab.cluster import bill
from nflab.running import tuner
tuner.WAITING_SECONDS = bill.LOOK_SECONDS = 1.0
sys.path.insert(0, {str(ROOT / "experiments")!r})
runpy.run_path({str(ROOT / "experiments" / "agc_sweep.py")!r}, run_name="__main__")
"""


def test_a_sweep_that_only_waits_for_machines_stops_at_its_budget(
    here: Here, tmp_path: Path
) -> None:
    file = tmp_path / "experiments" / "agc_sweep.py"
    file.parent.mkdir()
    file.write_text(WAITS_A_SECOND)
    flags = ("--trials", "2", "--epochs", "1", "--num-workers", "2", "--name", "w")
    done = here("agc_sweep.py", *flags, "--max-cost", "0.4", root=tmp_path)
    assert done.returncode == 130, done.stdout + done.stderr
    assert "--resume w" in done.stderr and "the budget of 0.4 USD is reached" in done.stderr


@pytest.mark.long
def test_a_grid_and_a_training_tell_what_the_whole_cluster_costs(
    here: Here, store: dict[str, str]
) -> None:
    flags = "--batch-sizes 128 --clippings 0.08 --epochs 1 --seeds 1 --gpus-per-worker 0".split()
    grid = here("clipping_vs_batch_size.py", *flags)
    assert "The whole cluster cost " in grid.stdout, grid.stdout + grid.stderr
    training = here("train.py", *ON_HEAD)
    assert training.returncode == 0, training.stdout + training.stderr
    for experiment in ("clipping_vs_batch_size", "train"):
        parent, _ = family(store["MLFLOW_TRACKING_URI"], experiment)
        metrics = parent.data.metrics
        assert metrics["cluster_usd"] > 100 * metrics["cost_usd"] > 0
