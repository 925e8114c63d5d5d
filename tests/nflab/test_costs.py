"""What machines and runs cost, against figures written by hand, and budgets kept by real runs."""

import csv
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from mlflow.entities import Run

from nflab.cluster.connection import foresee
from nflab.cluster.prices import TABLE, machine_price, worker_prices
from nflab.learning.loop import train
from nflab.learning.validation import validate
from nflab.learning.worker import Worker
from nflab.running.budget import Budget
from nflab.settings.config import Config, ScaleConfig
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import flat, replace
from nflab.settings.serialization import to_json
from nflab.settings.studies import SweepConfig
from nflab.storage.checkpoints import Checkpoints
from nflab.studies.cell_ledger import CellLedger
from nflab.studies.costs import cost_sentences, spent, totals
from nflab.terminal import command_line
from nflab.terminal.wording import duration, money
from tests.clouds import head
from tests.conftest import ROOT, run_script
from tests.nflab.test_grid import SETTINGS, Store
from tests.nflab.test_ledger import epoch
from tests.records import family

SPOT = {"InstanceType": "g5.2xlarge", "InstanceMarketOptions": {"MarketType": "spot"}}

LAUNCHER = {
    "provider": {"region": "us-east-1"},
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {"InstanceType": "m7i.large"}},
        "spot": {"resources": {"CPU": 8, "GPU": 1}, "node_config": SPOT},
        "sure": {
            "resources": {"CPU": 8, "GPU": 1},
            "node_config": {"InstanceType": "g5.2xlarge"},
        },
        "big": {
            "resources": {"CPU": 96, "GPU": 8},
            "node_config": {"InstanceType": "p4d.24xlarge"},
        },
        "mine": {"resources": {"CPU": 8, "GPU": 1}, "node_config": {}},
    },
}


@pytest.mark.parametrize(
    ("per_worker", "prices"),
    [
        (
            {"CPU": 1, "GPU": 1},
            {"spot": 0.504, "sure": 1.212, "big": 2.74470525, "mine": None},
        ),
        ({"CPU": 2}, {"spot": 0.126, "sure": 0.303, "big": 0.457450875, "mine": None}),
        # A quarter of the CPUs, half of the GPU.
        ({"CPU": 2, "GPU": 0.5}, {"spot": 0.252, "sure": 0.606, "big": 1.372352625, "mine": None}),
        # All of the CPUs, a quarter of the GPU.
        ({"CPU": 8, "GPU": 0.25}, {"spot": 0.504, "sure": 1.212, "big": 1.8298035, "mine": None}),
        ({"CPU": 1, "GPU": 2}, {"big": 5.4894105}),
    ],
)
def test_a_worker_costs_the_share_that_it_takes_of_each_machine_that_holds_it(
    per_worker: dict[str, float], prices: dict[str, float | None]
) -> None:
    assert worker_prices(LAUNCHER, per_worker) == pytest.approx(prices)


def test_elsewhere_prices_are_not_known() -> None:
    assert machine_price("us-east-1", "g5.2xlarge", spot=False) == 1.212
    assert machine_price("eu-west-1", "g5.2xlarge", spot=False) is None
    assert machine_price("us-east-1", "g6e.xlarge", spot=True) is None


def test_the_table_is_sound_and_knows_the_machines_of_the_cluster() -> None:
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    rows = {(row["region"], row["instance_type"]): row for row in csv.DictReader(lines)}
    assert len(rows) == len(lines) - 1
    for row in rows.values():
        assert 0 < float(row["spot_usd_per_hour"] or 0.01) < float(row["usd_per_hour"])
    launcher = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    trains = {"CPU": 1, "GPU": 1}
    assert all(worker_prices(launcher, trains).values())
    assert worker_prices(launcher, trains)["gpu-on-demand"] == 1.212
    for node_type in launcher["available_node_types"].values():
        row = rows["us-east-1", node_type["node_config"]["InstanceType"]]
        has = {"CPU": int(row["vcpus"]), "GPU": int(row["gpus"])}
        assert node_type["resources"] in ({"CPU": 0}, has)


RUNS = pd.DataFrame(
    [
        ("finished", 10, 100.0, 0.5),
        ("pruned", 4, 20.0, 0.08),
        ("pruned", 5, 50.0, None),  # on a machine without a price
        ("interrupted", 1, 10.0, 0.05),
        ("diverged", 2, 30.0, 0.15),
        ("failed", None, None, None),
    ],
    columns=["outcome", "epoch", "seconds", "cost_usd"],
)


def test_sums_and_what_pruning_saved() -> None:
    assert totals(RUNS, epochs=10) == pytest.approx(
        {
            "seconds": 210.0,
            "pruning_saved_seconds": 6 * 20 / 4 + 5 * 50 / 5,
            "cost_usd": 0.78,
            "pruning_saved_usd": 6 * 0.08 / 4,
        }
    )
    assert totals(RUNS) == pytest.approx({"seconds": 210.0, "cost_usd": 0.78})
    assert cost_sentences(totals(RUNS, epochs=10)) == [
        "All runs together trained for 3.5 min and cost 0.78 USD at the prices of "
        "nflab/cluster/prices.csv.",
        "Pruning saved about 80 s and 0.12 USD: the epochs that pruned trials did not run, at "
        "their own pace.",
    ]


def test_without_prices_only_time_is_told() -> None:
    told = totals(RUNS.drop(columns="cost_usd"), epochs=10)
    assert told == pytest.approx({"seconds": 210.0, "pruning_saved_seconds": 80.0})
    assert not any("USD" in sentence for sentence in cost_sentences(told))
    assert totals(RUNS.assign(cost_usd=None), epochs=10) == pytest.approx(told)
    assert spent(RUNS.drop(columns="cost_usd")) == 0
    nothing = totals(pd.DataFrame({"outcome": []}), epochs=10)
    assert nothing == {} and cost_sentences(nothing) == []


def test_amounts_are_read_without_exponents() -> None:
    assert [money(usd) for usd in (0, 0.000012345, 0.5, 1, 1234.567)] == [
        "0 USD",
        "0.000012 USD",
        "0.5 USD",
        "1.00 USD",
        "1234.57 USD",
    ]
    assert [duration(s) for s in (1.234, 89, 90, 5399, 5400, 3.6e6)] == [
        "1.2 s",
        "89 s",
        "1.5 min",
        "90 min",
        "1.5 h",
        "1000 h",
    ]


def test_a_budget_is_reached_with_the_last_cent() -> None:
    budget = Budget(limit=1.0, spent=0.25)
    budget.add(0.5)
    assert not budget.reached
    budget.add(0.25)
    assert budget.reached
    assert not Budget(spent=1e9).reached


def test_a_run_that_continues_adds_up_at_the_price_of_each_machine(tmp_path: Path) -> None:
    config = replace(Config(), epochs=3, warmup_epochs=0.0, batch_size=128)
    reports: list[dict[str, Any]] = []

    class Lost(Exception):
        pass

    def attempt(usd_per_hour: float | None, until: int) -> list[dict[str, Any]]:
        reports.clear()

        def report(metrics: dict[str, Any]) -> None:
            reports.append(metrics)
            if metrics["epoch"] == until:
                raise Lost

        checkpoints = Checkpoints.of_run(str(tmp_path))
        worker = Worker(report, usd_per_hour=usd_per_hour, checkpoints=checkpoints)
        with pytest.raises(Lost):
            train(config, worker)
        return reports.copy()

    (first,) = attempt(3.6, until=1)
    assert first["cost_usd"] == pytest.approx(0.001 * first["seconds"])
    again, second = attempt(7.2, until=2)
    assert again == first
    added = second["seconds"] - first["seconds"]
    assert second["cost_usd"] == pytest.approx(first["cost_usd"] + 0.002 * added)
    assert attempt(None, until=3)[-1]["cost_usd"] == second["cost_usd"]


def test_what_was_spent_is_read_from_mlflow_and_counted_once(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def report(ledger: CellLedger, number: int, at: int, usd: float) -> None:
        ledger.reported(number, {**epoch(at, 50), "seconds": 1.0, "cost_usd": usd})

    ledger = store.open(SETTINGS[:2])
    for _ in range(2):
        proposal = ledger.propose()
        ledger.started(proposal)
        report(ledger, proposal.number, 1, 0.25)
    report(ledger, 1, 2, 0.75)
    assert ledger.budget.spent == 1.0
    # And then the process is killed.
    store.outbox.drain()
    assert spent(store.tracker.children(store.parent)) == 1.0
    after = store.open(SETTINGS[:2])
    after.started(after.propose())
    report(after, 1, 1, 0.25)  # repeated
    report(after, 1, 2, 0.75)
    assert after.budget.spent == 0
    report(after, 1, 3, 1.0)
    assert after.budget.spent == 0.25


def test_a_resumed_sweep_may_have_another_budget_and_nothing_else(tmp_path: Path) -> None:
    started = replace(SweepConfig(), name="x", storage=str(tmp_path), max_cost=1.0)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(to_json(started))
    flags = ["--resume", "x", "--storage", str(tmp_path), "--max-cost"]
    assert command_line.parse(SweepConfig, [*flags, "5"]) == (replace(started, max_cost=5.0), True)
    assert flat(command_line.parse(SweepConfig, [*flags, "none"])[0])["max_cost"] is None
    with pytest.raises(ConfigError, match=r"trials 20 -> 21\)"):
        command_line.parse(SweepConfig, [*flags, "5", "--trials", "21"])


@pytest.mark.slow
def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_run(
    tmp_path: Path, store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aims = "--objectives val_top1 cost_usd --pruner none"
    for flags in ("--max-cost 1", aims, f"{aims} --dry-run"):
        done = run_script(tmp_path, store, "agc_sweep.py", *flags.split())
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "nflab/cluster/prices.csv has no price of these machines" in done.stderr
    assert not list(tmp_path.glob("runs/*/config.json"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="no price of these machines"):
        foresee(ScaleConfig(), priced=True)


@pytest.mark.parametrize("usd", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_is_a_sum_of_money(usd: float) -> None:
    with pytest.raises(ConfigError, match=f"max_cost {usd} must be a finite number of USD above 0"):
        validate(replace(SweepConfig(), max_cost=usd))


HALF = 0.504 / 2 / 3600
"""USD a second of a worker that takes one of the two CPUs which the machine below says it has."""

Here = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of one machine, which its launcher file calls a spot g5.2xlarge."""
    folder = tmp_path_factory.mktemp("cloud")
    machine = {"resources": {"CPU": 2}, "node_config": SPOT, "max_workers": 0}
    with head(folder, {"gpu-spot": machine}) as env:
        yield env


@pytest.fixture
def here(cloud: dict[str, str], store: dict[str, str], tmp_path: Path) -> Here:
    """Runs a script on that cluster."""

    def run(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return run_script(tmp_path, {**cloud, **store}, name, *arguments)

    return run


def outcomes(runs: list[Run]) -> set[str]:
    return {run.data.tags["outcome"] for run in runs}


def check_costs(parent: Run, children: list[Run], usd_per_second: float) -> None:
    """Every child has the cost of its seconds, and the parent the sum."""
    for child in children:
        cost, seconds = child.data.metrics["cost_usd"], child.data.metrics["seconds"]
        assert cost == pytest.approx(usd_per_second * seconds)
    total = sum(child.data.metrics["cost_usd"] for child in children)
    assert parent.data.metrics["cost_usd"] == pytest.approx(total)


def check_plan(told: str, usd_per_second: float) -> None:
    """Money is what the time costs on both CPUs, as far as its digits tell."""
    figures = re.findall(r"about ([\d.]+) (s|min) and ([\d.]+) USD", told)
    assert figures, told
    for time, unit, usd in figures:
        one = {"s": 1, "min": 60}[unit]
        _, _, decimals = time.partition(".")
        rounded = 0.5 * 10 ** -len(decimals) * one  # most seconds that rounding took off or added
        low, high = (2 * usd_per_second * (float(time) * one + sign * rounded) for sign in (-1, 1))
        assert low * 0.94 <= float(usd) <= high * 1.06  # two digits of money


def test_a_sweep_stops_at_its_budget_and_goes_on_with_more(
    here: Here, store: dict[str, str]
) -> None:
    sweep = ("agc_sweep.py", "--trials", "3", "--epochs", "3", "--name", "s", "--batch-size", "128")
    finals = ("--finalists", "1", "--final-seeds", "2")
    plan = here(*sweep, *finals, "--max-cost", "1e-9", "--dry-run")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    check_plan(plan.stdout, HALF)
    most, least, of_finals = (
        float(re.search(rf"{word} about .* and ([\d.]+) USD", plan.stdout)[1])  # type: ignore[index]
        for word in ("at most", "at least", "4 trainings of finals, for settings not known yet:")
    )
    # The pace is measured for each, on a machine with other work.
    assert of_finals == pytest.approx(most * 4 / 3, rel=0.5)
    assert plan.stdout.count("at most about") == plan.stdout.count("at least about") == 1
    assert least == most  # three trials know of no other, so none is cut
    assert "This is over the budget of 0.000000001 USD" in plan.stdout
    assert not Path(store["NFLAB_STORAGE"]).exists()

    first = here(*sweep, "--max-cost", "1e-9")
    assert first.returncode == 130, first.stdout + first.stderr
    assert "the budget of 0.000000001 USD is reached" in first.stderr
    assert "--resume s" in first.stderr and "--max-cost USD" in first.stderr
    parent, children = family(store["MLFLOW_TRACKING_URI"], "agc_sweep")
    assert (parent.data.tags["outcome"], parent.info.status) == ("interrupted", "KILLED")
    assert "Stopped: the budget" in parent.data.tags["mlflow.note.content"]
    assert outcomes(children) == {"interrupted"}
    assert {child.data.metrics["epoch"] for child in children} == {1}
    check_costs(parent, children, HALF)

    resume = ("agc_sweep.py", "--resume", "s", "--max-cost")
    little = here(*resume, "2e-9")  # less than was spent
    assert little.returncode == 130, little.stdout + little.stderr
    parent, same = family(store["MLFLOW_TRACKING_URI"], "agc_sweep")
    assert {run.info.run_id: run.data.metrics for run in same} == {
        run.info.run_id: run.data.metrics for run in children
    }

    last = here(*resume, "100")
    assert last.returncode == 0, last.stdout + last.stderr
    parent, children = family(store["MLFLOW_TRACKING_URI"], "agc_sweep")
    assert parent.data.tags["outcome"] == "finished"
    assert len(children) == 3 and outcomes(children) <= {"finished", "pruned"}
    check_costs(parent, children, HALF)
    cut = [c.data.metrics for c in children if c.data.tags["outcome"] == "pruned"]
    saved = sum(m["cost_usd"] * (3 - m["epoch"]) / m["epoch"] for m in cut)
    assert parent.data.metrics["pruning_saved_usd"] == pytest.approx(saved)
    note = parent.data.tags["mlflow.note.content"]
    assert "All runs together trained for" in note and "USD" in note and "Stopped" not in note
    assert "All runs together trained for" in last.stdout


def test_a_grid_stops_at_its_budget_and_goes_on_with_more(
    here: Here, store: dict[str, str], tmp_path: Path
) -> None:
    name = "clipping_vs_batch_size"
    flags = "--batch-sizes 128 --clippings 0.08 --epochs 1 --seeds 2".split()
    first = here(f"{name}.py", *flags, "--max-cost", "1e-9")
    assert first.returncode == 130, first.stdout + first.stderr
    assert f"--resume {name}" in first.stderr and "--max-cost USD" in first.stderr
    parent, children = family(store["MLFLOW_TRACKING_URI"], name)
    assert (parent.data.tags["outcome"], parent.info.status) == ("interrupted", "KILLED")
    assert "Stopped: the budget" in parent.data.tags["mlflow.note.content"]
    assert 1 <= len(children) < 6
    check_costs(parent, children, HALF)
    with (tmp_path / "runs" / name / "cells.csv").open() as file:
        cells = [row["outcome"] for row in csv.DictReader(file)]
    assert len(cells) == 6 and cells.count("missing") == 6 - len(children)

    finals = ("--finalists", "1", "--final-seeds", "2")
    plan = here(f"{name}.py", *flags, *finals, "--max-cost", "1e-9", "--dry-run")
    assert f"{6 - len(children)} of 6 cells would run" in plan.stdout, plan.stdout + plan.stderr
    check_plan(plan.stdout, HALF)
    assert "spent before: it would stop there" in plan.stdout
    assert re.search(r"and then 4 trainings of finals.*: about .* USD", plan.stdout)

    last = here(f"{name}.py", "--resume", name, "--max-cost", "none")
    assert last.returncode == 0, last.stdout + last.stderr
    parent, children = family(store["MLFLOW_TRACKING_URI"], name)
    assert parent.data.tags["outcome"] == "finished"
    assert len(children) == 6
    check_costs(parent, children, HALF)


def test_all_workers_of_a_training_are_paid(here: Here, store: dict[str, str]) -> None:
    done = here("train.py", "--epochs", "1", "--num-workers", "2", "--batch-size", "128")
    assert done.returncode == 0, done.stdout + done.stderr
    run, _ = family(store["MLFLOW_TRACKING_URI"], "train")
    price = 2 * 0.504 / 2 / 3600
    metrics = run.data.metrics
    assert metrics["cost_usd"] == pytest.approx(price * metrics["seconds"])
