"""The ledger against the real study and the real MLflow store, without Ray."""

import math
import random
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from nflab.analysis.ranking import ranked
from nflab.recording.outbox import Outbox
from nflab.recording.tracker import Tracker
from nflab.running.ledger import Proposal
from nflab.searching.importances import importances
from nflab.searching.study import StudyFile
from nflab.searching.trial_ledger import TrialLedger, first_rung
from nflab.settings.leaves import as_text, replace
from nflab.settings.recipes import scales_of
from nflab.settings.studies import SweepConfig
from nflab.storage import files
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.run_folder import Identity
from nflab.terminal.command_line import parse
from tests.faults.stores import STATES

pytestmark = pytest.mark.slow

CONFIG = replace(
    SweepConfig(), name="sweep", epochs=8, warmup_epochs=1.0, trials=6, seed=3, lookahead=1
)
WIDE = replace(CONFIG, lookahead=4)
"""Of which several trials run at once."""

SAMPLES = 1024
IDENTITY = Identity("5" * 32, "sweep", "test")


class Stores:
    """A study and an MLflow store in a temporary folder, opened as often as asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"sqlite:///{folder}/study.db"
        self.tracker = Tracker(f"sqlite:///{folder}/mlflow.db", str(folder), "test")
        self.parent = self.tracker.start("sweep", {})
        self.outbox = Outbox(self.tracker, folder / "unsent")

    def open(self, config: SweepConfig = CONFIG, retry_failed: bool = False) -> TrialLedger:
        """A ledger of a new process."""
        self.outbox.close()
        self.outbox = Outbox(self.tracker, self.folder / "unsent")
        return TrialLedger(
            config,
            IDENTITY,
            str(self.folder),
            self.folder / "study.db",
            self.tracker,
            self.outbox,
            self.parent,
            {"git_commit": "x"},
            SAMPLES,
            retry_failed=retry_failed,
        )

    def trials(self) -> list[FrozenTrial]:
        return optuna.load_study(study_name="sweep", storage=self.url).trials

    def runs(self) -> dict[int, Run]:
        self.outbox.drain()
        client = MlflowClient(self.tracker.uri)
        trials = self.tracker.trials(self.parent)
        return {row.number: client.get_run(row.run_id) for row in trials.itertuples()}

    def agree(self) -> None:
        """Study and MLflow say the same of every trial."""
        runs = self.runs()
        for trial in self.trials():
            run = runs[trial.number + 1]
            assert STATES[run.data.tags["outcome"]] == (trial.state, run.info.status)
            epochs = MlflowClient(self.tracker.uri).get_metric_history(run.info.run_id, "val_top1")
            recorded = {point.step * SAMPLES: point.value for point in epochs}
            if run.data.tags["outcome"] != "diverged":
                assert recorded == trial.intermediate_values


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    return Stores(tmp_path)


def epoch(number: int, top1: float, outcome: str = "running") -> dict[str, Any]:
    return {
        "epoch": number,
        "samples_seen": number * SAMPLES,
        "val_top1": top1,
        "train_loss": 1 / number,
        "outcome": outcome,
        "config": {"not": "a metric"},
    }


def begin(ledger: TrialLedger) -> Proposal:
    proposal = ledger.propose()
    ledger.started(proposal)
    return proposal


def finish(ledger: TrialLedger, top1: float) -> Proposal:
    proposal = begin(ledger)
    for e in range(1, 8):
        assert not ledger.reported(proposal.number, epoch(e, top1))
    assert not ledger.reported(proposal.number, epoch(8, top1, "finished"))
    ledger.ended(proposal.number, "finished", {"epoch": 8, "val_top1": top1})
    return proposal


def test_a_trial_that_is_cut_is_pruned_with_its_values(stores: Stores) -> None:
    ledger = stores.open()
    finish(ledger, 90)
    number = begin(ledger).number
    # Rungs lie at 2 epochs (a quarter of 8, past the warm-up) and 6.
    assert not ledger.reported(number, epoch(1, 10))
    assert ledger.reported(number, epoch(2, 11)) == "rung 1: 11.0 % against 90.0 %"
    ledger.ended(number, "pruned", {"val_top1": 11})
    trial = stores.trials()[1]
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {SAMPLES: 10, 2 * SAMPLES: 11}
    stores.agree()
    assert ledger.missing == 4
    assert ledger.best == stores.open().best == 90


def test_no_trial_is_cut_before_the_warm_up_is_over(stores: Stores) -> None:
    ledger = stores.open(replace(CONFIG, warmup_epochs=5.0))
    finish(ledger, 90)
    number = begin(ledger).number
    assert [bool(ledger.reported(number, epoch(e, 1))) for e in range(1, 7)] == [False] * 5 + [True]


@pytest.mark.parametrize("why", ["diverged", "out of memory"])
def test_what_cannot_be_trained_tells_the_sampler_to_avoid_it(stores: Stores, why: str) -> None:
    ledger = stores.open()
    number = begin(ledger).number
    if why == "diverged":
        ledger.reported(number, epoch(1, 0.0, "diverged") | {"train_loss": float("nan")})
        ledger.ended(number, "diverged", {"val_top1": 0.0})
    else:
        ledger.ended(number, "failed", {}, "CUDA error: out of memory")
    trial = stores.trials()[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0)
    assert trial.constraints == {"infeasible": 1.0}
    assert stores.runs()[1].data.tags["outcome"] == ("diverged" if why == "diverged" else "failed")


def test_what_an_interrupted_end_has_written_does_not_stay(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory on one machine, killed as that was told, and finished on a larger one."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    ledger = stores.open()
    first = begin(ledger)
    with monkeypatch.context() as patched:
        patched.setattr("optuna.Study.tell", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.ended(first.number, "failed", {}, "CUDA error: out of memory")
    again = stores.open()
    assert finish(again, 90) == first
    assert stores.trials()[0].constraints == {"infeasible": 0.0}
    assert again.best == 90
    stores.agree()


def test_of_two_equal_trials_the_lower_number_is_best_whichever_began_first(
    stores: Stores, tmp_path: Path
) -> None:
    ledger = stores.open(WIDE)
    first, second = ledger.propose(), ledger.propose()
    content = tmp_path / "content"
    content.mkdir()
    for proposal in (second, first):
        ledger.started(proposal)
        Checkpoints.of_run(proposal.folder).save(content, 8)
        ledger.reported(proposal.number, epoch(8, 90, "finished"))
    for proposal in (second, first):
        ledger.ended(proposal.number, "finished", {"val_top1": 90})
    stores.outbox.drain()
    trials = stores.tracker.trials(stores.parent)
    assert trials.number.tolist() == [2, 1]  # in the order of their start
    assert ranked(trials, "number").number.tolist() == [1, 2]
    kept = [Checkpoints.of_run(proposal.folder).last_mark() for proposal in (first, second)]
    assert kept == [(8, 0), None]


def test_a_failed_trial_is_recorded_with_its_error(stores: Stores) -> None:
    ledger = stores.open()
    number = begin(ledger).number
    ledger.ended(number, "failed", {}, "Traceback\nValueError: 7 is odd")
    assert stores.trials()[0].state == TrialState.FAIL
    assert "7 is odd" in stores.runs()[1].data.tags["error"]
    stores.agree()


def test_released_trials_wait_and_are_proposed_again_as_they_were(stores: Stores) -> None:
    ledger = stores.open(WIDE)
    finish(ledger, 80)
    first, second = begin(ledger), begin(ledger)
    for e in (1, 2, 3):
        ledger.reported(first.number, epoch(e, 85))
    ledger.release()
    stores.agree()
    again = stores.open(WIDE)
    assert again.missing == 5
    assert [begin(again), begin(again)] == [first, second]
    # A continued trial repeats the reports that led to its checkpoint.
    for e in range(1, 8):
        again.reported(first.number, epoch(e, 85))
    again.ended(first.number, "finished", {"val_top1": 85})
    again.ended(second.number, "failed", {}, "x")
    stores.agree()
    history = stores.tracker.history(stores.runs()[first.number].info.run_id, "val_top1")
    assert [step for step, _ in history] == list(range(1, 8))
    assert len(stores.runs()) == 3


def test_a_trial_that_was_to_be_cut_is_cut_when_it_goes_on(stores: Stores) -> None:
    ledger = stores.open()
    finish(ledger, 90)
    number = begin(ledger).number
    assert [bool(ledger.reported(number, epoch(e, 10))) for e in (1, 2)] == [False, True]
    again = stores.open()  # killed before the cut was carried out
    assert begin(again).number == number
    assert [bool(again.reported(number, epoch(e, 10))) for e in (1, 2)] == [False, True]


def test_a_run_that_the_study_says_has_ended_is_not_left_running(stores: Stores) -> None:
    ledger = stores.open()
    number = begin(ledger).number
    ledger.reported(number, epoch(1, 50, "finished"))
    ledger._open[number].set_user_attr("outcome", "finished")
    ledger._study.tell(ledger._open[number], 50.0)  # interrupted before MLflow knew
    ledger._tracker.start("never known", {"trial": "2"}, stores.parent)
    ledger.release()
    assert stores.runs()[number].info.status == "FINISHED"
    assert stores.runs()[2].info.status == "KILLED"


def test_a_driver_that_was_killed_leaves_what_a_new_one_needs(stores: Stores) -> None:
    """The first ledger is forgotten without a word, as kill -9 would have it."""
    lost = stores.open(WIDE)
    interrupted = begin(lost)
    lost.reported(interrupted.number, epoch(1, 50))
    proposed_only = lost.propose()  # killed before its run was made
    finish(lost, 70)
    untold = begin(lost)
    lost._open[untold.number].set_user_attr("outcome", "failed")
    lost._study.tell(lost._open[untold.number], state=TrialState.FAIL)  # killed before MLflow knew
    again = stores.open(WIDE)
    assert stores.runs()[untold.number].data.tags["outcome"] == "failed"
    assert again.missing == 4
    assert [again.propose(), again.propose()] == [interrupted, proposed_only]
    assert again.propose() is None  # the fifth waits for the first


def test_proposals_depend_on_the_seed_and_not_on_interruptions(stores: Stores) -> None:
    ledger = stores.open(WIDE)
    at_once = [ledger.propose().settings for _ in range(4)]
    (stores.folder / "other").mkdir()
    other = Stores(stores.folder / "other")
    one_by_one = [other.open(WIDE).propose().settings]
    for _ in range(3):
        reopened = other.open(WIDE)
        reopened._study.tell(reopened._study.ask(), state=TrialState.FAIL)
        one_by_one.append(reopened.propose().settings)
    assert at_once == one_by_one
    assert len({str(settings) for settings in at_once}) == 4


ONE_AIM = replace(WIDE, trials=12, epochs=6)
"""The last epoch is a rung."""

TWO_AIMS = replace(ONE_AIM, objectives=("val_top1", "val_loss"), pruner="none")


def search(
    stores: Stores, config: SweepConfig, at_once: int, chance: random.Random, kills: int = 0
) -> list[Any]:
    """What the study holds after a sweep, `at_once` trials of which run at a time and go on in no
    particular order; now and then its process is lost."""
    ledger = stores.open(config)
    moments = set(chance.sample(range(1, 60), kills))
    under_way: dict[int, tuple[Proposal, int]] = {}
    while ledger.missing:
        while len(under_way) < min(at_once, ledger.missing):
            proposal = ledger.propose()
            if proposal is None:
                break
            ledger.started(proposal)
            under_way[proposal.number] = proposal, 0
        number = chance.choice(list(under_way))
        proposal, done = under_way[number]
        settings = proposal.settings
        reached = 90 - 10 * abs(math.log(settings["clipping"] or 1, 10) + 1) ** 2
        top1 = (reached - settings["batch_size"] / 16) * (1 - 0.5 ** (done + 1))
        outcome = "finished" if done == 5 else "running"
        # Loss is least where top-1 is not best.
        result = {**epoch(done + 1, top1, outcome), "val_loss": 1 / settings["batch_size"]}
        cut = ledger.reported(number, result)
        under_way[number] = proposal, done + 1
        if moments and chance.random() < 0.1:
            moments.pop()
            ledger, under_way = stores.open(config), {}  # as after kill -9
            continue
        if cut or outcome == "finished":
            ledger.ended(number, "pruned" if cut else "finished", result)
            del under_way[number]
    return [
        (t.state, t.values, t.params, t.user_attrs, t.system_attrs, t.intermediate_values)
        for t in stores.trials()
    ]


@pytest.mark.parametrize(
    ("config", "ways"),
    [(ONE_AIM, ((1, 0), (2, 0), (4, 0), (4, 9), (1, 9))), (TWO_AIMS, ((1, 0), (4, 5)))],
)
def test_a_search_is_the_same_however_many_run_at_once_and_whatever_is_killed(
    tmp_path: Path, config: SweepConfig, ways: tuple[tuple[int, int], ...]
) -> None:
    found = []
    for number, (at_once, kills) in enumerate(ways):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(search(Stores(folder), config, at_once, random.Random(number), kills))
    first, *others = found
    assert len({str(trial[2]) for trial in first}) > 6
    pruned = {TrialState.PRUNED} if config is ONE_AIM else set()
    assert {trial[0] for trial in first} == {TrialState.COMPLETE, *pruned}
    assert {len(trial[1]) for trial in first if trial[1]} == {len(config.search.objectives)}
    for other in others:
        assert other == first


def test_a_trial_waits_for_those_before_its_window(stores: Stores) -> None:
    ledger = stores.open(WIDE)
    under_way = [ledger.propose() for _ in range(4)]
    assert ledger.propose() is None
    for proposal in under_way[1:]:
        assert proposal is not None
        ledger.started(proposal)
        ledger.ended(proposal.number, "finished", {"val_top1": 50.0})
    assert ledger.propose() is None  # the first has not ended
    first = under_way[0]
    assert first is not None
    ledger.started(first)
    ledger.ended(1, "failed", {}, "x")
    assert [getattr(ledger.propose(), "number", None) for _ in range(5)] == [5, 6, 7, 8, None]


def test_a_configuration_proposed_again_runs_with_the_next_seed(stores: Stores) -> None:
    ledger = stores.open(replace(WIDE, searched=()))
    assert [ledger.propose().settings for _ in range(3)] == [{"seed": 3}, {"seed": 4}, {"seed": 5}]


def test_what_nothing_reads_beside_another_setting_is_one_of_its_own_values(
    stores: Stores,
) -> None:
    search = ("augmentation_level=0..2", "augmentation_layers=1..3", "sam_rho=none,0.02..0.1:log")
    config = replace(WIDE, search=(*search, "sam_fraction=0.3,0.5"), trials=40, lookahead=1)
    ledger, seen = stores.open(config), []
    for number in range(40):
        proposal = finish(ledger, 50 + number)
        seen.append(proposal.settings)
    off = [one for one in seen if one["augmentation_level"] == 0]
    assert off and {one["augmentation_layers"] for one in off} == {1}
    assert {one["augmentation_layers"] for one in seen} == {1, 2, 3}
    plain = [one for one in seen if one["sam_rho"] is None]
    assert plain and {one["sam_fraction"] for one in plain} == {0.3}
    assert {one["sam_fraction"] for one in seen} == {0.3, 0.5}
    # Nothing else distinguishes those, so what is proposed twice gets another seed.
    assert len({tuple(one.items()) for one in seen}) == 40
    rows = pd.DataFrame([{k: as_text(v) for k, v in one.items()} for one in seen])
    rows["val_top1"] = [50.0 + number for number in range(40)]
    assert importances(rows, scales_of(config)).keys() == scales_of(config).keys()


@pytest.mark.parametrize("sampler", ["gp", "random", "qmc"])
def test_other_samplers_repeat_too(stores: Stores, tmp_path: Path, sampler: Any) -> None:
    config = replace(WIDE, trials=8, lookahead=1, sampler=sampler, pruner="none")
    found = []
    for number, scores in enumerate(((1.0, 9.0), (1.0, 9.0), (9.0, 1.0))):
        (tmp_path / str(number)).mkdir()
        ledger = Stores(tmp_path / str(number)).open(config)
        found.append([finish(ledger, 50 + scores[n % 2] * n).settings for n in range(6)])
    assert found[0] == found[1]
    assert (found[0] == found[2]) == (sampler in ("random", "qmc"))  # it minds no results


def test_without_a_pruner_nothing_is_cut(stores: Stores) -> None:
    ledger = stores.open(replace(WIDE, lookahead=1, pruner="none"))
    finish(ledger, 90)
    poor = begin(ledger)
    assert not any(ledger.reported(poor.number, epoch(e, 10)) for e in range(1, 8))


def test_what_is_to_be_tried_comes_first_and_the_rest_is_as_ever(
    stores: Stores, tmp_path: Path
) -> None:
    search = ("clipping=0.01..0.64:log,none", "batch_size=16..128:pow2", "mixup")
    config = replace(WIDE, search=search, trials=6, lookahead=1)
    tries = ("clipping=none,batch_size=32,mixup=True", "clipping=0.16")
    (tmp_path / "other").mkdir()
    found = []
    begins = replace(config, tries=tries)
    for place, one in ((stores, config), (Stores(tmp_path / "other"), begins)):
        ledger = place.open(one)
        found.append([finish(ledger, 50 + number).settings for number in range(4)])
    plain, begun = found
    assert begun[0] == {"clipping": None, "batch_size": 32, "mixup": True, "seed": 3}
    assert begun[1]["clipping"] == pytest.approx(0.16)
    assert {**begun[1], "clipping": 0} == {**plain[1], "clipping": 0}
    assert begun[2] == plain[2]  # too few results to model


def test_no_trial_is_cut_before_the_longest_warm_up_is_over() -> None:
    given = ("--search", "warmup_epochs=0..30", "--epochs", "40")
    assert first_rung(parse(SweepConfig, given)[0]) == 31


def test_trials_that_failed_are_trained_again_under_their_numbers(stores: Stores) -> None:
    ledger = stores.open(WIDE)
    finish(ledger, 80)
    asked = []
    for error in ("OSError: the disk is gone", "CUDA out of memory", "OSError: the disk is gone"):
        asked.append(begin(ledger))
        ledger.reported(asked[-1].number, epoch(1, 50))
        ledger.ended(asked[-1].number, "failed", {}, error)
    assert (stores.open(WIDE).missing, stores.open(WIDE, retry_failed=True).missing) == (2, 5)
    ledger = stores.open(WIDE, retry_failed=False)
    assert ledger.missing == 5  # whoever goes on later need not ask again
    stores.agree()
    assert [ledger.propose() for _ in asked] == asked
    for proposal in asked:
        ledger.started(proposal)
        for e in range(1, 8):
            ledger.reported(proposal.number, epoch(e, 50))
        ledger.reported(proposal.number, epoch(8, 60, "finished"))
        ledger.ended(proposal.number, "finished", {"val_top1": 60})
    stores.agree()
    assert [trial.value for trial in stores.trials()] == [80, 60, 60, 60]
    assert {trial.system_attrs["constraints:infeasible"] for trial in stores.trials()} == {0.0}
    assert "error" not in stores.runs()[2].data.tags
    assert stores.open(WIDE).propose().number == 5


def test_a_study_on_a_full_disk_is_written_when_there_is_room(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = stores.open()
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.01)
    flush, commit = Session._flush, Session.commit
    writes: list[int] = []
    tries = []

    def noted(session: Session, objects: Any = None) -> None:
        writes.append(id(session))
        flush(session, objects)

    def full(session: Session) -> None:
        session.flush()
        if id(session) not in writes:  # it only reads
            return commit(session)
        writes.clear()
        tries.append(1)
        if len(tries) % 4:
            raise OperationalError("insert", {}, sqlite3.OperationalError("disk is full"))
        return commit(session)

    monkeypatch.setattr(Session, "_flush", noted)
    monkeypatch.setattr(Session, "commit", full)
    proposal = begin(ledger)
    for e in range(1, 8):
        ledger.reported(proposal.number, epoch(e, 70))
    ledger.reported(proposal.number, epoch(8, 70, "finished"))
    ledger.ended(proposal.number, "finished", {"val_top1": 70})
    monkeypatch.setattr(Session, "_flush", flush)
    monkeypatch.setattr(Session, "commit", commit)
    assert len(tries) > 20
    assert len(stores.trials()) == 1
    stores.agree()
    assert [trial.value for trial in stores.trials()] == [70]


def saved(stores: Stores, number: int) -> Checkpoints:
    """The checkpoints of a trial, of which it has one."""
    folder = stores.folder / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "x").write_text("x")
    checkpoints = Checkpoints.of_run(f"{stores.folder}/trials/{number:04d}")
    checkpoints.save(folder, 8)
    return checkpoints


def test_of_several_aims_all_on_the_front_keep_their_weights(stores: Stores) -> None:
    config = replace(TWO_AIMS, lookahead=1, objectives=("val_top1", "seconds"))
    found = [(80.0, 20.0), (90.0, 40.0), (85.0, 50.0), (60.0, 10.0), (90.0, 30.0), (80.0, 20.0)]
    kept = []
    for top1, seconds in found:
        ledger = stores.open(config)  # of another process each
        number = begin(ledger).number
        result = {**epoch(1, top1, "finished"), "seconds": seconds}
        kept.append(saved(stores, number))
        assert ledger.reported(number, result) is None
        ledger.ended(number, "finished", result)
    assert [one.last_mark() is not None for one in kept] == [True, False, False, True, True, False]
    assert ledger.best == 90
    trials = StudyFile(stores.folder / "study.db", "sweep").trials()
    assert trials[1].standing == ((-90.0, 40.0), 2)
    stores.agree()


def test_an_epoch_that_was_trained_again_counts_as_it_was_recorded(stores: Stores) -> None:
    config = replace(TWO_AIMS, lookahead=1, objectives=("val_top1", "seconds"))
    ledger = stores.open(config)
    begin(ledger)
    ledger.reported(1, {**epoch(1, 80.0, "finished"), "seconds": 13.0})
    stores.outbox.drain()
    again = stores.open(config)  # after kill -9
    begin(again)
    result = {**epoch(1, 80.0, "finished"), "seconds": 10.0}
    again.reported(1, result)
    again.ended(1, "finished", result)
    assert stores.trials()[0].values == [80.0, 13.0]
    assert stores.runs()[1].data.metrics["seconds"] == 13.0


def test_a_trial_without_one_of_its_aims_has_failed(stores: Stores) -> None:
    ledger = stores.open(replace(TWO_AIMS, objectives=("val_top1", "cost_usd")))
    for number, cost in ((1, {}), (2, {"cost_usd": math.nan})):
        begin(ledger)
        result = {**epoch(1, 50.0, "finished"), **cost}
        ledger.reported(number, result)
        told, _ = ledger.ended(number, "finished", result)
        assert told == "failed"
        stores.outbox.drain()
        assert stores.trials()[number - 1].state == TrialState.FAIL
        run = stores.runs()[number]
        assert run.data.tags["outcome"] == "failed"
        assert "cost_usd is not known, by which trials are compared" in run.data.tags["error"]
