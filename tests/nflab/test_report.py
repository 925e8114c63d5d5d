"""The report, from real MLflow stores whose answers are known beforehand."""

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from nflab.analysis.finalists import BASELINE, EARLIER, RECORD, judge
from nflab.data import load_dataset
from nflab.recording.tracker import Tracker
from nflab.reporting.report import write_report, write_report_from
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat, replace
from nflab.settings.outcomes import Outcome
from nflab.settings.recipes import scales_of
from nflab.settings.search_space import tried
from nflab.settings.serialization import to_json
from nflab.settings.studies import FinalsConfig, LearningRateConfig, SweepConfig
from nflab.studies.cells import Cell
from nflab.studies.earlier import best_clippings
from nflab.studies.finals import run_finals

pytestmark = pytest.mark.slow

Result = tuple[Mapping[str, Any], float, Outcome]


class Store:
    """An MLflow store in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.uri, self.folder = f"sqlite:///{folder}/mlflow.db", folder

    def fill(self, experiment: str, results: list[Result], **tags: str) -> str:
        """Records runs below one parent; returns the parent's id."""
        tracker = Tracker(self.uri, str(self.folder), experiment)
        parent = tracker.start("g", {})
        client = MlflowClient(self.uri)
        for number, (settings, top1, outcome) in enumerate(results, 1):
            marks = {"cell": f"{number:04d}", "folder": "gone"}
            if tags.get("kind") == "trial":
                marks = {"trial": f"{number:03d}"}
            params = {**flat(Config()), **settings}
            reported = {} if outcome == "failed" else {"val_top1": top1, "test_top1": top1}
            run = client.create_run(
                tracker.experiment_id,
                run_name=str(number),
                tags={**marks, "outcome": outcome, "mlflow.parentRunId": parent},
            )
            client.log_batch(
                run.info.run_id,
                metrics=[Metric(name, value, 0, 1) for name, value in reported.items()],
                params=[Param(name, as_text(value)) for name, value in params.items()],
            )
        tracker.finish(parent, "finished")
        return parent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


class Page(HTMLParser):
    """What a page holds, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows = self.folded = self.images = 0
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.folded += tag == "details"
        self.images += tag == "img"
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.fetched.append(value or "")


CELLS: list[Result] = [
    ({"clipping": c, "batch_size": b, "seed": s}, top1, outcome)
    for s in (0, 1)
    for c, b, top1, outcome in (
        (None, 16, 97.0, "finished"),
        (0.1, 16, 98.0, "finished"),
        (None, 64, 0.0, "diverged"),
        (0.1, 64, 96.0 + 2 * s, "finished"),
    )
]


def test_figure_2_comes_from_mlflow_alone(store: Store, tmp_path: Path) -> None:
    store.fill("clipping_vs_batch_size", CELLS)
    markdown, page = write_report(store.uri, tmp_path / "report")
    text = markdown.read_text()
    assert "no clipping reaches 97.0 %, the best clipping (0.1) 98.0 %" in text
    assert "no clipping reaches 0.0 %, the best clipping (0.1) 97.0 %" in text
    assert "The paper (figure 2" in text
    for figure in re.findall(r"\]\((figures/.*?)\)", text):
        assert (tmp_path / "report" / figure).read_bytes()[1:4] == b"PNG"
    table = pd.read_parquet(tmp_path / "report/tables/clipping_vs_batch_size.parquet")
    found = {
        (r.batch_size, r.clipping): (r.seeds, r.diverged, r.test_mean) for r in table.itertuples()
    }
    assert found[64, float("inf")] == (2, 2, 0.0)
    assert found[64, 0.1] == (2, 0, 97.0)
    told = Page(page.read_text())
    assert told.images == 1
    assert told.fetched == []
    runs = pd.read_parquet(tmp_path / "report/tables/runs.parquet").iloc[0]
    assert (runs.finished, runs.diverged) == (6, 2)


def test_numbers_of_several_versions_of_the_code_are_told_beside_them(
    store: Store, tmp_path: Path
) -> None:
    store.fill("clipping_vs_batch_size", CELLS)
    store.fill("agc_sweep", [({"clipping": 0.1}, 90.0, "finished")] * 2, kind="trial")
    client = MlflowClient(store.uri)
    assert "versions of" not in write_report(store.uri, tmp_path / "report")[0].read_text()
    for experiment in client.search_experiments():
        found = client.search_runs([experiment.experiment_id], "tags.outcome = 'finished'")
        for number, run in enumerate(found):
            client.set_tag(run.info.run_id, "code_fingerprint", f"code {number % 2}")
            client.set_tag(run.info.run_id, "torch", "2.11.0")
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert "- 8 results of 2 versions of the code\n" in text
    assert "- 2 results of 2 versions of the code\n" in text
    assert "versions of torch" not in text


def test_nothing_is_claimed_before_all_cells_have_results(store: Store, tmp_path: Path) -> None:
    failed: Result = ({"clipping": 0.1, "batch_size": 64, "seed": 9}, 0.0, "failed")
    parent = store.fill("clipping_vs_batch_size", [*CELLS, failed])
    tracker = Tracker(store.uri, str(tmp_path), "clipping_vs_batch_size")
    tracker.start("begun, without its settings yet", {"cell": "z", "folder": "gone"}, parent)
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert "cannot be told: what needs runs that have no result: clipping 0.1 at 64" in text
    table = pd.read_parquet(tmp_path / "report/tables/clipping_vs_batch_size.parquet")
    assert table.unfinished.sum() == 1


def test_finals_do_not_count_among_the_cells(store: Store, tmp_path: Path) -> None:
    again: list[Result] = [
        ({"clipping": 0.1, "batch_size": 64, "seed": 1000 + s}, 10.0, "finished") for s in (0, 1)
    ]
    parent = store.fill("clipping_vs_batch_size", [*CELLS, *again])
    tracker = Tracker(store.uri, str(tmp_path), "clipping_vs_batch_size")
    tracker.add_text(parent, json.dumps({BASELINE: ["0009"], "other": ["0010"]}), RECORD)
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert "the best clipping (0.1) 97.0 %" in text
    assert "other: 10.00 (1) seeds" in text


def test_each_cell_stands_in_it_once(store: Store, tmp_path: Path) -> None:
    store.fill("clipping_vs_batch_size", CELLS)
    # The same cells again, as another grid may have tried them before.
    store.fill("clipping_vs_batch_size", [(settings, 0, "failed") for settings, _, _ in CELLS])
    markdown, _ = write_report(store.uri, tmp_path / "report")
    table = pd.read_parquet(tmp_path / "report/tables/clipping_vs_batch_size.parquet")
    assert table.seeds.tolist() == [2] * 4
    assert table.unfinished.tolist() == [0] * 4
    assert "the best clipping (0.1) 97.0 %" in markdown.read_text()


def test_other_configurations_have_their_own_section(store: Store, tmp_path: Path) -> None:
    longer = [({**settings, "epochs": 80}, 50.0, outcome) for settings, _, outcome in CELLS[:3]]
    store.fill("clipping_vs_batch_size", [*CELLS, *longer])
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert text.count("### dm_nf_resnet_digits on digits") == 2
    assert "8 runs" in text
    assert "3 runs; not nflab's defaults: epochs 80" in text


def test_a_sweep_of_300_trials_is_one_small_page(store: Store, tmp_path: Path) -> None:
    trials: list[Result] = [
        ({"clipping": 0.01 + n / 600, "batch_size": 2 ** (4 + n % 4)}, n / 3, "finished")
        for n in range(300)
    ]
    store.fill("agc_sweep", trials, kind="trial")
    _, page = write_report(store.uri, tmp_path / "report")
    text = page.read_text()
    told = Page(text)
    assert told.rows > 300
    assert told.folded == 1
    assert len(text) < 500_000
    assert "best on validation: clipping 0.508" in text


def test_a_sweep_tells_what_it_searched_and_with_what_another_begins(
    store: Store, tmp_path: Path
) -> None:
    config = replace(SweepConfig(), search=("base_learning_rate=0.05..1.6:log", "mixup"))
    rate = 0.12345678901234567
    trials: list[Result] = [
        ({"base_learning_rate": rate, "mixup": True}, 93.0, "finished"),
        ({"base_learning_rate": 1.5, "mixup": False}, 0.0, "diverged"),
    ]
    parent = store.fill("sweep", trials, kind="trial")
    Tracker(store.uri, str(tmp_path), "sweep").add_text(parent, to_json(config), "config.json")
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert "searched: base learning rate 0.05 to 1.6; mixup False, True" in text
    assert "best on validation: base learning rate 0.123, mixup True: 93.00 %" in text
    (begin,) = re.findall(r"another sweep begins with it by `--try (.*?)`", text)
    assert tried([begin], scales_of(config)) == [{"base_learning_rate": rate, "mixup": True}]
    assert list(pd.read_parquet(tmp_path / "report/tables/sweep-g.parquet"))[:2] == [
        "base_learning_rate",
        "mixup",
    ]


def test_a_sweep_of_several_aims_without_a_result_of_each_is_told(
    store: Store, tmp_path: Path
) -> None:
    config = replace(SweepConfig(), search=("mixup",), objectives=("val_top1", "cost_usd"))
    parent = store.fill("sweep", [({"mixup": True}, 93.0, "finished")], kind="trial")
    Tracker(store.uri, str(tmp_path), "sweep").add_text(parent, to_json(config), "config.json")
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert "training cost (USD) (minimized); the front has 0 of the trials that finished" in text


def test_a_sweep_whose_ranges_are_gone_still_tells_what_it_searched(
    store: Store, tmp_path: Path
) -> None:
    """As where a recipe of one's own has changed since."""
    parent = store.fill("sweep", [({"base_learning_rate": 0.5}, 93.0, "finished")], kind="trial")
    searched = Param("base_learning_rate", "searched: 0.05 to 1.6")
    MlflowClient(store.uri).log_batch(parent, params=[searched])
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert "best on validation: base learning rate 0.5: 93.00 %" in text
    assert "`--try base_learning_rate=0.5`" in text


def test_finals_are_read_from_mlflow(store: Store, tmp_path: Path) -> None:
    results: list[Result] = [
        ({"clipping": c, "seed": 1000 + s}, top1 + s, "finished")
        for c, top1 in ((0.16, 90.0), (0.3, 95.0))
        for s in range(3)
    ]
    parent = store.fill("agc_sweep", results)
    tracker = Tracker(store.uri, str(tmp_path), "agc_sweep")
    entrants = {BASELINE: ["0001", "0002", "0003"], "clipping 0.3": ["0004", "0005", "0006"]}
    tracker.add_text(parent, json.dumps(entrants), RECORD)
    text = write_report(store.uri, tmp_path / "report")[0].read_text()
    assert "seed noise of the baseline: test top-1 91.00 ± 1.00 (3) seeds" in text
    assert "clipping 0.3: 96.00 ± 1.00 (3) seeds; above the baseline +5.00 points" in text
    assert "in each of 3 seeds" in text
    # A grid that takes over results of an earlier version names their cells anew.
    client = MlflowClient(store.uri)
    for run in client.search_runs([tracker.experiment_id], "tags.cell != ''"):
        earlier = run.data.tags["cell"]
        client.set_tag(run.info.run_id, "earlier_cell", earlier)
        client.set_tag(run.info.run_id, "cell", f"{earlier}-now")
    again = write_report(store.uri, tmp_path / "again")[0].read_text()
    assert "clipping 0.3: 96.00 ± 1.00 (3) seeds; above the baseline +5.00 points" in again


def test_what_is_not_distinguishable_is_said(tmp_path: Path) -> None:
    tests = {BASELINE: (95.0, 97.0, 96.0), "a": (97.0, 96.0, 96.5), "b": (90.0, 0.0, 91.0)}
    rows = pd.DataFrame(
        {
            "cell": f"{label}{seed}",
            "seed": str(seed),
            "test_top1": top1,
            "val_top1": top1,
            "outcome": "finished" if top1 else "diverged",
        }
        for label, values in tests.items()
        for seed, top1 in enumerate(values)
    )
    entrants = {label: [f"{label}{seed}" for seed in range(3)] for label in tests}
    found = judge({**entrants, "c": entrants[BASELINE]}, rows)
    assert found.text[0].startswith("seed noise of the baseline: test top-1 96.00 ± 1.00 (3)")
    of_a = next(line for line in found.text if line.startswith("a: "))
    assert of_a.endswith("not distinguishable from none")
    assert "+0.50 points" in of_a
    table = found.table.set_index("setting")
    assert table.diverged["b"] == 1
    assert table.test_mean["c"] == table.test_mean[BASELINE] == pytest.approx(96)
    found.drawings["finalists"](tmp_path / "finals.png")


def test_ablations_are_drawn_again_from_the_table_of_their_cells(
    store: Store, tmp_path: Path
) -> None:
    store.fill("clipping_vs_batch_size", CELLS)
    store.fill("learning_rate", [({"clipping": c}, 90.0, "finished") for c in (None, 0.1)])
    store.fill("agc_sweep", [({"clipping": 0.1}, 90.0, "finished")] * 2, kind="trial")
    first, again = tmp_path / "first", tmp_path / "again"
    text = write_report(store.uri, first)[0].read_text()
    cells = pd.read_parquet(first / "cells.parquet")
    assert len(cells) == len(CELLS) + 2
    assert not {"name", "storage", "tracking_uri", "folder", "run_id"} & set(cells)
    drawn = write_report_from([first], again)[0].read_text()
    assert [line for line in drawn.splitlines() if line.startswith("- holds")] == [
        line for line in text.splitlines() if line.startswith("- holds")
    ]
    name = "clipping_vs_batch_size"
    tables = [pd.read_parquet(f / "tables" / f"{name}.parquet") for f in (first, again)]
    pd.testing.assert_frame_equal(*tables)
    figures = [(f / f"figures/{name}-{name}.png").read_bytes() for f in (first, again)]
    assert figures[0] == figures[1]
    assert "Does a network without clipping survive" in drawn
    # A cell that was trained again, and one that only the later folder has.
    later = cells[:3].assign(
        test_top1=[12.5, 13.5, float("nan")],
        cell=[cells.cell[0], "f" * 16, cells.cell[2]],
        outcome=["finished", "finished", "running"],  # the last hides no result
    )
    (tmp_path / "later").mkdir()
    later.to_parquet(tmp_path / "later" / "cells.parquet")
    write_report_from([first, tmp_path / "later"], tmp_path / "both")
    both = pd.read_parquet(tmp_path / "both" / "cells.parquet")
    assert len(both) == len(cells) + 1
    top1 = both.set_index(["experiment", "cell"]).test_top1
    assert top1[cells.experiment[0], cells.cell[0]] == 12.5
    for number in (1, 2):
        assert top1[cells.experiment[number], cells.cell[number]] == cells.test_top1[number]


@pytest.mark.parametrize(
    ("holds", "told"),
    [
        (None, "there is no cells.parquet in"),
        (b"no table", "cells.parquet is damaged"),
        (pd.DataFrame({"experiment": ["x"]}), "is no table of cells: it has no column 'model'"),
    ],
)
def test_what_is_no_table_of_cells_is_said(holds: Any, told: str, tmp_path: Path) -> None:
    file = tmp_path / "cells.parquet"
    if isinstance(holds, bytes):
        file.write_bytes(holds)
    elif holds is not None:
        holds.to_parquet(file)
    with pytest.raises(ConfigError, match=told):
        write_report_from([tmp_path], tmp_path / "again")


def test_the_best_clipping_is_read_from_cells_that_differ_in_nothing_else(store: Store) -> None:
    config = replace(LearningRateConfig(), tracking_uri=store.uri)
    with pytest.raises(ConfigError, match="batch 16 and 64 is not recorded: run experiments/clip"):
        best_clippings(config, (16, 64))
    fingerprint = load_dataset(Config()).fingerprint
    results: list[Result] = [
        ({"clipping": c, "batch_size": b, "epochs": epochs}, top1, "finished")
        for epochs, shift in ((40, 0.0), (80, 0.2))
        for b in (16, 64)
        for c, top1 in ((None, 99.0), (0.1, 90 + b * (0.1 + shift)), (0.3, 99 - b * (0.1 + shift)))
    ]
    store.fill("clipping_vs_batch_size", results)
    client = MlflowClient(store.uri)
    experiment = client.get_experiment_by_name("clipping_vs_batch_size")
    for run in client.search_runs([experiment.experiment_id], "tags.cell != ''"):
        client.set_tag(run.info.run_id, "dataset_fingerprint", fingerprint)
    assert best_clippings(config, (16, 64)) == (0.3, 0.1)
    assert best_clippings(config, (64,)) == (0.1,)
    # Of a setting that nothing reads it does not matter what it says.
    assert best_clippings(replace(config, augmentation_layers=2), (64,)) == (0.1,)
    assert best_clippings(replace(config, epochs=80), (16,)) == (0.1,)
    with pytest.raises(ConfigError, match="batch 128 is not recorded"):
        best_clippings(config, (16, 128))
    with pytest.raises(ConfigError, match="batch 16 is not recorded"):
        best_clippings(replace(config, momentum=0.5), (16,))


def test_where_it_cannot_be_written_is_said(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(store.uri, tmp_path / "file")


def test_an_empty_store_is_said(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs of nflab"):
        write_report(store.uri, tmp_path / "report")


class Finals:
    """A grid that runs nothing: a cell's test top-1 is 50 more than its clipping in percent."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []

    def ids(self, base: Config, cells: list[dict[str, Any]]) -> list[str]:
        return [Cell(replace(base, **settings)).id for settings in cells]

    def attach(self, name: str, text: str) -> None:
        self.files[name] = text

    def attached(self, name: str) -> str | None:
        return self.files.get(name)

    def record_seeds(self) -> None:
        pass

    def run(self, base: Config, cells: list[dict[str, Any]], prefix: str) -> pd.DataFrame:
        assert prefix == "finals "
        # What finals are is known before they are run.
        told = json.loads(self.files[RECORD]).values()
        assert set(self.ids(base, cells)) <= {cell for entrant in told for cell in entrant}
        self.asked = cells
        configs = [replace(base, **settings) for settings in cells]
        return pd.DataFrame(
            {
                "cell": Cell(config).id,
                "seed": str(config.run.seed),
                "outcome": "finished",
                "val_top1": 50.0,
                "test_top1": 50 + 100 * (config.optimizer.clipping or 0) + config.run.seed % 2,
            }
            for config in configs
        )


def test_each_finalist_is_compared_once_and_never_with_itself() -> None:
    grid: Any = Finals()
    usual = Config().optimizer.clipping
    best = [{"clipping": c} for c in (usual, 0.12345, 0.12349, 0.12345)]
    found = run_finals(grid, Config(), best, FinalsConfig(finalists=4, final_seeds=2))
    assert found.text[0].startswith("the baseline itself is among the best: clipping")
    assert len(grid.asked) == 6  # the baseline and two others
    first = json.loads(grid.files[RECORD])
    assert [len(cells) for cells in first.values()] == [2, 2, 2, 0]
    assert len(found.table) == 3

    again = run_finals(grid, Config(), [{"clipping": 0.5}], FinalsConfig(1, 2))
    record = json.loads(grid.files[RECORD])
    others = {cell for label, cells in first.items() if label != BASELINE for cell in cells}
    assert set(record[EARLIER]) == others
    assert len(again.table) == 2
