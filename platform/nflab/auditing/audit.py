"""Compares MLflow, Optuna's studies and the disk, and mends what is safe to mend."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nflab.auditing.disagreement import Disagreement
from nflab.auditing.disagreements import judge
from nflab.auditing.run_folder import run_names
from nflab.auditing.scene import Scene
from nflab.recording.archive import Archive, RecordedRun
from nflab.recording.tracker import Tracker
from nflab.settings.errors import ConfigError
from nflab.settings.outcomes import DONE
from nflab.storage.files import is_local, read_text
from nflab.storage.ownership import Board, FolderBoard, Owned, Ownership, living
from nflab.storage.run_folder import OLD_EXPERIMENT, own_folder, read_identity

MENDED, MENDABLE, LEFT = "mended", "can be mended", "to do"
"""What becomes of a disagreement."""


@dataclass(frozen=True)
class Told:
    """A disagreement, and what became of it."""

    where: str
    what: str
    cure: str
    """What was done, would be done, or is left to do."""
    fate: str
    """MENDED, MENDABLE or LEFT."""


@dataclass
class Audit:
    """What an audit found."""

    told: list[Told] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Run -> why it was not looked at."""
    runs: int = 0
    """MLflow's runs that were looked at."""
    folders: int = 0
    """Folders that were looked at."""

    @property
    def left(self) -> int:
        """How many disagreements there still are."""
        return sum(one.fate != MENDED for one in self.told)


def run_audit(uri: str, storage: str, dry_run: bool) -> Audit:
    """Audits all runs of a storage; one that a process runs is left alone.

    Args:
        uri: MLflow store or server.
        storage: folder or address of checkpoints and results.
        dry_run: change nothing.

    Raises:
        ConfigError: the store or the storage cannot be read.
    """
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():
        raise ConfigError(f"there is no tracking store {uri}: say which with --tracking-uri")
    archive = Archive(uri)
    try:
        names = run_names(storage)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot read the storage {storage}: {reason}") from None
    return _Auditor(archive, storage, dry_run).audit(names)


class _Auditor:
    """One audit under way."""

    def __init__(self, archive: Archive, storage: str, dry_run: bool) -> None:
        self._archive, self._storage, self._dry_run = archive, storage, dry_run
        self._busy: set[str] = set()
        self._found = Audit()

    def audit(self, names: Sequence[str]) -> Audit:
        """All runs of MLflow, and the folders `names`."""
        archive, found = self._archive, self._found
        runs = [run for e in archive.experiments() for run in archive.runs(e)]
        bare = archive.without(runs, "config.json")
        children: dict[str, list[RecordedRun]] = defaultdict(list)
        roots: dict[tuple[str | None, str], list[RecordedRun]] = defaultdict(list)
        for run in runs:
            if run.parent is not None:
                children[run.parent].append(run)
            else:
                roots[run.experiment, run.name].append(run)
        folders = []
        for name in names:
            experiment = _experiment(f"{self._storage}/{name}")
            if experiment is None:  # lost, or killed before it was written
                experiment = next((e for e, known in roots if known == name), None)
            folders.append((experiment, name))
        self._busy = self._being_run(names, [run for of in roots.values() for run in of])
        self._audit_cells(runs)
        for key in dict.fromkeys([*folders, *roots]):
            of_name = roots.get(key, [])
            below = [run for root in of_name for run in children.pop(root.run_id, [])]
            if key not in folders and not self._is_here(of_name, below):
                found.skipped["runs of other storages"] = "not in this --storage"
                continue
            self._audit_one(*key, of_name, below, bare)
            if key[1] not in found.skipped:
                found.runs += len(of_name) + len(below)
                found.folders += key in folders
        for parent, orphans in children.items():
            what = f"MLflow has {len(orphans)} runs, and not their parent {parent}"
            cure = "restore the parent if it was deleted in MLflow, or delete them too"
            found.told.append(Told(orphans[0].experiment, what, cure, LEFT))
        return found

    def _being_run(self, names: Sequence[str], roots: Sequence[RecordedRun]) -> set[str]:
        """Names of the runs that a living process claims, in their folder or in MLflow, on this
        machine or another; claims of another are watched for a while."""
        boards: dict[str, list[Board]] = {}
        for name in names:
            boards.setdefault(name, []).append(FolderBoard(f"{self._storage}/{name}"))
        for run in roots:
            boards.setdefault(run.name, []).append(self._archive.board(run))
        claimed = {
            name: tokens
            for name, of_name in boards.items()
            if (tokens := {token for board in of_name for token in board.claims()})
        }
        alive = living([board for name in claimed for board in boards[name]])
        return {name for name, tokens in claimed.items() if tokens & set(alive)}

    def _audit_one(
        self,
        experiment: str | None,
        name: str,
        roots: Sequence[RecordedRun],
        children: Sequence[RecordedRun],
        bare: set[str],
    ) -> None:
        """One run, sweep or grid: as it was read with all others, and if something disagrees
        once more, while no process can begin to run it."""
        folder = f"{self._storage}/{name}"
        if not is_local(folder) and not own_folder(folder).is_dir():
            self._found.skipped[name] = "was run from another machine, which has its study"
            return
        if name in self._busy:
            self._found.skipped[name] = "is being run"
            return
        look = partial(Scene, self._archive.uri, self._storage, experiment, name)
        scene = look(roots, children, bare)
        if not judge(scene):
            return
        boards: list[Board] = [] if self._dry_run else [self._archive.board(r) for r in roots]
        if scene.folder.exists and not self._dry_run:
            boards.append(FolderBoard(folder))
        with _held(folder, boards) as free:
            if not free:
                self._found.skipped[name] = "is being run"
                return
            self._settle(look, roots)

    def _settle(self, look: Callable[..., Scene], roots: Sequence[RecordedRun]) -> None:
        """Mends a run as far as it can be: what is mended may show what else is to be."""
        tried: set[tuple[str, str]] = set()
        while True:
            families = [self._archive.family(root) for root in roots]
            runs = [run for family in families for run in family]
            scene = look(
                [family[0] for family in families],
                [run for family in families for run in family[1:]],
                self._archive.without(runs, "config.json"),
            )
            found = judge(scene)
            mendable = [one for one in found if one.mend and (one.where, one.what) not in tried]
            if self._dry_run or not mendable:
                self._found.told += [
                    _told(one) for one in found if (one.where, one.what) not in tried
                ]
                return
            # What MLflow was never sent may be all that it lacks.
            for one in mendable[:1] if scene.folder.unsent else mendable:
                tried.add((one.where, one.what))
                self._found.told.append(_mend(one))

    def _audit_cells(self, runs: Sequence[RecordedRun]) -> None:
        """Cells with more than one result: the latest counts, as it does for grids."""
        names = {run.run_id: run.name for run in runs}
        results: dict[tuple[str, str], list[RecordedRun]] = defaultdict(list)
        for run in runs:
            counts = "superseded" not in run.tags and run.tags.get("outcome") in DONE
            if "cell" in run.tags and counts and names.get(run.parent or "") not in self._busy:
                results[run.experiment, run.tags["cell"]].append(run)
        for (experiment, cell), same in results.items():
            last = same[-1]
            for run in same[:-1]:
                where = f"{experiment}, cell {cell}"
                what = f"MLflow has two results of it, {run.run_id} and {last.run_id}"
                cure = f"tagged {run.run_id} as superseded"
                mend: Callable[[], None] | None = partial(self._supersede, run)
                if _result(run) != _result(last):
                    cure = "they differ: tag the one that is not to count as `superseded`"
                    mend = None
                one = Disagreement(where, what, cure, mend)
                self._found.told.append(_told(one) if self._dry_run or not mend else _mend(one))

    def _supersede(self, run: RecordedRun) -> None:
        tracker = Tracker(self._archive.uri, self._storage, run.experiment)
        tracker.tag(run.run_id, "superseded", "true")

    def _is_here(self, roots: Sequence[RecordedRun], children: Sequence[RecordedRun]) -> bool:
        """Whether runs that have no folder in this storage say that they had one."""
        for run in (*roots, *children):
            if "storage" in run.params:
                return run.params["storage"] == self._storage
        for run in roots:
            with self._archive.artifact(run.run_id, "config.json") as file:
                if file is not None:
                    return bool(json.loads(file.read_text())["run"]["storage"] == self._storage)
        return True


def _result(run: RecordedRun) -> tuple[str | None, float | None]:
    return run.tags.get("outcome"), run.metrics.get("test_top1")


def _told(one: Disagreement) -> Told:
    return Told(one.where, one.what, one.cure, MENDABLE if one.mend else LEFT)


def _mend(one: Disagreement) -> Told:
    assert one.mend is not None
    try:
        one.mend()
    except Exception as error:  # clients and drivers of stores raise their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Told(one.where, one.what, f"mending it failed: {reason}", LEFT)
    return Told(one.where, one.what, one.cure, MENDED)


@contextmanager
def _held(folder: str, boards: Sequence[Board]) -> Iterator[bool]:
    """Whether no process runs a run; while in use, none begins to.

    Args:
        boards: where it is claimed for that.
    """
    ownership = Ownership()
    try:
        for board in boards:
            ownership.take(board, folder)
    except Owned:
        ownership.release()
        yield False
        return
    try:
        yield True
    finally:
        ownership.release()
        if is_local(folder):
            with suppress(OSError):  # an audit leaves nothing of its own
                Path(folder, "owners").rmdir()


def _experiment(folder: str) -> str | None:
    """The experiment whose run a folder holds, as far as it says so."""
    try:
        identity = read_identity(folder)
    except ConfigError:  # told when the folder is looked at
        return None
    return read_text(f"{folder}/{OLD_EXPERIMENT}") if identity is None else identity.experiment
