"""What a person sees while runs go on: a live table on a terminal, else a line for each event."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nflab.terminal.wording import console, describe, short_setting

STYLES = {"finished": "green", "pruned": "yellow", "diverged": "magenta", "failed": "red"}


def _end_of(error: str, lines: int = 12) -> str:
    """The last lines of a traceback, indented."""
    return "\n".join(f"  {line}" for line in error.strip().splitlines()[-lines:])


@dataclass
class _Row:
    settings: dict[str, Any]
    epoch: int = 0
    val_top1: float | None = None
    outcome: str = "running"
    cut: str | None = None


class TrainingProgress:
    """Progress of one training: a line an epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._told = epochs, 0
        self._remarks: set[str] = set()

    def say(self, sentence: str) -> None:
        """Prints a sentence."""
        console().print(sentence, markup=False)

    def reported(self, metrics: dict[str, Any]) -> None:
        """Prints what a run reports of an epoch of training, and its remark, unless it was printed
        before."""
        remark = metrics.get("remark")
        if remark is not None and remark not in self._remarks:
            self._remarks.add(remark)
            self.say(remark)
        if "train_loss" in metrics and metrics["epoch"] > self._told:
            self._told = metrics["epoch"]
            console().print(
                f"epoch {metrics['epoch']:>3}/{self._epochs}  "
                f"train loss {metrics['train_loss']:.4f}  "
                f"validation top-1 {metrics['val_top1']:.2f} %  "
                f"{metrics['images_per_second']:.0f} images/s"
            )


class SweepProgress:
    """Progress of a sweep; used as a context while it runs."""

    def __init__(
        self,
        num_trials: int,
        before: int,
        epochs: int,
        word: str = "trial",
        best: float | None = None,
    ) -> None:
        """`before` of the `num_trials` were done before, the best of them with `best` validation
        top-1; `word` is what a person calls one."""
        self._word, self._best = word, best
        self._num_trials, self._before, self._epochs = num_trials, before, epochs
        self._rows: dict[int, _Row] = {}
        self._remarks: set[tuple[int, str]] = set()
        self._console = console()
        self._live: Live | None = None
        self._began = time.monotonic()

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=self._console, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Prints a sentence above the table."""
        self._console.print(sentence, markup=False)

    def started(self, number: int, settings: dict[str, Any]) -> None:
        """A trial begins."""
        self._rows.setdefault(number, _Row(settings))

    def reported(
        self,
        number: int,
        epoch: int,
        val_top1: float,
        remark: str | None = None,
        cut: str | None = None,
    ) -> None:
        """A trial has finished an epoch; it may be `cut` for a reason, and have a `remark`, which
        is printed once."""
        if remark is not None and (number, remark) not in self._remarks:
            self._remarks.add((number, remark))
            self.say(f"{self._word} {number} {remark}")
        row = self._rows[number]
        row.epoch, row.val_top1, row.cut = epoch, val_top1, cut

    def ended(self, number: int, outcome: str, error: str | None) -> None:
        """A trial is over."""
        row = self._rows[number]
        row.outcome = outcome
        if error is not None:
            self._console.print(f"{self._word} {number} {outcome}:\n{_end_of(error)}", markup=False)
        if self._live is None:
            top1 = "" if row.val_top1 is None else f", validation top-1 {row.val_top1:.1f} %"
            line = f"[{self._done()}/{self._num_trials}] {self._word} {number} {outcome} after "
            line += f"{row.epoch} epochs{top1}{self._why(row)}  ({describe(row.settings)})"
            line += f"  {self._state()}"
            self._console.print(line, markup=False)

    @staticmethod
    def _why(row: _Row) -> str:
        return f" ({row.cut})" if row.cut is not None and row.outcome == "pruned" else ""

    def _done(self) -> int:
        return self._before + sum(row.outcome != "running" for row in self._rows.values())

    def _state(self) -> str:
        """How many are running and have failed, of a search the best so far, and the time left."""
        outcomes = [row.outcome for row in self._rows.values()]
        counts = [(outcomes.count(word), word) for word in ("running", "failed")]
        finished = [row.val_top1 for row in self._rows.values() if row.outcome == "finished"]
        found = [top1 for top1 in (self._best, *finished) if top1 is not None]
        told = [f"{count} {word}" for count, word in counts if count]
        if found and self._word == "trial":
            told.append(f"best {max(found):.1f} %")
        return ", ".join([*told, self._left()])

    def _left(self) -> str:
        """Time left, from the time that trials have taken so far, finished or not."""
        work = sum(
            1.0 if row.outcome != "running" else row.epoch / self._epochs
            for row in self._rows.values()
        )
        if work == 0:
            return "time left: unknown yet"
        seconds = (time.monotonic() - self._began) * ((self._num_trials - self._before) / work - 1)
        return (
            f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
        )

    def _shown(self) -> list[tuple[int, _Row]]:
        """What is running, and as many of the last that ended as there is room for."""
        rows = sorted(self._rows.items())
        running = [item for item in rows if item[1].outcome == "running"]
        ended = [item for item in rows if item[1].outcome != "running"]
        room = max(1, self._console.height - len(running) - 4)
        return sorted([*running, *ended[-room:]], key=lambda item: item[0])

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = list(next(iter(self._rows.values())).settings) if self._rows else []
        table.add_column(self._word, justify="right")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right")
        for name in ("epoch", "validation top-1"):
            table.add_column(name, justify="right")
        table.add_column("outcome")
        for number, row in self._shown():
            table.add_row(
                str(number),
                *(short_setting(row.settings[name]) for name in columns),
                f"{row.epoch}/{self._epochs}",
                "" if row.val_top1 is None else f"{row.val_top1:.1f} %",
                Text(row.outcome + self._why(row), style=STYLES.get(row.outcome, "")),
            )
        title = f"{self._done()} of {self._num_trials} {self._word}s done, {self._state()}"
        return Group(table, Text(title, style="dim"))
