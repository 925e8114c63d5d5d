"""What may disagree about a run that no process runs, and what can safely be done about it.

Where they contradict each other, the study is right about how a trial ended, since it is told
first; of everything else MLflow is, and the disk follows. Nothing is mended that may be the only
copy of a result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from nflab.auditing.run_folder import Saved
from nflab.auditing.scene import Scene, closed, number_of, place_of_trial, top1
from nflab.recording.archive import Recorded
from nflab.recording.tables import STATUS
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.serialization import from_json, to_json
from nflab.settings.studies import SweepConfig
from nflab.storage.checkpoints import NO_RIVALS

OVER = ("finished", "pruned", "diverged", "failed")
"""Outcomes of runs that do not go on."""


@dataclass(frozen=True)
class Disagreement:
    """One thing of which two places say different things."""

    where: str
    """The run, trial or cell."""
    what: str
    """What is wrong."""
    cure: str
    """What mending does, or what a person can do."""
    mend: Callable[[], None] | None = None
    """Mends it; None if that would not be safe."""


def judge(scene: Scene) -> list[Disagreement]:
    """All that disagrees; what is mended first stands first."""
    rules = (
        unsent,
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
        what = f"{_count(scene.folder.unsent, 'request')} to MLflow never sent"
        if scene.experiment is None:
            cure = "resume it with the script that started it: its file `experiment` is gone"
            yield Disagreement(scene.name, what, cure)
        else:
            yield Disagreement(scene.name, what, "sent", scene.send)


def unreadable(scene: Scene) -> Iterator[Disagreement]:
    """A study that is broken, or gone."""
    if scene.unreadable is not None:
        cure = "put a copy of study.db back, or start the sweep anew under another --name"
        yield Disagreement(scene.name, scene.unreadable, cure)
    numbers = [number for number in map(number_of, scene.children) if number is not None]
    if numbers and not scene.study.exists and scene.folder.exists:
        what = f"MLflow has {_count(len(numbers), 'trial')}, and the study is gone"
        cure = f"put {scene.folder.own}/study.db back: resumed without it, the sweep starts anew"
        yield Disagreement(scene.name, what, cure)


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
                run.metrics.get("val_top1"),
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
            count = _count(len(scene.trials), "trial")
            what = f"the study has {count}, and MLflow has no run of the sweep"
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
            what = f"MLflow has {_count(recorded, 'epoch')} of it, and the study {studied}"
            cure = "recorded their validation top-1; the other metrics of these epochs are lost"
            yield Disagreement(scene.label(run), what, cure, partial(scene.add_top1s, run, untold))
        elif recorded > studied:
            what = f"MLflow has {_count(recorded, 'epoch')} of it, and the study {studied}"
            cure = "the study keeps what has ended; the search saw fewer results of it"
            yield Disagreement(scene.label(run), what, cure)
        elif studied and trial.top1s[-1] != run.metrics.get("val_top1"):
            what = f"its last validation top-1 is {run.metrics.get('val_top1')} in MLflow, and "
            what += f"{trial.top1s[-1]} in the study"
            cure = "train its configuration again to see which is right"
            yield Disagreement(scene.label(run), what, cure)


def strays(scene: Scene) -> Iterator[Disagreement]:
    """Checkpoints of no run."""
    lost = {p: saved for p, saved in scene.folder.checkpoints.items() if p not in scene.places}
    cure = "may be the only copy: restore the run in MLflow, or delete "
    if scene.root is None and lost:
        what = f"{_told([one for saved in lost.values() for one in saved])} on disk, and no run of "
        yield Disagreement(scene.name, what + "them in MLflow", cure + scene.folder.address)
        return
    under_way = {place_of_trial(n) for n, trial in scene.trials.items() if not trial.has_ended}
    for place, saved in lost.items():
        if place not in under_way:
            what = f"{_told(saved)} in {place or 'its folder'}, and no run of it in MLflow"
            yield Disagreement(scene.name, what, f"{cure}{scene.folder.address}/{place}")


def leftovers(scene: Scene) -> Iterator[Disagreement]:
    """Checkpoints beyond the bound that `nflab.checkpoints` states."""
    for place, saved in scene.folder.checkpoints.items():
        run = scene.places.get(place)
        if run is None:
            continue
        where, checkpoints = scene.label(run), scene.checkpoints(place)
        outcome = scene.outcome(run)
        complete = [one for one in saved if one.complete]
        broken = [one for one in saved if not one.complete]
        if _is_loser(scene, run):
            what = f"{_told(saved)} on disk, though it {_why(scene, run)}"
            yield Disagreement(where, what, "deleted", checkpoints.purge)
        elif outcome in OVER and broken and (complete or outcome != "finished"):
            keep = [one.epoch for one in complete]
            what = f"{_told(broken)} on disk that no process finished saving"
            yield Disagreement(where, what, "deleted", partial(checkpoints.purge, keep))
        elif outcome in OVER and broken:
            what = f"{_told(broken)} on disk without the mark that they are complete"
            cure = "may be the only copy: delete it, or add an empty file `complete` if it is whole"
            yield Disagreement(where, what, cure)
        elif len(complete) > (2 if outcome in OVER else 3):
            what = f"{_told(complete)} on disk, where the last and the best are enough"
            prune = partial(scene.keep_last_and_best, run, [one.epoch for one in complete])
            yield Disagreement(where, what, "deleted the others", prune)


def _is_loser(scene: Scene, run: Recorded) -> bool:
    """Whether nothing will ever be read from a run's checkpoints."""
    outcome, number = scene.outcome(run), number_of(run)
    if number is not None:
        lost = outcome == "finished" and scene.winner not in (None, number)
        return outcome in ("pruned", "diverged") or (lost and scene.trial(run) is not None)
    if "cell" not in run.tags:
        return False
    if "superseded" in run.tags:
        return any(
            other.tags.get("cell") == run.tags["cell"]
            and "superseded" not in other.tags
            and scene.outcome(other) == "finished"
            for other in scene.children
        )
    rivals = run.tags.get("rivals", NO_RIVALS)
    # Of rivals none may have a result yet.
    beaten = rivals != NO_RIVALS and top1(run) < scene.kept_top1s.get(rivals, -1.0)
    return outcome == "diverged" or (outcome == "finished" and beaten)


def _why(scene: Scene, run: Recorded) -> str:
    outcome = scene.outcome(run)
    if "superseded" in run.tags:
        return "was run again"
    if outcome != "finished":
        return {"pruned": "was pruned", "diverged": "diverged"}[outcome]
    return f"is not the best of its {'grid' if 'cell' in run.tags else 'sweep'}"


def lost_checkpoints(scene: Scene) -> Iterator[Disagreement]:
    """Runs that should have a checkpoint, and have none."""
    for run in scene.runs:
        if not scene.folder.exists or scene.has_checkpoint(run):
            continue
        if scene.place(run) in scene.folder.checkpoints and scene.outcome(run) == "finished":
            continue  # told among what is left over
        outcome, number = scene.outcome(run), number_of(run)
        model = scene.root.tags.get("model_uri") if scene.root is not None else None
        stored = f"its weights are in MLflow as {model}" if model and number else None
        again = stored or "train its configuration again if its weights are needed"
        if outcome == "interrupted" and run.metrics.get("epoch", 0) >= 1:
            what = f"has no checkpoint, though {_count(int(run.metrics['epoch']), 'epoch')} ran"
            cure = "resumed, it begins again, with the same result"
            yield Disagreement(scene.label(run), what, cure)
        elif number is not None and outcome == "finished" and number == scene.winner:
            what = "has no checkpoint, though it is the best of its sweep"
            yield Disagreement(scene.label(run), what, again)
        elif outcome == "finished" and "superseded" not in run.tags and _is_needed(scene, run):
            what = "has no checkpoint, though it is the best of its grid or its weights are used"
            yield Disagreement(scene.label(run), what, again)


def _is_needed(scene: Scene, run: Recorded) -> bool:
    """Whether the checkpoints of a finished cell are to be kept."""
    rivals = run.tags.get("rivals")
    if rivals is None or rivals == NO_RIVALS:
        return rivals == NO_RIVALS
    # A longer list may have these cells too, and another best one.
    return scene.finished_cells[rivals][0] is run and top1(run) > max(
        scene.kept_top1s.values(), default=-1.0
    )


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


def _configuration(scene: Scene, run: Recorded) -> str | None:
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


def _told(saved: list[Saved]) -> str:
    size = sum(one.size for one in saved) / 1e6
    return f"{_count(len(saved), 'checkpoint')} ({size:.1f} MB)"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
