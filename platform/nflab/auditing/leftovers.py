"""What may disagree about the checkpoints of a run that no process runs.

Nothing is mended that may be the only copy of a result.
"""

from collections.abc import Iterator
from functools import partial

from nflab.auditing.disagreement import Disagreement, count
from nflab.auditing.run_folder import Saved
from nflab.auditing.scene import Scene, number_of, place_of_trial, standing_of, top1
from nflab.recording.archive import RecordedRun
from nflab.storage.checkpoints import NO_RIVALS

OVER = ("finished", "pruned", "diverged", "failed")
"""Outcomes of runs that do not go on."""


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
    """Checkpoints beyond the bound that `storage.checkpoints` states."""
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
            keep = [one.mark for one in complete]
            what = f"{_told(broken)} on disk that no process finished saving"
            yield Disagreement(where, what, "deleted", partial(checkpoints.purge, keep))
        elif outcome in OVER and broken:
            what = f"{_told(broken)} on disk without the mark that they are complete"
            cure = "may be the only copy: delete it, or add an empty file `complete` if it is whole"
            yield Disagreement(where, what, cure)
        elif len(complete) > (2 if outcome == "finished" else 3 if outcome in OVER else 4):
            what = f"{_told(complete)} on disk, where the last and the best are enough"
            prune = partial(scene.keep_last_and_best, run, [one.mark for one in complete])
            yield Disagreement(where, what, "deleted the others", prune)


def _is_loser(scene: Scene, run: RecordedRun) -> bool:
    """Whether nothing will ever be read from a run's checkpoints."""
    outcome, number = scene.outcome(run), number_of(run)
    if number is not None:
        lost = outcome == "finished" and bool(scene.winners) and number not in scene.winners
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
    kept = scene.kept_cells.get(rivals)
    beaten = kept is not None and rivals != NO_RIVALS and standing_of(kept) < standing_of(run)
    return outcome == "diverged" or (outcome == "finished" and beaten)


def _why(scene: Scene, run: RecordedRun) -> str:
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
        own = model and scene.winners[:1] == [number]  # the parent's model is the first one's
        stored = f"its weights are in MLflow as {model}" if own else None
        again = stored or "train its configuration again if its weights are needed"
        if outcome == "interrupted" and run.metrics.get("epoch", 0) >= 1:
            what = f"has no checkpoint, though {count(int(run.metrics['epoch']), 'epoch')} ran"
            cure = "resumed, it begins again, with the same result"
            yield Disagreement(scene.label(run), what, cure)
        elif number is not None and outcome == "finished" and number in scene.winners:
            what = "has no checkpoint, though it is the best of its sweep"
            yield Disagreement(scene.label(run), what, again)
        elif outcome == "finished" and "superseded" not in run.tags and _is_needed(scene, run):
            what = "has no checkpoint, though it is the best of its grid or its weights are used"
            yield Disagreement(scene.label(run), what, again)


def _is_needed(scene: Scene, run: RecordedRun) -> bool:
    """Whether the checkpoints of a finished cell are to be kept."""
    rivals = run.tags.get("rivals")
    if rivals is None or rivals == NO_RIVALS:
        return rivals == NO_RIVALS
    # A longer list may have these cells too, and another best one.
    kept = max((top1(one) for one in scene.kept_cells.values()), default=-1.0)
    return scene.finished_cells[rivals][0] is run and top1(run) > kept


def _told(saved: list[Saved]) -> str:
    size = sum(one.size for one in saved) / 1e6
    return f"{count(len(saved), 'checkpoint')} ({size:.1f} MB)"
