"""How a setting that may be absent is written on the command line."""

from typing import Any

import tyro


def _or(word: str, kind: type[float] | type[int]) -> Any:
    """Command-line form of `kind | None` in which `word` stands for None."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}|{word}",
        instance_from_str=lambda args: None if args[0] == word else kind(args[0]),
        is_instance=lambda value: value is None or isinstance(value, float | int),
        str_from_instance=lambda value: [word if value is None else f"{value:g}"],
    )


def float_or(word: str) -> Any:
    return _or(word, float)


def int_or(word: str) -> Any:
    return _or(word, int)


def _int_or_range(text: str) -> int | str:
    least, colon, most = text.partition(":")
    return f"{int(least)}:{int(most)}" if colon and int(least) != int(most) else int(least)


int_or_range: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT|INT:INT",
    instance_from_str=lambda args: _int_or_range(args[0]),
    is_instance=lambda value: isinstance(value, int | str),
    str_from_instance=lambda value: [str(value)],
)
"""Command-line form of a number, or of the least and the most that it may be: 4, or 1:4."""
