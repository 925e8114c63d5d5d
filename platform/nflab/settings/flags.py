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
