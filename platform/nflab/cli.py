"""The command line of every experiment: flat flags over one configuration."""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import tyro

from nflab.config import C, Config, ConfigError, SweepConfig, load, replace
from nflab.recipes import RECIPES
from nflab.validate import known, validate

_CONFIG_HELP = "--config FILE repeats a recorded configuration; flags given beside it win."


def main(kind: type[C], run: Callable[[C], None], description: str) -> None:
    """Runs an experiment with the configuration that the command line says.

    A configuration that cannot be run ends the process with exit code 2 and one sentence.

    Args:
        kind: Config, or SweepConfig for a search.
        description: what `--help` shows above the flags, ending in an example.
    """
    try:
        config = parse(kind, sys.argv[1:], description)
        validate(config)
        run(config)
    except ConfigError as error:
        _refuse(str(error))


def parse(kind: type[C], argv: Sequence[str], description: str = "") -> C:
    """The configuration that flags `argv` stand for.

    Defaults come from `--config FILE`, else from the recipe of `--dataset`. In a search, a flag
    for something that would be searched fixes it.

    Raises:
        ConfigError: the file, the dataset or a flag is wrong.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    files.add_argument("--dataset", default="digits")
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            asked, flags = files.parse_known_args(argv)
    except SystemExit:
        raise ConfigError(said.getvalue().strip().split("error: ")[-1]) from None
    if asked.config is not None:
        defaults = load(kind, asked.config)
        if any(re.match("--dataset(=|$)", word) for word in argv):
            defaults = replace(defaults, dataset=asked.dataset)
    else:
        known("dataset", asked.dataset, list(RECIPES))
        defaults = _recipe(kind, asked.dataset)
    if isinstance(defaults, SweepConfig):
        given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in flags}
        searched = tuple(name for name in defaults.search.searched if name not in given)
        defaults = replace(defaults, searched=searched)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return tyro.cli(
                kind,
                args=list(flags),
                default=defaults,
                description=f"{description}\n\n{_CONFIG_HELP}",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as error:
        if error.code == 0:  # --help
            raise
        raise ConfigError(_sentence(said.getvalue())) from None


def _recipe(kind: type[C], dataset: str) -> C:
    config = RECIPES[dataset].config
    parts = {name: getattr(config, name) for name in Config.__dataclass_fields__}
    return kind(**parts)


def _sentence(box: str) -> str:
    """The first paragraph of an error that tyro drew in a box."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    body = [line for line in lines if not line.startswith("╭")]
    end = next((i for i, line in enumerate(body) if not line or line[0] in "─╰"), len(body))
    return " ".join(body[:end]) + " (--help shows every flag)"


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
