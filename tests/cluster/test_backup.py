"""What only the head's disk holds comes back on a new head."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from nflab.recording.tracker import Tracker
from tests.buckets import Bucket
from tests.conftest import ROOT, free_port, stop_marked

SERVER = ROOT / "cluster" / "mlflow_server.py"

OFTEN = f"""
import sys
sys.path.insert(0, {str(SERVER.parent)!r})
import mlflow_server
mlflow_server.BACKUP_SECONDS = 0.5
mlflow_server.run()
"""
"""As `mlflow_server.py run`, but it does not take a minute."""


class Head:
    """A machine of a cluster whose results are in the bucket."""

    def __init__(self, home: Path, bucket: Bucket) -> None:
        self.home, self._bucket = home, bucket
        self.uri = f"http://127.0.0.1:{free_port()}"
        self._mark = f"head-of-test-{home}"
        self.env = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "NFLAB_TEST": self._mark,
            "NFLAB_RESULTS": f"s3://{bucket.name}/x",
            "MLFLOW_TRACKING_URI": self.uri,
            **bucket.env,
        }
        self.log = home / "mlflow" / "server.log"
        self.study = f"sqlite:///{home}/nflab/runs/s/study.db"

    def start(self) -> None:
        """As the cluster's start commands do."""
        done = subprocess.run(
            [sys.executable, str(SERVER), "start"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.log.read_text()

    def save(self) -> "subprocess.CompletedProcess[str]":
        """As `make down` does."""
        return subprocess.run(
            [sys.executable, str(ROOT / "cluster" / "backup.py")],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def start_with_many_backups(self) -> None:
        (self.home / "mlflow").mkdir(parents=True)
        with self.log.open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-c", OFTEN], cwd=self.home, env=self.env, stdout=log, stderr=log
            )
        wait_for(lambda: self.answers(), self.log)

    def answers(self) -> bool:
        try:
            MlflowClient(self.uri).search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def lose(self) -> None:
        """It is ended at once, with its disk."""
        stop_marked(self._mark)
        shutil.rmtree(self.home)

    def runs(self) -> list[Run]:
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("agc_sweep")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Bucket() as started:
        yield started


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def saved_runs(bucket: Bucket, folder: Path) -> set[str]:
    """Names of the runs in the bucket's copy of MLflow's database."""
    if "mlflow.db" not in bucket.files("x/backup/"):
        return set()
    (folder / "copy.db").write_bytes(bucket.read("x/backup/mlflow.db"))
    database = sqlite3.connect(folder / "copy.db")
    try:
        return {name for (name,) in database.execute("SELECT name FROM runs")}
    finally:
        database.close()


def test_a_new_head_has_all_that_the_lost_one_had(tmp_path: Path, bucket: Bucket) -> None:
    lost = Head(tmp_path / "lost", bucket)
    new = Head(tmp_path / "new", bucket)
    try:
        lost.start_with_many_backups()
        tracker = Tracker(lost.uri, "", "agc_sweep")
        run = tracker.start("first", {})
        tracker.log_params(run, {"clipping": 0.1})
        for epoch in (1, 2, 3):
            tracker.log(run, {"val_top1": 90.0 + epoch}, epoch)
        tracker.add_text(run, "said", "said.txt")
        tracker.finish(run, "finished")
        (lost.home / "nflab" / "runs" / "s" / "unsent").mkdir(parents=True)
        (lost.home / "nflab" / "runs" / "s" / "unsent" / "requests.jsonl").write_text("{}\n")
        study = optuna.create_study(storage=lost.study, study_name="s")
        study.optimize(lambda trial: trial.suggest_float("clipping", 0.01, 1), n_trials=3)
        with bucket.failing("answers 503"):
            tracker.start("second", {})
            wait_for(lambda: "could not be copied" in lost.log.read_text(), lost.log)
            assert "second" not in saved_runs(bucket, tmp_path)
        wait_for(lambda: {"first", "second"} <= saved_runs(bucket, tmp_path), lost.log)
        done = lost.save()
        assert done.returncode == 0, done.stdout
        told = f"MLflow's database and the files of 1 runs are in s3://{bucket.name}/x\n"
        assert done.stdout == told
        lost.lose()

        new.home.mkdir()
        new.start()
        runs = {found.info.run_name: found for found in new.runs()}
        assert set(runs) == {"first", "second"}
        client = MlflowClient(new.uri)
        assert runs["first"].info.status == "FINISHED"
        assert runs["first"].data.params["clipping"] == "0.1"
        points = client.get_metric_history(run, "val_top1")
        assert [(point.step, point.value) for point in points] == [(1, 91), (2, 92), (3, 93)]
        assert Path(client.download_artifacts(run, "said.txt")).read_text() == "said"
        back = optuna.load_study(storage=new.study, study_name="s")
        assert [t.params for t in back.trials] == [t.params for t in study.trials]
        kept = new.home / "nflab" / "runs" / "s" / "unsent" / "requests.jsonl"
        assert kept.read_text() == "{}\n"
    finally:
        for head in (lost, new):
            stop_marked(head.env["NFLAB_TEST"])


def test_a_backup_that_cannot_be_made_is_told_in_a_sentence(tmp_path: Path, bucket: Bucket) -> None:
    head = Head(tmp_path, bucket)
    (tmp_path / "nflab" / "runs" / "s").mkdir(parents=True)
    (tmp_path / "nflab" / "runs" / "s" / "unsent.txt").write_text("x")
    with bucket.failing("answers 503"):
        done = head.save()
    assert done.returncode == 2
    where = f"s3://{bucket.name}/x"
    assert done.stdout.startswith(f"error: the head's files could not be copied to {where}: ")
    assert done.stdout.count("\n") == 1


SAVE = f"""
import sys
sys.path.insert(0, {str(SERVER.parent)!r})
from backup import DATABASE, Backup
backup = Backup(sys.argv[1])
if sys.argv[2] == "start":
    backup.take_over()
    if not DATABASE.exists():
        DATABASE.touch()
backup.save()
"""


def test_of_two_heads_at_one_address_the_later_one_has_the_copies(tmp_path: Path) -> None:
    def save(head: str, verb: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", SAVE, str(tmp_path / "results"), verb],
            env={"HOME": str(tmp_path / head), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    for head, verb in (("a", "start"), ("a", "go on"), ("a", "start"), ("b", "start")):
        done = save(head, verb)
        assert done.returncode == 0, done.stderr
    refused = save("a", "go on")
    assert refused.returncode == 1
    assert "is another head's" in refused.stderr
    assert save("b", "go on").returncode == 0


def backed_up(home: Path, results: Path, code: str = "") -> "subprocess.CompletedProcess[str]":
    """A copy of what a head's disk holds, after some code of the module's own names."""
    script = f"import sys\nsys.path.insert(0, {str(SERVER.parent)!r})\nimport backup\n{code}\n"
    return subprocess.run(
        [sys.executable, "-c", f"{script}backup.main()"],
        env={**os.environ, "HOME": str(home), "NFLAB_RESULTS": str(results)},
        capture_output=True,
        text=True,
        check=False,
    )


def a_database(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("create table if not exists numbers (n integer, said text)")
        values = [(n, "x" * 100) for n in range(rows)]
        database.executemany("insert into numbers values (?, ?)", values)


def test_a_damaged_database_never_takes_the_place_of_its_last_sound_copy(tmp_path: Path) -> None:
    home, results = tmp_path / "head", tmp_path / "results"
    database = home / "mlflow" / "mlflow.db"
    a_database(database, 1000)
    assert backed_up(home, results).returncode == 0
    sound = (results / "backup" / "mlflow.db").read_bytes()
    content = bytearray(database.read_bytes())
    content[8192 : 8192 + 4096] = b"\0" * 4096  # as a disk may return it
    database.write_bytes(content)
    done = backed_up(home, results)
    assert done.returncode == 2
    assert "is damaged" in done.stdout
    assert done.stdout.count("\n") == 1
    assert (results / "backup" / "mlflow.db").read_bytes() == sound
    # Nor does it keep what is sound from being copied.
    a_database(home / "nflab" / "runs" / "s" / "study.db", 1)
    assert backed_up(home, results).returncode == 2
    assert (results / "backup" / "runs" / "s" / "study.db").is_file()


DAYS = """
import sqlite3
from contextlib import closing
results = os.environ["NFLAB_RESULTS"]
for number in range(18):
    with closing(sqlite3.connect(backup.DATABASE)) as database, database:
        database.execute("insert into numbers values (0, 'x')")
    today = backup.time.struct_time((2026, 5, 1 + number // 2, 0, 0, 0, 0, 0, 0))
    backup.time.gmtime = lambda: today
    backup.Backup(results).save()
"""


def test_the_first_copy_of_each_day_stays_for_a_week(tmp_path: Path) -> None:
    home, results = tmp_path / "head", tmp_path / "results"
    earlier = results / "backup" / "earlier"
    a_database(home / "mlflow" / "mlflow.db", 0)
    done = backed_up(home, results, f"import os\n{DAYS}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in earlier.iterdir()) == [
        f"2026-05-0{day}.db" for day in range(3, 10)
    ]
    with closing(sqlite3.connect(earlier / "2026-05-04.db")) as kept:
        assert kept.execute("select count(*) from numbers").fetchone() == (7,)  # its first
    shutil.rmtree(home)
    done = backed_up(home, results, f"backup.Backup({str(results)!r}).take_over()")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()) == [
        "mlflow/mlflow.db",
        "mlflow/owner",
    ]
