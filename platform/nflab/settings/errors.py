"""What is told when something that was asked for cannot be done."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence for the user."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition`."""
    if not condition:
        raise ConfigError(message)
