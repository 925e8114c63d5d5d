"""What may disagree about a run that no process runs, and what can safely be done about it.

Where they contradict each other, the study is right about how a trial ended, since it is told
first; of everything else MLflow is, and the disk follows. Nothing is mended that may be the only
copy of a result.
"""

from collections.abc import Iterator
from functools import partial

from nflab.auditing.disagreement import Disagreement, count
from nflab.auditing.leftovers import leftovers, lost_checkpoints, strays
from nflab.auditing.scene import Scene, closed, number_of
from nflab.recording.archive import RecordedRun
from nflab.recording.tables import STATUS
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.serialization import from_json, to_json
from nflab.settings.studies import SweepConfig


def judge(scene: Scene) -> list[Disagreement]:
    """All that disagrees; what is mended first stands first."""
    doubts = list(identities(scene))
    if doubts:  # of which run the folder is; all else would be compared with another's
        return doubts
    rules = (
        unsent,
        rejected,
        unreadable,
        names,
        endings,
        under_way,
        missing_runs,
        missing_trials,
        epochs,
        strays,
        leftovers,
        lost_checkpoints,
        configurations,
        gone,
    )
    return [found for rule in rules for found in rule(scene)]


def unsent(scene: Scene) -> Iterator[Disagreement]:
    """Requests that MLflow never got."""
    if scene.folder.unsent:
        what = f"{count(scene.folder.unsent, 'request')} to MLflow never sent"
        if scene.experiment is None:
            cure = "resume it with the script that started it: its run.json is gone"
            yield Disagreement(scene.name, what, cure)
        else:
            yield Disagreement(scene.name, what, "sent", scene.send)


def rejected(scene: Scene) -> Iterator[Disagreement]:
    """Requests that MLflow itself refused."""
    if scene.folder.rejected:
        what = f"{count(scene.folder.rejected, 'request')} that MLflow rejected"
        yield Disagreement(
            scene.name, what, f"see {scene.folder.own}/unsent/rejected.jsonl, with the reasons"
        )


def unreadable(scene: Scene) -> Iterator[Disagreement]:
    """A study that is broken, or gone."""
    if scene.unreadable is not None:
        cure = "put a copy of study.db back, or start the sweep anew under another --name"
        yield Disagreement(scene.name, scene.unreadable, cure)
    numbers = [number for number in map(number_of, scene.children) if number is not None]
    if numbers and not scene.study.exists and scene.folder.exists:
        what = f"MLflow has {count(len(numbers), 'trial')}, and the study is gone"
        cure = f"put {scene.folder.own}/study.db back: without it the sweep cannot be resumed"
        yield Disagreement(scene.name, what, cure)


def identities(scene: Scene) -> Iterator[Disagreement]:
    """Folders of which it cannot be told which run they hold, or that hold another one."""
    identity = scene.folder.identity
    if scene.folder.damage is not None:
        yield Disagreement(scene.name, scene.folder.damage, "put it back")
    if identity is None:
        return
    if identity.name != scene.name:
        what = f"its folder holds the run {identity.name!r}, copied or renamed"
        yield Disagreement(scene.name, what, f"rename it to {identity.name}, or delete it")
    elif scene.root is not None and scene.root.tags.get("record") != identity.id:
        what = f"MLflow's run of this name, {scene.root.run_id}, is not that of its folder"
        yield Disagreement(scene.name, what, "rename one of the two, or restore the folder's own")


def names(scene: Scene) -> Iterator[Disagreement]:
    """Runs that cannot be told apart."""
    for twin in scene.roots[1:]:
        what = f"MLflow has a second run of this name, {twin.run_id}"
        yield Disagreement(scene.name, what, "rename or delete one of the two in MLflow")
    for run in scene.children:
        first = scene.places[scene.place(run)]
        if first is not run:
            what = f"MLflow has two runs of it, {first.run_id} and {run.run_id}"
            yield Disagreement(scene.label(run), what, "delete one of the two in MLflow")


def endings(scene: Scene) -> Iterator[Disagreement]:
    """Runs that MLflow shows as running, or with another end than they had."""
    for run in scene.runs:
        outcome, said = scene.outcome(run), run.tags.get("outcome")
        trial = scene.trial(run)
        if trial is not None and not trial.has_ended and closed(run):
            tell = partial(
                scene.study.tell,
                trial.number,
                outcome,
                run.metrics,
                run.tags.get("error"),
            )
            what = f"MLflow says {said}, and the study has it {trial.state}"
            yield Disagreement(scene.label(run), what, f"told the study that it {outcome}", tell)
        if (run.status, said) == (STATUS[outcome], outcome):
            continue
        if run.status == "RUNNING" or said == "running":
            what = "MLflow has it running, and no process runs it"
        elif trial is not None and said != outcome:
            what = f"MLflow says {said}, and the study {outcome}"
        else:
            what = f"MLflow's status is {run.status}, and its outcome {said}"
        cure = f"closed as {outcome}" + (
            ": it can be resumed" if outcome == "interrupted" and run is scene.root else ""
        )
        finish = partial(scene.finish, run, outcome)
        yield Disagreement(scene.label(run), what, cure, finish)


def under_way(scene: Scene) -> Iterator[Disagreement]:
    """Trials that the study has running, or whose state contradicts their outcome."""
    told = {number_of(run) for run in scene.children if closed(run)}
    for trial in scene.trials.values():
        where = f"{scene.name}, trial {trial.number}"
        if trial.state == "RUNNING" and trial.number not in told:
            what = "the study has it running, and no process runs it"
            wait = partial(scene.study.let_wait, trial.number)
            yield Disagreement(where, what, "waits to be resumed", wait)
        if not trial.is_sound:
            what = f"the study's state is {trial.state}, and its outcome {trial.outcome}"
            cure = "the study keeps what has ended: put a copy of study.db back"
            yield Disagreement(where, what, cure)


def missing_runs(scene: Scene) -> Iterator[Disagreement]:
    """Trials that the study has, and MLflow has not."""
    if scene.root is None:
        if scene.trials:
            trials = count(len(scene.trials), "trial")
            what = f"the study has {trials}, and MLflow has no run of the sweep"
            yield Disagreement(scene.name, what, "restore its runs if they were deleted in MLflow")
        return
    known = {number_of(run) for run in scene.children}
    for trial in scene.trials.values():
        if trial.has_ended and trial.number not in known:
            what = f"the study has it ({trial.outcome}), and MLflow has not"
            cure = "restore its run if it was deleted in MLflow; the search knows its result"
            yield Disagreement(f"{scene.name}, trial {trial.number}", what, cure)


def missing_trials(scene: Scene) -> Iterator[Disagreement]:
    """Trials that MLflow has, and the study has not."""
    if not scene.study.exists or scene.unreadable is not None:
        return
    for run in scene.children:
        number = number_of(run)
        if number is not None and number not in scene.trials:
            what = f"MLflow has it ({scene.outcome(run)}), and the study has not"
            cure = "delete its run in MLflow if it is not wanted; the search does not know it"
            yield Disagreement(scene.label(run), what, cure)


def epochs(scene: Scene) -> Iterator[Disagreement]:
    """Trials that have ended, of whose epochs the study and MLflow do not say the same."""
    for run in scene.children:
        trial = scene.trial(run)
        if trial is None or not trial.has_ended or trial.outcome not in ("finished", "pruned"):
            continue
        recorded, studied = int(run.metrics.get("epoch", 0)), len(trial.top1s)
        if recorded < studied:
            top1s = dict(enumerate(trial.top1s, 1))
            untold = {epoch: top1s[epoch] for epoch in range(recorded + 1, studied + 1)}
            what = f"MLflow has {count(recorded, 'epoch')} of it, and the study {studied}"
            cure = "recorded their validation top-1; the other metrics of these epochs are lost"
            yield Disagreement(scene.label(run), what, cure, partial(scene.add_top1s, run, untold))
        elif recorded > studied:
            what = f"MLflow has {count(recorded, 'epoch')} of it, and the study {studied}"
            cure = "the study keeps what has ended; the search saw fewer results of it"
            yield Disagreement(scene.label(run), what, cure)
        elif studied and trial.top1s[-1] != run.metrics.get("val_top1"):
            what = f"its last validation top-1 is {run.metrics.get('val_top1')} in MLflow, and "
            what += f"{trial.top1s[-1]} in the study"
            cure = "train its configuration again to see which is right"
            yield Disagreement(scene.label(run), what, cure)


def configurations(scene: Scene) -> Iterator[Disagreement]:
    """Runs whose configuration is not among their artifacts."""
    for run in scene.runs:
        if run.run_id not in scene.bare or run in scene.roots[1:]:
            continue
        what = "MLflow has no config.json of it"
        text = _configuration(scene, run)
        if text is None:
            cure = "its settings are among its parameters in MLflow"
            yield Disagreement(scene.label(run), what, cure)
        else:
            add = partial(scene.add_config, run, text)
            yield Disagreement(scene.label(run), what, "stored it again", add)


def _configuration(scene: Scene, run: RecordedRun) -> str | None:
    """The configuration of a run, from what is on disk and in the study."""
    number, whole = number_of(run), scene.folder.config
    saved = scene.folder.config_of(scene.place(run))
    if run is scene.root:
        return whole
    trial = scene.trials.get(number or 0)
    if saved is not None or whole is None or trial is None or trial.settings is None:
        return saved
    try:
        base = from_json(SweepConfig, whole).base()
        return to_json(replace(base, name=None, **trial.settings))
    except ConfigError:
        return None


def gone(scene: Scene) -> Iterator[Disagreement]:
    """Runs whose folder is not there."""
    if scene.root is not None and not scene.folder.exists:
        what = f"MLflow has it, and its folder {scene.folder.address} is gone"
        cure = "put the folder back, or delete the run in MLflow if it is not wanted"
        yield Disagreement(scene.name, what, cure)
