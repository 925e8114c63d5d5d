"""What is to be trained and what became of it, as those who train see it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nflab.running.budget import Budget
from nflab.settings.outcomes import Outcome

METRIC = "val_top1"
"""What the search maximises: validation top-1 in percent, of a trial's last epoch."""


@dataclass(frozen=True)
class Proposal:
    """One trial to run."""

    number: int
    """From 1, in the order proposed."""
    settings: dict[str, Any]
    """What distinguishes it from the others, and the seed."""
    folder: str
    """Path or address of its checkpoints and logs."""


class Ledger(Protocol):
    """What is to be trained, and what has become of it."""

    budget: Budget
    """What all of it may cost; each report adds what it cost."""

    @property
    def missing(self) -> int:
        """How many trials have not come to their end."""
        ...

    def propose(self) -> Proposal | None:
        """The next trial to run; None if it waits for others that are under way."""
        ...

    def started(self, proposal: Proposal) -> None:
        """A trial begins, or begins again."""
        ...

    def reported(self, number: int, metrics: dict[str, Any]) -> str | None:
        """Writes down an epoch's metrics, once; returns why the trial is to be cut, if it is."""
        ...

    def ended(
        self, number: int, outcome: Outcome, result: Mapping[str, Any], error: str | None = None
    ) -> tuple[Outcome, str | None]:
        """Writes down how a trial ended, with its last metrics, and why if it failed.

        Returns:
            what was written down.
        """
        ...

    def release(self) -> None:
        """Lets what is under way be proposed again, by a later ledger too."""
        ...
