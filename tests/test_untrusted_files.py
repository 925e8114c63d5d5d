"""Files of checkpoints and artifacts are data: nothing in them is executed, whoever wrote them."""

import ast
import os
import pickle
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

import nfnet
from nflab.data import DatasetError, load_dataset
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from tests.conftest import ROOT, Script

SMALL = "--epochs 1 --batch-size 64".split()


class Planted:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What no test may find at its end, though the planted files do leave it."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Planted(path)))
    path.unlink()
    yield path
    assert not path.exists()


def plant(path: Path, mark: Path) -> None:
    """Puts code in the place of a file, in the file's own format."""
    if path.suffix == ".pt":
        torch.save({"model": Planted(mark), "history": []}, path)
    else:
        path.write_bytes(pickle.dumps(Planted(mark), protocol=2))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_unpickled_but_by_readers_that_execute_nothing() -> None:
    folders = ("nfnet", "platform", "experiments", "cluster", "benchmarks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        words = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        unpicklers = words & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        assert unpicklers <= ({"pickle"} if path.name == "haiku.py" else set()), path
        for name, call in calls(tree):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if name == "torch.load":
                assert given.get("weights_only") == "True", path
            assert name not in ("pickle.load", "pickle.loads", "eval", "exec", "yaml.load"), path
            assert name not in ("pd.read_pickle", "Tuner.restore"), path
            assert given.get("allow_pickle", "False") == "False", path


@pytest.mark.parametrize("protocol", [0, 2, 4, "torch", "torch before 1.6"])
def test_weights_that_hold_code_are_refused(tmp_path: Path, mark: Path, protocol: object) -> None:
    file = tmp_path / "weights.pt"
    if isinstance(protocol, int):
        file.write_bytes(pickle.dumps({"w": Planted(mark)}, protocol))
    else:
        torch.save({"w": Planted(mark)}, file, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(ValueError, match="holds no usable weights") as caught:
        nfnet.create_model("dm_nf_resnet_digits", pretrained=str(file))
    assert "\n" not in str(caught.value)


def test_images_that_hold_code_are_refused(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        plant(folder / name, mark)
    with pytest.raises(DatasetError, match="are not whole"):
        load_dataset(replace(RECIPES["digits"].config, dataset=str(folder.parent)))


def test_runs_whose_files_hold_code_are_refused_or_go_on_without(
    script: Script, store: dict[str, str], tmp_path: Path, mark: Path, ray_address: str
) -> None:
    runs = tmp_path / "runs"
    done = script("agc_sweep.py", *SMALL, "--trials=2", "--name=sweep", RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stderr
    mlflow.set_tracking_uri(store["MLFLOW_TRACKING_URI"])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("agc_sweep")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    child = next(run.info.run_id for run in found if "mlflow.parentRunId" in run.data.tags)

    # The model, as MLflow itself loads it where it may not unpickle anything.
    (model,) = client.search_logged_models([experiment.experiment_id])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        loaded = mlflow.pyfunc.load_model(model.model_uri)
    answers = loaded.predict(pd.DataFrame(loaded.input_example))
    assert len(answers) == 1
    artifact = Path(model.artifact_location.removeprefix("file://"))
    assert not [*artifact.rglob("*.pkl")]
    plant(next(artifact.rglob("weights.pt")), mark)
    with pytest.raises(Exception, match="holds no usable weights"):
        mlflow.pyfunc.load_model(model.model_uri)

    # All that a run, Tune and MLflow keep as files, but what a sweep is resumed by.
    kept = next(runs.glob("sweep/trials/*/checkpoints/epoch-000001"))
    spared = {"run.json", "config.json", "model.json", "made_by.json", "complete", "study.db"}
    for path in [*runs.rglob("*")]:
        if path.is_file() and (path.name not in spared or "mlflow-artifacts" in path.parts):
            plant(path, mark)
    for mark_of in runs.rglob("complete"):
        mark_of.write_bytes(b"")  # else the checkpoints would be left aside
    assert not [*runs.rglob("*.pkl")]  # which Ray would unpickle

    for words, said in (
        (["export.py", str(kept), "model.onnx"], "holds no usable weights"),
        (["replay.py", child], "is no single training"),
    ):
        refused = script(*words)
        assert refused.returncode in (1, 2), refused.stdout
        assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
        assert said in refused.stderr
    for name in ("audit.py", "report.py"):
        ended = script(name, cold=name == "audit.py")
        assert "Traceback" not in ended.stderr, ended.stderr

    # A trial that was under way, says the study, goes on from the planted checkpoint.
    with closing(sqlite3.connect(runs / "sweep" / "study.db")) as study:
        number = int(kept.parents[1].name) - 1
        study.execute("UPDATE trials SET state = 'RUNNING' WHERE number = ?", [number])
        study.commit()
    resumed = script("agc_sweep.py", "--resume", "sweep", RAY_ADDRESS=ray_address)
    assert "state.pt of the last checkpoint is damaged or holds more" in resumed.stdout
