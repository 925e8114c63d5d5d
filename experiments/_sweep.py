"""What agc_sweep.py and sweep.py have in common."""

import re
from typing import TYPE_CHECKING

from rich.table import Table

from nflab.settings import locations
from nflab.settings.recipes import scales_of
from nflab.settings.studies import SweepConfig
from nflab.terminal.interrupts import BudgetReached
from nflab.terminal.wording import console

if TYPE_CHECKING:
    from nflab.studies.sweep import SweepResult


def sweep(config: SweepConfig, experiment: str, resume: bool) -> None:
    """Sweeps, then says what was found."""
    from nflab.studies.plan import show_sweep  # takes seconds: a wrong flag is answered sooner
    from nflab.studies.sweep import run_sweep

    if config.search.dry_run:
        show_sweep(config, experiment)
        return
    result = run_sweep(config, experiment, resume)
    show(result, config)
    if result.stopped is not None:
        raise BudgetReached(result.name, result.stopped)


def show(result: "SweepResult", config: SweepConfig) -> None:
    """Prints the five best trials, or the front, what mattered, and where to look further."""
    out = console()
    objectives = config.search.objectives
    trials, title = result.trials.head(5), "Five best trials"
    if len(objectives) > 1:
        trials = result.trials[result.trials.front]
        title = f"The front, which no other of {len(result.trials)} trials beats"
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    columns = [*scales_of(config), *objectives, "test_top1", "outcome"]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for _, trial in trials.iterrows():
        table.add_row(*(_cell(trial.get(column), column) for column in columns))
    out.print(table)
    found = [
        f"{name.replace('_', ' ')} {i.share:.0%} ({i.low:.0%} to {i.high:.0%})"
        for name, i in result.importances.items()
    ]
    out.print(
        f"What mattered most (share of the variance in {result.judged} trials, 80 % interval): "
        f"{', '.join(found) or 'too few different results to say'}"
    )
    if result.finals:
        out.print("Finals, over fresh seeds:", *result.finals, sep="\n  ", markup=False)
    for sentence in result.costs:
        out.print(sentence, markup=False)
    out.print(f"Figures: {', '.join(str(p) for p in sorted(result.folder.glob('*.png')))}")
    out.print(f"Browse:  {locations.browse(config.run)}")
    if (result.trials.outcome == "failed").all():
        raise SystemExit("error: every trial failed; what follows `logs:` above says where to look")


def _cell(value: object, column: str) -> str:
    """Percentages with a sign; other numbers, also of settings, which are text, in a few digits."""
    if isinstance(value, float):
        told = f"{value:.1f} %" if column.endswith("top1") else f"{value:.4g}"
        return told if value == value else ""
    text = str(value)
    return f"{float(text):.3g}" if re.fullmatch(r"[\d.]+(e-?\d+)?", text) and "." in text else text
