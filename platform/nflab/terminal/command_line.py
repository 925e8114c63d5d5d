"""The command line of every experiment: flat flags over one configuration."""

import argparse
import contextlib
import dataclasses
import gc
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar, cast

import tyro

from nflab.data.dataset import DatasetError
from nflab.learning.validation import validate
from nflab.settings import locations, recipe_files
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError, known, require
from nflab.settings.leaves import C, flat, replace
from nflab.settings.recipes import as_yaml, recipe_of, scales_of, sourced, space_of
from nflab.settings.serialization import load
from nflab.settings.studies import SweepConfig
from nflab.terminal.interrupts import BudgetReached, Interrupted, raise_on_interrupt

T = TypeVar("T")

_PRINT, _YAML = "--print-config", "--yaml"

_CONFIG_HELP = """--recipe NAME starts from a recipe; --print-config shows all settings and sources.
--recipe FILE.yaml starts from one of your own; --print-config --yaml writes one.
--config FILE repeats a recorded configuration; flags given beside it win.
--resume NAME continues a run that was interrupted, with the configuration it was started with;
of a sweep or grid --max-cost may be another."""


def main(
    kind: type[C],
    run: Callable[[C, bool], None],
    description: str,
    recipe: str = "digits",
    trains: bool = True,
) -> None:
    """Runs an experiment with the configuration that the command line says.

    A configuration that cannot be run ends the process with exit code 2 and one sentence; Ctrl-C,
    SIGTERM and a budget that is spent end it with 130 and the way to resume.

    Args:
        kind: Config, or SweepConfig for a search.
        run: takes the configuration, and whether to continue the run of that name.
        description: what `--help` shows above the flags, ending in an example.
        recipe: where settings come from without `--recipe`.
        trains: whether the dataset's training split is needed.
    """
    raise_on_interrupt()
    argv = sys.argv[1:]
    try:
        asks = (_PRINT, _YAML) if _PRINT in argv else ()
        require(bool(asks) or _YAML not in argv, "--yaml is for --print-config: give both")
        config, resume = parse(
            kind, [word for word in argv if word not in asks], description, recipe
        )
        if _PRINT in argv:
            print(as_yaml(config).rstrip() if _YAML in argv else sources(config))
            return
        validate(config, trains)
        run(config, resume)
    except ConfigError as error:
        _end(f"error: {error}", 2)
    except Interrupted as interrupted:
        storage = f" --storage {config.run.storage}" if config.run.storage else ""
        command = f"python {sys.argv[0]} --resume {interrupted}{storage}"
        if isinstance(interrupted, BudgetReached):
            _end(f"{interrupted.told}; to go on: {command} --max-cost USD", 130)
        _end(f"interrupted; to go on: {command}", 130)
    except KeyboardInterrupt:
        _end("interrupted before anything was started", 130)
    finally:
        _end_soon()


def command(kind: type[T], run: Callable[[T], None], description: str) -> None:
    """Runs what is no experiment, such as a report of past ones, with the flags of `kind`.

    Ends as `main` does.

    Args:
        kind: a dataclass whose fields are the flags.
        run: takes an instance.
        description: what `--help` shows above the flags, ending in an example.
    """
    raise_on_interrupt()
    try:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                asked = tyro.cli(kind, description=description)
        except SystemExit as error:
            if error.code == 0:  # --help
                raise
            raise ConfigError(_sentence(said.getvalue())) from None
        run(asked)
    except (ConfigError, DatasetError) as error:
        _end(f"error: {error}", 2)
    except Interrupted as interrupted:
        _end(f"{interrupted} was interrupted", 130)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    finally:
        _end_soon()


def _end_soon() -> None:
    """Else the interpreter's end searches all that was imported for garbage, for seconds."""
    if "triton" not in sys.modules:  # it would call what it cannot free leaked
        gc.freeze()


def parse(
    kind: type[C], argv: Sequence[str], description: str = "", recipe: str = "digits"
) -> tuple[C, bool]:
    """The configuration that flags `argv` stand for, and whether a run is to be resumed.

    Defaults come from `--config FILE`, else from `--recipe`. In a search, a flag
    for something that would be searched fixes it. A resumed run has the configuration that it was
    started with.

    Raises:
        ConfigError: the file, the recipe or a flag is wrong, or a flag would change a resumed run.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    files.add_argument("--resume")
    files.add_argument("--recipe", default=recipe)
    files.add_argument("--storage")
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            asked, flags = files.parse_known_args(argv)
    except SystemExit:
        raise ConfigError(said.getvalue().strip().split("error: ")[-1]) from None
    given = {
        word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        for word in argv
        if word.startswith("--")
    }
    if recipe_files.is_file(asked.recipe):
        asked.recipe = recipe_files.located(asked.recipe)
    if asked.resume is not None and asked.config is not None:
        raise ConfigError("--resume goes on with its own configuration: leave --config out")
    if asked.config is not None and "recipe" in given:
        raise ConfigError("--config names the recipe it came from: leave --recipe out")
    defaults = stored = _defaults(kind, asked)
    if isinstance(defaults, SweepConfig):
        searched = tuple(name for name in defaults.search.searched if name not in given)
        defaults = replace(defaults, searched=searched)
    if "recipe" in given and asked.resume is not None:
        flags += ["--recipe", asked.recipe]
    if "storage" in given and asked.resume is None:
        flags += ["--storage", asked.storage]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            config = tyro.cli(
                kind,
                args=flags,
                default=defaults,
                description="\n\n".join([description, *_searched(defaults), _CONFIG_HELP]),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as error:
        if error.code == 0:  # --help
            raise
        raise ConfigError(_sentence(said.getvalue())) from None
    config = locations.located(config)
    if isinstance(config, SweepConfig) and asked.resume is None:
        config = cast(C, _narrowed(config, given, argv))
    if asked.resume is not None:
        _refuse_changes(locations.located(stored), config)
    elif isinstance(config, SweepConfig) and config.search.retry_failed:
        raise ConfigError("--retry-failed is for a sweep that goes on: give --resume NAME")
    return config, asked.resume is not None


def _defaults(kind: type[C], asked: argparse.Namespace) -> C:
    """What the flags start from."""
    if asked.resume is not None:
        from nflab.storage.run_folder import stored_config  # takes seconds, and few need it

        return stored_config(kind, asked.resume, asked.storage)
    if asked.config is not None:
        loaded = load(kind, asked.config)
        if not recipe_files.is_file(loaded.run.recipe):
            recipe_of(loaded.run.recipe)
        return loaded
    config = recipe_of(asked.recipe).config
    found = kind(**{name: getattr(config, name) for name in Config.__dataclass_fields__})
    if isinstance(found, SweepConfig):
        return cast(C, replace(found, searched=tuple(space_of(config).scales)))
    return found


def sources(config: Config) -> str:
    """Every setting with its value and where that comes from, a line each."""
    told = sourced(config)
    lines = []
    for part in dataclasses.fields(config):
        lines.append(f"[{part.name}]")
        for name, value in dataclasses.asdict(getattr(config, part.name)).items():
            lines.append(f"{f'{name} = {value!r}':<36} # {told[name][1]}")
    return "\n".join(lines)


def _refuse_changes(stored: Config, config: Config) -> None:
    old, new = flat(stored), flat(config)
    of_now = ("max_cost", "retry_failed")
    changed = [key for key in old if key not in of_now and old[key] != new[key]]
    changes = [f"{key} {old[key]} -> {new[key]}" for key in changed]
    if changes:
        raise ConfigError(
            f"{stored.run.name!r} cannot be resumed with another configuration "
            f"({'; '.join(changes)}): leave these flags out, or start anew under another --name"
        )


def _narrowed(config: SweepConfig, given: set[str], argv: Sequence[str]) -> SweepConfig:
    """A sweep without what flags fix.

    Args:
        given: names of the flags.
    """
    if sum(word.split("=")[0] == "--search" for word in argv) > 1:
        raise ConfigError("--search is given twice: name all that is searched behind one")
    if "search" in given and "fix" not in given:
        config = replace(config, fix=())  # a file's own is of its own search
    every = scales_of(replace(config, fix=()))
    if "search" in given:
        require(bool(config.search.search), "--search names nothing: give it a setting's values")
        for name in every:
            require(
                name not in given, f"--search searches what --{name} fixes: leave one of them out"
            )
    if "fix" in given:
        for name in config.search.fix:
            known("searched setting", name, [*every, *given])
    search = config.search.search
    if not search or "search" in given:
        return config
    search = tuple(text for text in search if text.partition("=")[0] not in given)
    # Without any of its own it is not the recipe's that is searched.
    return replace(config, search=search, searched=config.search.searched if search else ())


def _searched(config: Config) -> list[str]:
    """What a search would vary, in a sentence."""
    if not isinstance(config, SweepConfig):
        return []
    ranges = [f"{name} ({scale})" for name, scale in scales_of(config).items()]
    told = "; ".join(ranges) or "nothing"
    return [f"Searched unless --search names others, whatever default is shown below: {told}."]


def _sentence(box: str) -> str:
    """The first paragraph of an error that tyro drew in a box."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    body = [line for line in lines if not line.startswith("╭")]
    end = next((i for i, line in enumerate(body) if not line or line[0] in "─╰"), len(body))
    return " ".join(body[:end]) + " (--help shows every flag)"


def _end(message: str, code: int) -> NoReturn:
    print(locations.masked(message), file=sys.stderr)
    raise SystemExit(code)
