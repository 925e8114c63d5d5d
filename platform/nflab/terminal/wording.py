"""How settings, amounts and results are written where people read them."""

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # it takes a second to import, which a wrong flag need not wait for
    import pandas as pd


def console() -> Console:
    """Where people read: wide enough for a line of results when it is a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=120, soft_wrap=True)


def say(sentence: str) -> None:
    """Prints a sentence for a person."""
    console().print(sentence, markup=False)


def describe(settings: dict[str, Any]) -> str:
    """Settings in a line, as `clipping 0.13, batch_size 64`."""
    return ", ".join(f"{key} {short_setting(value)}" for key, value in settings.items())


def short_setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    return str(value).rsplit("/", 1)[-1]  # of a file its name


def money(usd: float) -> str:
    """An amount of USD as people read it."""
    if usd >= 1:
        return f"{usd:.2f} USD"
    return f"{np.format_float_positional(usd, precision=2, fractional=False, trim='-')} USD"


def money_range(low: float, high: float) -> str:
    """Amounts of USD from `low` to `high`; one where they read the same."""
    return money(low) if money(low) == money(high) else f"{money(low)} to {money(high)}"


def duration(seconds: float) -> str:
    """A time as people read it."""
    unit, name = (1, "s") if seconds < 90 else (60, "min") if seconds < 5400 else (3600, "h")
    amount = seconds / unit
    return f"{amount:.1f} {name}" if amount < 10 else f"{amount:.0f} {name}"


def text_table(table: "pd.DataFrame") -> Table:
    """A table as a person reads it."""
    drawn = Table(box=None, pad_edge=False)
    for column in table.columns:
        drawn.add_column(str(column).replace("_", " "), justify="right")
    for row in table.itertuples(index=False):
        drawn.add_row(*(short(value) for value in row))
    return drawn


def short(value: Any) -> str:
    """A value in few digits; an infinite clipping is none, and what is unknown is empty."""
    if isinstance(value, float):
        if value == float("inf"):
            return "none"
        if value != value or value == -float("inf"):
            return ""
        return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
    return str(value)
