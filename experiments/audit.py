"""Do MLflow, Optuna's studies and the disk say the same?

After a crash, a full disk or a lost server: lists every disagreement and mends what it safely can.
What a living process runs is left alone. Ends with exit code 1 if something is left to do.

Example:
  python experiments/audit.py --dry-run
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import _start  # noqa: F401

from nflab.settings import locations
from nflab.settings.config import RunConfig
from nflab.terminal import command_line
from nflab.terminal.wording import console

if TYPE_CHECKING:
    from nflab.auditing.audit import Audit


@dataclass(frozen=True)
class AuditConfig:
    """What to look at."""

    dry_run: bool = False
    """List what disagrees; change nothing."""
    tracking_uri: str | None = None
    """MLflow store or server; default: $MLFLOW_TRACKING_URI, else mlflow.db in the checkout."""
    storage: str | None = None
    """Folder or URI of checkpoints and results; default: $NFLAB_STORAGE, else runs/ in the
    checkout."""


def main(asked: AuditConfig) -> None:
    """Audits, and tells what was found."""
    from nflab.auditing.audit import run_audit  # takes seconds: a wrong flag is answered sooner

    run = RunConfig(tracking_uri=asked.tracking_uri, storage=asked.storage)
    audit = run_audit(locations.tracking_uri(run), locations.storage(run), asked.dry_run)
    show(audit)
    if audit.left:
        raise SystemExit(1)


def show(audit: "Audit") -> None:
    """Prints each disagreement with what became of it, and how many there are."""
    lines = [f"{name}: {why}: not looked at" for name, why in audit.skipped.items()]
    for one in audit.told:
        lines += [f"{one.where}: {one.what}", f"  {one.fate}: {one.cure}"]
    looked = f"runs in MLflow: {audit.runs}, folders: {audit.folders}"
    if audit.told:
        mended = len(audit.told) - audit.left
        lines.append(
            f"disagreements: {len(audit.told)} (mended {mended}, left {audit.left}); {looked}"
        )
    else:
        lines.append(f"everything {'else ' if audit.skipped else ''}agrees; {looked}")
    console().print(*lines, sep="\n", markup=False)


if __name__ == "__main__":
    command_line.command(AuditConfig, main, __doc__)
