"""What is told when something that was asked for cannot be done."""

import difflib


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence for the user."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition`."""
    if not condition:
        raise ConfigError(message)


def known(what: str, name: str, names: list[str]) -> None:
    """Refuses a name that is not among `names`, and says which are near."""
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}"
    require(name in names, f"unknown {what} {name!r}: {hint}")
