"""The main job, run as a user runs it and read back from MLflow."""

import json
import re
import zlib
from base64 import b64decode
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

import nfnet
from nflab.auditing.audit import run_audit
from nflab.data import load_dataset
from nflab.reporting.report import write_report
from nflab.settings.config import Config
from nflab.settings.leaves import flat
from nflab.settings.serialization import from_json
from nflab.settings.studies import SweepConfig
from tests.conftest import Recorded, Script
from tests.records import family


def text_of(value: object) -> str:
    """What MLflow is to show of a setting."""
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "none" if value is None else str(value)


def test_every_trial_is_recorded_once_and_whole(recorded: Recorded) -> None:
    parent, children = family(recorded.uri, "agc_sweep")
    assert len(children) == 4
    client = MlflowClient(recorded.uri)
    for run in children:
        text = client.download_artifacts(run.info.run_id, "config.json")
        config = from_json(Config, Path(text).read_text())
        tags = run.data.tags
        assert tags["trial"] == str(run.info.run_name)[:3]
        assert run.data.params == {
            **{name: text_of(value) for name, value in flat(config).items()},
            **{"kind": "trial", "parent": "small", "trial": tags["trial"]},
        }
        assert tags["dataset_fingerprint"] == load_dataset(Config()).fingerprint
        assert tags["world_size"] == "1"
        assert re.fullmatch(r"[0-9a-f]{40}(-edited)?|unknown", tags["git_commit"])
        status = {"finished": "FINISHED", "diverged": "FINISHED", "pruned": "KILLED"}
        assert run.info.status == status[tags["outcome"]]
        epochs = int(run.data.metrics["epoch"])
        assert epochs == 3 or tags["outcome"] != "finished"
        for name in ("train_loss", "val_loss", "val_top1", "learning_rate", "images_per_second"):
            history = client.get_metric_history(run.info.run_id, name)
            assert [point.step for point in history] == list(range(1, epochs + 1)), name
        assert ("test_top1" in run.data.metrics) == (tags["outcome"] == "finished")
        clipped = {n for n in run.data.metrics if n.startswith("clipped_fraction/")}
        assert bool(clipped) == (config.optimizer.clipping is not None)
    assert parent.info.status == "FINISHED"


def test_the_parent_holds_the_best_trial_and_the_figures(recorded: Recorded) -> None:
    parent, children = family(recorded.uri, "agc_sweep")
    client = MlflowClient(recorded.uri)
    finished = [run for run in children if run.data.tags["outcome"] == "finished"]
    best = max(finished, key=lambda run: run.data.metrics["val_top1"])
    assert parent.data.metrics["val_top1"] == best.data.metrics["val_top1"]
    assert parent.data.metrics["test_top1"] == best.data.metrics["test_top1"]
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    figures = {"top1.png", "importances.png", "learning_curves.png"}
    assert names == figures | {"config.json", "classes.json", "trials.csv", "best_trial"}
    (logged,) = client.search_logged_models([parent.info.experiment_id])
    assert logged.source_run_id == parent.info.run_id
    assert parent.data.tags["model_uri"] == f"models:/{logged.model_id}"
    version = client.get_model_version("nflab-digits", "1")
    assert (version.run_id, version.source) == (parent.info.run_id, f"models:/{logged.model_id}")
    grid, _ = family(recorded.uri, "clipping_vs_batch_size")
    better = max((parent, grid), key=lambda run: run.data.metrics["val_top1"])
    marked = client.get_model_version_by_alias("nflab-digits", "best")
    assert marked.run_id == better.info.run_id
    folder = Path(client.download_artifacts(parent.info.run_id, "best_trial"))
    config = json.loads((folder / "config.json").read_text())
    assert str(config["optimizer"]["batch_size"]) == best.data.params["batch_size"]
    model = nfnet.create_model(config["model"]["model"]).eval()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    digits = load_dataset(Config())
    images, labels = digits.eval_images("test", torch.arange(digits.sizes["test"]))
    pixels = (images.float() / 255 - digits.mean) / digits.std
    top1 = 100 * (model(pixels).argmax(1) == labels).double().mean()
    assert float(top1) == pytest.approx(best.data.metrics["test_top1"])
    table = pd.read_csv(client.download_artifacts(parent.info.run_id, "trials.csv"))
    assert set(table.run_id) == {run.info.run_id for run in children}
    text = client.download_artifacts(parent.info.run_id, "config.json")
    assert from_json(SweepConfig, Path(text).read_text()).search.trials == 4


def test_the_output_says_what_was_found_and_where(recorded: Recorded) -> None:
    output = recorded.printed["agc_sweep"]
    assert "Five best trials" in output
    assert "What mattered most" in output
    figures = re.findall(r"\S+\.png", output)
    assert len(figures) == 3
    assert all(Path(figure.rstrip(",")).is_file() for figure in figures)
    assert recorded.uri in output
    assert len(output.splitlines()) < 25


def test_a_sweep_with_the_same_seed_proposes_the_same_first_trials(
    recorded: Recorded, script: Script, store: dict[str, str], ray_address: str
) -> None:
    done = script(
        "agc_sweep.py", "--trials", "4", "--epochs", "1", "--seed", "5", RAY_ADDRESS=ray_address
    )
    assert done.returncode == 0, done.stdout + done.stderr
    proposed = [
        [
            [run.data.params[name] for name in ("clipping", "batch_size", "augmentation_level")]
            for run in family(uri, "agc_sweep")[1]
        ]
        for uri in (recorded.uri, store["MLFLOW_TRACKING_URI"])
    ]
    assert proposed[0] == proposed[1]
    assert len({tuple(trial) for trial in proposed[0]}) == 4


def test_a_trial_of_several_workers_trains_with_ray_train(
    script: Script, store: dict[str, str], ray_address: str
) -> None:
    flags = "--trials 1 --epochs 1 --num-workers 2 --clipping 0.08 --batch-size 32"
    done = script("agc_sweep.py", *flags.split(), RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    _, children = family(store["MLFLOW_TRACKING_URI"], "agc_sweep")
    (run,) = children
    assert run.data.tags["outcome"] == "finished"
    assert run.data.tags["world_size"] == "2"
    assert run.data.params["batch_size"] == "32"
    assert run.data.params["clipping"] == "0.08"


def test_any_settings_are_searched(
    script: Script, store: dict[str, str], ray_address: str, tmp_path: Path
) -> None:
    search = "base_learning_rate=0.4..6.4:log sam_rho=none,0.02..0.1:log mixup batch_size=96,128"
    flags = "--trials 6 --epochs 1 --warmup-epochs 0 --finalists 1 --final-seeds 2 --name any"
    given = ["--search", *search.split(), "--augmentation-level", "0", *flags.split()]
    done = script("sweep.py", *given, RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    parent, children = family(store["MLFLOW_TRACKING_URI"], "sweep")
    trials = [run for run in children if run.data.tags["kind"] == "trial"]
    assert len(trials) == 6
    for run in trials:
        params = run.data.params
        assert 0.4 <= float(params["base_learning_rate"]) <= 6.4
        assert params["sam_rho"] == "none" or 0.02 <= float(params["sam_rho"]) <= 0.1
        assert params["batch_size"] in ("96", "128")
        assert params["clipping"] == "0.16" and params["augmentation_level"] == "0"
    assert {run.data.params["mixup"] for run in trials} == {"True", "False"}
    assert parent.data.params["base_learning_rate"] == "searched: 0.4 to 6.4"
    assert parent.data.params["sam_rho"] == "searched: 0.02 to 0.1, or none"
    assert parent.data.params["batch_size"] == "searched: 96, 128"
    best = max(trials, key=lambda run: run.data.metrics["val_top1"])
    finals = [run for run in children if run.data.tags["kind"] != "trial"]
    for name in ("base_learning_rate", "sam_rho", "mixup", "batch_size"):
        assert best.data.params[name] in {run.data.params[name] for run in finals}, name
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"slices.png", "map.png", "parallel.png"} <= names and "top1.png" not in names
    assert "mixup" in done.stdout and "sam rho" in done.stdout

    report = tmp_path / "report"
    done = script("report.py", "--output", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sweep any" in (report / "report.md").read_text()


def test_of_several_aims_the_answer_is_a_front(
    script: Script, store: dict[str, str], ray_address: str, tmp_path: Path
) -> None:
    aims = "val_top1 val_loss seconds"
    flags = f"--objectives {aims} --pruner none --trials 5 --epochs 1 --warmup-epochs 0 --name many"
    finals = "--finalists 2 --final-seeds 2 --augmentation-level 0"
    search = "base_learning_rate=0.1..6.4:log batch_size=64..128:pow2"
    given = ["--search", *search.split(), *flags.split(), *finals.split()]
    done = script("sweep.py", *given, RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The front, which no other of 5 trials beats" in done.stdout
    parent, children = family(store["MLFLOW_TRACKING_URI"], "sweep")
    trials = {run.info.run_name: run for run in children if run.data.tags["kind"] == "trial"}
    results = {name: run.data.metrics for name, run in trials.items()}
    assert len(results) == 5

    def beaten(name: str) -> bool:
        own = results[name]
        return any(
            other != name
            and one["val_top1"] >= own["val_top1"]
            and one["val_loss"] <= own["val_loss"]
            and one["seconds"] <= own["seconds"]
            for other, one in results.items()
        )

    front = {name for name in results if not beaten(name)}
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    table = pd.read_csv(client.download_artifacts(parent.info.run_id, "trials.csv"))
    assert set(table.name[table.front]) == set(table.name[: len(front)]) == front
    for name, run in trials.items():
        checkpoints = list(tmp_path.glob(f"runs/many/trials/0{run.data.tags['trial']}/check*/*"))
        assert bool(checkpoints) == (name in front), name
    repeated = {
        (run.data.params["base_learning_rate"], run.data.params["batch_size"])
        for run in children
        if run.data.tags["kind"] == "cell"
    }
    of_front = {
        (trials[name].data.params["base_learning_rate"], trials[name].data.params["batch_size"])
        for name in front
    }
    assert len(repeated & of_front) == min(2, len(front))
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"front.png", "slices.png", "map.png", "finalists.png"} <= names
    experiment = client.get_experiment(parent.info.experiment_id)
    packed = json.loads(experiment.tags["mlflow.sharedViewState.nflab"])["state"]
    view = json.loads(zlib.decompress(b64decode(packed.removeprefix("deflate;"))))
    assert {f"metrics.`{aim}`" for aim in aims.split()} <= set(view["selectedColumns"])
    note = parent.data.tags["mlflow.note.content"]
    assert f"The front: {len(front)} trials" in note and "end early" not in note
    study = optuna.load_study(study_name="many", storage=f"sqlite:///{tmp_path}/runs/many/study.db")
    assert study.metric_names == aims.split()
    told = [trial.values for trial in study.trials]
    assert told == [[results[name][aim] for aim in aims.split()] for name in sorted(results)]

    _, page = write_report(store["MLFLOW_TRACKING_URI"], tmp_path / "report")
    assert f"the front has {len(front)} of the trials" in page.read_text()
    assert run_audit(store["MLFLOW_TRACKING_URI"], str(tmp_path / "runs"), False).told == []


def test_a_search_of_nothing_is_refused(script: Script) -> None:
    done = script("sweep.py", "--trials", "2")
    assert done.returncode == 2
    assert "name what to search, as --search clipping=0.02..0.64:log" in done.stderr
