"""How the bookkeeping grows with the number of runs: recording, a grid, the report, the audit.

For each size a store of MLflow's (SQLite) is filled with cells of one grid, of 100 epochs each: the
first few are recorded by the platform, the others are copies of them in the database, with names,
settings and accuracies of their own. Then it measures, on that store: recording one more cell, in
seconds and in calls of MLflow's client, opening the grid again, `report.py` and `audit.py`. Nothing
is trained. Draws seconds over runs, with a line of what grows with their number.

Example:
  python benchmarks/growth.py --runs 10 100 1000
"""

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import matplotlib as mpl  # noqa: E402

from nflab.cluster.placement import Placement  # noqa: E402
from nflab.recording.outbox import Outbox  # noqa: E402
from nflab.recording.provenance import driver, software_tags  # noqa: E402
from nflab.recording.tracker import Tracker  # noqa: E402
from nflab.running.budget import Budget  # noqa: E402
from nflab.settings.leaves import as_text, replace  # noqa: E402
from nflab.settings.studies import GridOfConfigs  # noqa: E402
from nflab.storage.checkpoints import Checkpoints  # noqa: E402
from nflab.storage.ownership import Ownership  # noqa: E402
from nflab.storage.run_folder import new_identity, write_config, write_identity  # noqa: E402
from nflab.studies.cell_ledger import CellLedger  # noqa: E402
from nflab.studies.life_cycle import LiveRun  # noqa: E402
from nflab.studies.session import Session  # noqa: E402

EXPERIMENT = "clipping_vs_batch_size"

RECORDED = 5
"""Cells that the platform records; the others are copies."""


def settings_of(count: int) -> list[dict[str, Any]]:
    """Settings of so many cells: 5 batch sizes by 5 clippings, over seeds."""
    pairs = [(b, c) for b in (16, 32, 64, 128, 256) for c in (None, 0.02, 0.04, 0.08, 0.16)]
    return [
        {"batch_size": b, "clipping": c, "seed": n // len(pairs)}
        for n, (b, c) in enumerate(pairs * (count // len(pairs) + 1))
    ][:count]


def top1_of(number: int) -> float:
    """Of a cell, by its place; the best has been recorded, not copied."""
    return 95.0 if number == 0 else 60 + 30 * (number * 7919 % 1000) / 1000


class Book:
    """A grid's bookkeeping in a folder of its own."""

    def __init__(self, folder: Path, cells: int, epochs: int) -> None:
        self.folder, self.epochs = folder, epochs
        storage, uri = str(folder / "runs"), f"sqlite:///{folder}/mlflow.db"
        base = replace(
            GridOfConfigs(), name=EXPERIMENT, epochs=epochs, storage=storage, tracking_uri=uri
        )
        self.config, self.settings = base, settings_of(cells)
        self.home = Path(storage, EXPERIMENT)
        self.home.mkdir(parents=True)
        identity = new_identity(EXPERIMENT, EXPERIMENT)
        write_identity(str(self.home), identity)
        write_config(str(self.home), base)
        self.tracker = Tracker(uri, storage, EXPERIMENT)
        tags = {**software_tags(), "driver": driver(), "kind": "grid", "folder": str(self.home)}
        self.session = Session(
            base,
            str(self.home),
            self.tracker,
            Placement(1, 1.0, 0.0, 2),
            (),
            {**software_tags(), "driver": driver(), "dataset_fingerprint": "0" * 64},
            identity,
            Ownership(),
        )
        self.parent = self.tracker.start(EXPERIMENT, tags, key=identity.id)
        self.tracker.finish(self.parent, "finished")
        self.tracker.add_text(self.parent, "{}", "config.json")
        self.outbox = Outbox(self.tracker, self.session.outbox_folder)

    def ledger(self) -> CellLedger:
        """The grid's cells, read from MLflow."""
        run = LiveRun(self.session, self.outbox, self.parent, Budget())
        return CellLedger(run, self.config.base(), self.settings)

    def record(self, ledger: CellLedger) -> None:
        """One cell, as the platform records it."""
        proposal = ledger.propose()
        ledger.started(proposal)
        top1 = top1_of(proposal.number - 1)
        for epoch in range(1, self.epochs + 1):
            ledger.reported(proposal.number, self._report(epoch, top1))
        with tempfile.TemporaryDirectory() as content:
            checkpoints = Checkpoints.of_run(proposal.folder)
            checkpoints.save(Path(content), self.epochs)
        ledger.ended(proposal.number, "finished", {"val_top1": top1})
        self.outbox.drain()

    def _report(self, epoch: int, top1: float) -> dict[str, Any]:
        of_machine = {f"system/worker_0/{name}": 50.0 for name in ("cpu_percent", "memory_mb")}
        ended = epoch == self.epochs
        test = {"test_loss": 0.5, "test_top1": top1, "test_top5": 99.0} if ended else {}
        return {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_loss": 1 / epoch,
            "val_top1": top1,
            "val_top5": 99.0,
            "best_epoch": epoch,
            "best_val_top1": top1,
            "learning_rate": 0.1,
            "images_per_second": 1000.0,
            "world_size": 1,
            "seconds": float(epoch),
            "data_wait_fraction": 0.01,
            "checkpoint_seconds": 0.01,
            "clipped_fraction": 0.3,
            "outcome": "finished" if ended else "running",
            **of_machine,
            **test,
        }

    def copy(self, cells: int) -> None:
        """Fills the store with copies of what was recorded, up to `cells`."""
        ids = {one.id: n for n, one in enumerate(self.ledger().cells[:cells])}
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as database, database:
            database.row_factory = sqlite3.Row
            made = [r["run_uuid"] for r in _rows(database, "tags", "key = 'cell'")]
            whole = {
                run: {
                    table: [dict(r) for r in _rows(database, table, f"run_uuid = '{run}'")]
                    for table in ("runs", "tags", "params", "metrics", "latest_metrics")
                }
                for run in made
            }
            known = {tag["value"] for one in whole.values() for tag in _of(one["tags"], "cell")}
            for number, (cell, place) in enumerate(ids.items()):
                if cell in known:
                    continue
                run = f"{number:032x}"
                source = made[number % len(made)]
                texts = {key: as_text(value) for key, value in self.settings[place].items()}
                artifacts = self._artifacts(whole[source]["runs"][0]["artifact_uri"], run)
                changes: dict[str, dict[str, Any]] = {
                    "runs": {"run_uuid": run, "name": cell, "artifact_uri": artifacts},
                    "tags": {"cell": cell, "record": f"new-{run}"}
                    | {"folder": f"{self.home}/cells/{cell}"},
                    "params": {**texts, "cell": cell},
                    "metrics": {"val_top1": top1_of(place), "test_top1": top1_of(place)},
                }
                changes["latest_metrics"] = changes["metrics"]
                for table, rows in whole[source].items():
                    new = [_changed(table, row, run, changes[table]) for row in rows]
                    names = ", ".join(f'"{column}"' for column in new[0])
                    marks = ", ".join("?" * len(new[0]))
                    database.executemany(
                        f"insert into {table} ({names}) values ({marks})",
                        [tuple(row.values()) for row in new],
                    )
        (self.home / "cells").mkdir(exist_ok=True)

    def _artifacts(self, address: str, run: str) -> str:
        """A folder of artifacts with the one file that every run has."""
        source = Path(address.removeprefix("file://"))
        folder = source.parents[1] / run / "artifacts"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        return address.replace(source.parent.name, run)


def _rows(database: sqlite3.Connection, table: str, where: str) -> list[sqlite3.Row]:
    return database.execute(f"select * from {table} where {where}").fetchall()


def _of(tags: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [tag for tag in tags if tag["key"] == key]


def _changed(table: str, row: dict[str, Any], run: str, new: dict[str, Any]) -> dict[str, Any]:
    """A row of a table, as that of another run."""
    if table == "runs":
        return {**row, **new}
    value = new.get(row["key"], row["value"])
    return {**row, "run_uuid": run, "value": value}


class Counting:
    """A client of MLflow's that counts what it is asked for."""

    def __init__(self, client: Any) -> None:
        self._client, self.calls = client, 0

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._client, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return asked(*args, **kwargs)

        return counted


def seconds(work: Callable[[], object]) -> float:
    """That a work takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def command(script: str, *flags: str) -> float:
    """Seconds that an experiment's script takes."""
    words = [sys.executable, str(ROOT / "experiments" / script), *flags]
    begun = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - begun


def measure(cells: int, epochs: int, folder: Path) -> dict[str, float]:
    """What a store of so many cells takes."""
    book = Book(folder, cells + 1, epochs)
    ledger = book.ledger()
    for _ in range(min(RECORDED, cells)):
        book.record(ledger)
    book.copy(cells)
    found: dict[str, float] = {"runs": cells}
    found["opening the grid"] = seconds(book.ledger)
    ledger = book.ledger()
    counting = Counting(book.tracker._client)
    book.tracker._client = counting  # type: ignore[assignment]
    found["recording a cell"] = seconds(lambda: book.record(ledger))
    found["calls a cell"] = counting.calls
    book.outbox.close()
    uri = f"--tracking-uri=sqlite:///{folder}/mlflow.db"
    found["report.py"] = command("report.py", uri, f"--output={folder}/report")
    found["audit.py"] = command("audit.py", uri, f"--storage={folder}/runs")
    return found


def draw(rows: list[dict[str, float]], epochs: int, file: Path) -> None:
    """Seconds over runs."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    runs = [row["runs"] for row in rows]
    for name in ("report.py", "audit.py", "opening the grid", "recording a cell"):
        axes.plot(runs, [row[name] for row in rows], "o-", label=name)
    linear = [rows[-1]["report.py"] * n / runs[-1] for n in runs]
    axes.plot(runs, linear, ":", color="tab:gray", label="in proportion to runs")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"runs of {epochs} epochs in MLflow")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, help="a figure is drawn here, as PNG")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = []
    for count in asked.runs:
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(measure(count, asked.epochs, Path(temporary)))
        print(json.dumps(rows[-1]), file=sys.stderr)
    if asked.output is not None:
        draw(rows, asked.epochs, asked.output)
    if asked.json:
        print(json.dumps(rows))
        return
    print("| " + " | ".join(rows[0]) + " |", "|" + " ---: |" * len(rows[0]), sep="\n")
    for row in rows:
        told = (f"{value:.0f}" if value >= 10 else f"{value:.2f}" for value in row.values())
        print("| " + " | ".join(told) + " |")


if __name__ == "__main__":
    main()
