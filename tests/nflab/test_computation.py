"""What a run computes, and what its checkpoints say of it."""

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from nflab.cluster.placement import Placement
from nflab.data import _load
from nflab.learning.computation import OtherComputation, computed, differences, digest
from nflab.learning.loop import train
from nflab.learning.provenance import code_fingerprint, software
from nflab.learning.worker import Worker
from nflab.recording.provenance import software_tags
from nflab.recording.run_record import RunRecord
from nflab.running.mailbox import Listener, mailbox
from nflab.running.tuner import Failures, run_trials
from nflab.running.worker_group import TrainingFailedError, first_error, fit
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import flat, replace
from nflab.settings.recipes import RECIPES
from nflab.storage.checkpoints import Checkpoints
from nflab.studies.cells import Cell, rows_of
from nflab.terminal.interrupts import raise_on_interrupt
from nflab.terminal.progress import SweepProgress, TrainingProgress
from tests.conftest import ROOT
from tests.nflab.test_grid import Store
from tests.nflab.test_loop import Reports, run
from tests.photos import write_photos

SMALL = replace(RECIPES["digits"].config, epochs=2, batch_size=64, seed=3, clipping=0.16)

NOT_COUNTED = {
    "name",
    "tracking_uri",
    "storage",
    "recipe",
    "diagnostics",
    "profile",
    "num_workers",
    "micro_batch_size",
    "loaders",
    "augment_on",
    "checkpoint_minutes",
    "deterministic",
    "gpus_per_worker",
    "placement",
}
"""Settings on which no result depends."""

OTHERS: dict[str, Any] = {
    "model": "preact_resnet_digits",
    "drop_rate": 0.1,
    "stochdepth_rate": 0.1,
    "pretrained": "hub",
    "frozen": ("stem",),
    "dataset": "digits:0-4",
    "image_size": 24,
    "bad_images": "skip",
    "subset": 0.5,
    "augmentation_level": 1,
    "augmentation_layers": 3,
    "mixup": True,
    "cutmix": True,
    "partners": "fresh",
    "batch_size": 16,
    "clipping": 0.01,
    "unclipped": (),
    "base_learning_rate": 0.2,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "ema_decay": None,
    "sam_rho": 0.05,
    "sam_fraction": 0.5,
    "epochs": 3,
    "warmup_epochs": 0.0,
    "precision": "bfloat16",
    "channels_last": True,
    "compile": True,
    "num_workers": 2,
    "micro_batch_size": 4,
    "augment_on": "device",
    "deterministic": True,
    "loaders": 1,
    "checkpoint_minutes": 1.0,
    "gpus_per_worker": 1.0,
    "placement": "spread",
    "recipe": "finetune",
    "seed": 1,
    "diagnostics": True,
    "profile": 2,
    "name": "x",
    "tracking_uri": "y",
    "storage": "z",
}
"""Another value of each setting."""

READ_WITH: dict[str, dict[str, Any]] = {
    "augmentation_layers": {"augmentation_level": 1},
    "sam_fraction": {"sam_rho": 0.05},
    "partners": {"cutmix": True},
    "mixup": {"cutmix": True},
    "cutmix": {"mixup": True},
}
"""What it takes for a setting to count."""

ALL_PARTS = ("head", "final_conv", "stage2", "stem", "stage1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1d810fae4241bc97"),
        (
            {
                "epochs": 2,
                "batch_size": 96,
                "seed": 3,
                "dataset": "digits:0-4",
                "frozen": ("stem",),
                "clipping": None,
            },
            "66adde8687f99096",
        ),
    ],
)
def test_the_digest_is_that_of_cells_that_were_recorded_before(
    changes: dict[str, Any], expected: str
) -> None:
    config = replace(Config(), **changes)
    assert digest(config) == Cell(config).id == expected


def test_every_setting_is_tried() -> None:
    assert OTHERS.keys() == flat(Config()).keys()


@pytest.mark.parametrize("name", OTHERS)
def test_the_digest_changes_with_what_counts_and_with_nothing_else(name: str) -> None:
    base = replace(Config(), **READ_WITH.get(name, {}))
    other = replace(base, **{name: OTHERS[name]})
    changed = digest(other) != digest(base)
    assert changed == (name not in NOT_COUNTED)
    assert len(differences(computed(base), computed(other))) == changed


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"augmentation_layers": 3}),
    ({}, {"sam_fraction": 0.5}),
    ({}, {"partners": "fresh"}),
    ({"clipping": None}, {"clipping": None, "unclipped": ()}),
    ({"unclipped": ("stem", "stage1", "stage2", "final_conv", "head")}, {"unclipped": ALL_PARTS}),
    ({"frozen": ("stem", "stage1")}, {"frozen": ("stage1", "stem", "stem")}),
    ({"weight_decay": 0.0}, {"weight_decay": 0}),
    ({"clipping": 1.0}, {"clipping": 1}),
]
"""Settings that compute the same."""


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_computes_the_same_is_one_cell(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = (replace(Config(), **settings) for settings in (one, other))
    assert Cell(first).id == Cell(second).id
    assert differences(computed(first), computed(second)) == []


def test_a_result_that_was_recorded_as_another_cell_is_found() -> None:
    """As earlier versions named those of the recipe of digits, with two layers at level 0."""
    cells = [Cell(replace(Config(), augmentation_layers=2, clipping=c)) for c in (0.01, 0.02)]
    assert cells[0].earlier_id != cells[0].id
    runs = pd.DataFrame(
        {"cell": [cells[0].earlier_id, "other"], "outcome": "finished", "run_id": ["a", "b"]}
    )
    found = rows_of(cells, runs)
    assert found.cell.tolist() == [cell.id for cell in cells]
    assert found.outcome.tolist() == ["finished", "missing"]


def test_a_checkpoint_that_was_written_otherwise_is_gone_on_from(stopped: Path) -> None:
    file = stopped / "epoch-000001" / "made_by.json"
    said = json.loads(file.read_text())
    said["computed"] |= {"augmentation_layers": 2, "unclipped": ["head", "head"]}
    file.write_text(json.dumps(said))
    assert len(run(SMALL, stopped).metrics) == 2


def test_differences_are_words() -> None:
    a = computed(Config())
    b = computed(replace(Config(), clipping=0.01, frozen=("stem", "stage1"), dataset="digits:0-4"))
    said = ["frozen none -> stem stage1", "the dataset's contents", "clipping 0.16 -> 0.01"]
    assert differences(a, b) == said
    assert differences(a, json.loads(json.dumps(a))) == []
    assert differences({"pretrained": None}, {"pretrained": "ab"}) == ["pretrained none -> given"]
    weights = differences({"pretrained": "ab"}, {"pretrained": "cd"})
    assert weights == ["the pre-trained weights' contents"]


def test_the_fingerprint_of_the_code_is_of_both_packages() -> None:
    whole = b""
    for folder in (ROOT / "platform" / "nflab", ROOT / "nfnet"):
        for path in sorted(folder.rglob("*.py")):
            whole += str(path.relative_to(folder)).encode() + path.read_bytes()
    assert code_fingerprint() == hashlib.sha256(whole).hexdigest()[:16]
    assert software_tags()["code_fingerprint"] == code_fingerprint()
    assert software() == {"code_fingerprint": code_fingerprint(), "torch": torch.__version__}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the checkpoints of SMALL after each epoch, called by its number."""
    folder = tmp_path_factory.mktemp("trained")
    run(SMALL, folder / "run", copies=folder / "copies")
    return folder / "copies"


@pytest.fixture
def stopped(trained: Path, tmp_path: Path) -> Path:
    """A copy of those after the first epoch, to edit."""
    copy = Path(shutil.copytree(trained / "1", tmp_path / "stopped"))
    unseal(copy)
    return copy


def unseal(checkpoints: Path) -> None:
    """Lets checkpoints not say any more what was written, for they are edited."""
    for mark in checkpoints.glob("*/complete"):
        mark.write_bytes(b"")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(checkpoints: Path, **changes: str) -> None:
    """Lets the last checkpoint say that it was made by other software."""
    file = max(checkpoints.glob("epoch-*")) / "made_by.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    unseal(checkpoints)


def test_a_checkpoint_says_what_it_is_of(stopped: Path) -> None:
    said = json.loads((stopped / "epoch-000001" / "made_by.json").read_text())
    expected = json.loads(json.dumps(computed(SMALL)))
    assert said == {"digest": digest(SMALL), "computed": expected, **software()}


def test_a_checkpoint_of_another_configuration_is_refused_and_left_as_it_is(stopped: Path) -> None:
    before, reports = contents(stopped), Reports(stopped)
    other = replace(SMALL, clipping=0.01, batch_size=16, num_workers=2)
    with pytest.raises(ConfigError) as caught:
        train(other, Worker(report=reports, checkpoints=Checkpoints(str(stopped))))
    assert isinstance(caught.value, OtherComputation)
    assert str(caught.value) == (
        "the checkpoint of epoch 1 is of another computation than this run (batch_size 64 -> 16, "
        "clipping 0.16 -> 0.01): go on from it with what it was made with, or start anew under "
        "another name"
    )
    assert contents(stopped) == before
    assert reports.metrics == []


def test_a_checkpoint_of_another_model_is_refused_before_it_is_loaded(stopped: Path) -> None:
    with pytest.raises(OtherComputation, match="model dm_nf_resnet_digits -> preact_resnet_digits"):
        run(replace(SMALL, model="preact_resnet_digits"), stopped)


def test_a_run_goes_on_without_a_remark_elsewhere(stopped: Path) -> None:
    moved = replace(SMALL, name="x", storage="y", recipe="finetune", micro_batch_size=16)
    reports = run(moved, stopped)
    assert [m["epoch"] for m in reports.metrics] == [1, 2]
    assert not any("remark" in m for m in reports.metrics)


def test_a_checkpoint_from_before_a_setting_was_made_has_its_default(stopped: Path) -> None:
    file = stopped / "epoch-000001" / "made_by.json"
    said = json.loads(file.read_text())
    assert said["computed"].pop("sam_rho") is None
    file.write_text(json.dumps({**said, "digest": "0" * 16}))
    with pytest.raises(OtherComputation, match=r"\(sam_rho none -> 0.05\)"):
        run(replace(SMALL, sam_rho=0.05), stopped)
    assert len(run(SMALL, stopped).metrics) == 2


def test_an_older_checkpoint_is_compared_by_its_configuration(stopped: Path) -> None:
    checkpoint = stopped / "epoch-000001"
    (checkpoint / "made_by.json").unlink()
    with pytest.raises(OtherComputation, match=r"\(clipping 0.16 -> 0.01\)"):
        run(replace(SMALL, clipping=0.01), stopped)
    first, second = run(replace(SMALL, micro_batch_size=16), stopped).metrics
    told = "continues after epoch 1 with other code: its checkpoint does not say which"
    assert first["remark"] == told
    assert "remark" not in second


def test_one_without_a_configuration_is_gone_on_from(stopped: Path) -> None:
    for file in ("made_by.json", "config.json"):
        (stopped / "epoch-000001" / file).unlink()
    assert [m["epoch"] for m in run(SMALL, stopped).metrics] == [1, 2]


@pytest.mark.parametrize("said", [b"\x80\x04", b"{", b"[]", b"{}", b'{"digest": 1}'])
def test_a_checkpoint_that_says_nothing_sound_of_itself_is_refused(
    stopped: Path, said: bytes
) -> None:
    (stopped / "epoch-000001" / "made_by.json").write_bytes(said)
    with pytest.raises(ConfigError, match=r"^made_by.json of the last checkpoint is damaged"):
        run(SMALL, stopped)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"code_fingerprint": "ab12"}, "other code (ab12 -> {code_fingerprint})"),
        ({"torch": "1.2"}, "torch 1.2 -> {torch}"),
        (
            {"code_fingerprint": "ab12", "torch": "1.2"},
            "other code (ab12 -> {code_fingerprint}) and torch 1.2 -> {torch}",
        ),
    ],
)
def test_other_software_goes_on_and_says_so_once(
    stopped: Path, changes: dict[str, str], told: str
) -> None:
    edit(stopped, **changes)
    first, second = run(SMALL, stopped).metrics
    assert first["remark"] == f"continues after epoch 1 with {told.format(**software())}"
    assert "remark" not in second
    # Neither its own checkpoint nor those that follow say it again.
    assert not any("remark" in m for m in run(SMALL, stopped).metrics)
    state = torch.load(stopped / "epoch-000002" / "state.pt", weights_only=True)
    assert not any("remark" in m for m in state["history"])


def test_a_finished_run_has_nothing_that_other_code_could_compute(
    trained: Path, tmp_path: Path
) -> None:
    finished = Path(shutil.copytree(trained / "2", tmp_path / "finished"))
    edit(finished, code_fingerprint="ab12")
    assert not any("remark" in m for m in run(SMALL, finished).metrics)


def test_a_remark_is_a_tag_of_the_run_and_no_metric(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run_id = store.tracker.start("a", {})
    record = RunRecord(store.outbox, run_id, Config(), epoch=1)
    report = {"epoch": 1, "val_top1": 50.0, "outcome": "running"}
    record.report({**report, "remark": "continues"})
    record.report({**report, "epoch": 2})
    store.outbox.drain()
    data = MlflowClient(store.tracker.uri).get_run(run_id).data
    assert data.tags["continued_with"] == "continues"
    assert data.metrics == {"epoch": 2.0, "val_top1": 50.0}


def test_a_person_sees_a_remark_once(capsys: pytest.CaptureFixture[str]) -> None:
    training, sweep = TrainingProgress(2), SweepProgress(3, 0, 2, "cell")
    sweep.started(2, {})
    for _ in range(2):
        training.reported({"epoch": 0, "remark": "continues after epoch 0 with x"})
        sweep.reported(2, 1, 50.0, "continues after epoch 1 with x")
    assert capsys.readouterr().out.splitlines() == [
        "continues after epoch 0 with x",
        "cell 2 continues after epoch 1 with x",
    ]


def test_a_dataset_is_known_by_its_contents_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos", {"train": 20, "val": 5})
    config = replace(SMALL, dataset=str(photos), image_size=24, batch_size=18, loaders=0)
    run(config, tmp_path / "run", copies=tmp_path / "copies")
    stopped = tmp_path / "copies" / "1"
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    image = moved / "train" / "china" / "003.jpg"
    whole = image.read_bytes()
    shutil.copy(moved / "train" / "china" / "004.jpg", image)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OtherComputation, match=r"epoch 1 .* \(the dataset's contents\)"):
        run(replace(config, dataset="moved"), stopped)
    image.write_bytes(whole)
    _load.cache_clear()  # as in a new process
    assert digest(replace(config, dataset="moved")) == digest(config)
    assert not any("remark" in m for m in run(replace(config, dataset="moved"), stopped).metrics)


def test_pretrained_weights_are_known_by_their_contents_wherever_they_are(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, epoch in (("a.pt", "1"), ("b.pt", "2")):
        shutil.copy(trained / epoch / f"epoch-00000{epoch}" / "weights.pt", tmp_path / name)
    config = replace(SMALL, pretrained=str(tmp_path / "a.pt"))
    (tmp_path / "run").mkdir()  # for a copy of what there is before the first epoch
    run(config, tmp_path / "run", copies=tmp_path / "copies")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OtherComputation, match=r"\(the pre-trained weights' contents\)"):
        run(replace(config, pretrained="b.pt"), tmp_path / "copies" / "1")
    (tmp_path / "a.pt").rename(tmp_path / "c.pt")
    reports = run(replace(config, pretrained="c.pt"), tmp_path / "copies" / "1")
    assert [m["epoch"] for m in reports.metrics] == [0, 1, 2]


def test_a_worker_that_refuses_is_the_runs_own_failure(
    stopped: Path, tmp_path: Path, ray_address: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder / "checkpoints")
    config = replace(SMALL, clipping=0.01, num_workers=2)
    with pytest.raises(TrainingFailedError) as caught:
        fit(config, Placement(2, 0.5, 0.0, 1), str(folder), Listener(mailbox()))
    first = first_error(caught.value)
    assert first is not None and "(clipping 0.16 -> 0.01)" in first.text
    logs = [file.read_text() for file in (folder / "logs").glob("rank-*.log")]
    # The second may be ended before it has come so far.
    assert any("OtherComputation: the checkpoint of epoch 1" in log for log in logs)
    assert Checkpoints.of_run(str(folder)).last_mark() == (1, 0)


def test_three_failures_in_a_row_of_one_cause_end_the_work(
    stopped: Path, tmp_path: Path, ray_address: str
) -> None:
    raise_on_interrupt()
    store = Store(tmp_path)
    cells = [{"clipping": 0.02, "seed": seed} for seed in range(6)]
    ledger = store.open(cells, **flat(SMALL))
    for _ in cells:
        proposal = ledger.propose()
        ledger.started(proposal)
        shutil.copytree(stopped, Path(proposal.folder) / "checkpoints")
    ledger.release()
    cause = run_trials(SMALL, Placement(1, 1.0, 0.0, 1), ledger, SweepProgress(6, 0, 6, "cell"))
    assert cause is not None
    assert cause.startswith("nflab.learning.computation.OtherComputation: the checkpoint of epoch")
    ledger.release()
    assert store.cells().outcome.tolist() == ["failed"] * 3 + ["interrupted"] * 3
    assert ledger.missing == 6  # a grid that is asked for again trains what failed


def test_what_counts_as_one_cause() -> None:
    def cause(*errors: str | None) -> str | None:
        failures = Failures()
        for error in errors:
            failures.ended(error)
        return failures.cause

    full = "Traceback\n  File x\nOSError: [Errno 28] No space left: 'trials/000{}/state.pt'"
    assert cause(full.format(1), full.format(2), full.format(3)) == full.format(3).split("\n")[-1]
    assert cause(full.format(1), full.format(2), None, full.format(3)) is None
    assert cause(full.format(1), "ValueError: x", full.format(2)) is None
    assert cause(*["CUDA out of memory. Tried to allocate 2 GiB"] * 4) is None


def test_cells_fail_on_another_checkpoint_and_go_on_with_other_software(
    stopped: Path, tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_on_interrupt()
    store = Store(tmp_path)
    cells: list[dict[str, Any]] = [{"clipping": 0.01}, {"clipping": 0.16}]
    ledger = store.open(cells, **flat(SMALL))
    edit(stopped, torch="1.2")
    for _ in cells:
        proposal = ledger.propose()
        ledger.started(proposal)
        shutil.copytree(stopped, Path(proposal.folder) / "checkpoints")
    ledger.release()
    run_trials(SMALL, Placement(1, 1.0, 0.0, 1), ledger, SweepProgress(2, 0, 2, "cell"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not Tune's
    told = f"continues after epoch 1 with torch 1.2 -> {torch.__version__}"
    refused, went_on = (MlflowClient(store.tracker.uri).get_run(i) for i in store.cells().run_id)
    assert (refused.data.tags["outcome"], refused.info.status) == ("failed", "FAILED")
    assert "is of another computation than this run (clipping" in refused.data.tags["error"]
    assert went_on.data.tags["outcome"] == "finished"
    assert went_on.data.tags["continued_with"] == told
    assert capsys.readouterr().out.count(f"cell 2 {told}") == 1
