"""Whether a policy of AWS allows a request, by the rules of its documentation: what is denied is
denied, what nothing allows is denied too."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

Statement = Mapping[str, Any]


def allows(statements: Sequence[Statement], action: str, resource: str, **context: str) -> bool:
    """Whether a request passes.

    Args:
        statements: of one policy.
        context: condition keys of the request, with `:` and `/` written `__` and `___`.
    """
    keys = {key.replace("___", "/").replace("__", ":"): value for key, value in context.items()}
    effects = {
        statement["Effect"]
        for statement in statements
        if _matches(statement["Action"], action)
        and _is_of(statement, resource)
        and all(_holds(name, test, keys) for name, test in statement.get("Condition", {}).items())
    }
    return effects == {"Allow"}


def _is_of(statement: Statement, resource: str) -> bool:
    if "NotResource" in statement:
        return not _matches(statement["NotResource"], resource)
    return _matches(statement["Resource"], resource)


def _holds(operator: str, tests: Mapping[str, Any], keys: Mapping[str, str]) -> bool:
    """All keys of one operator; a key that the request lacks fails."""
    assert operator == "StringEquals", f"{operator} is not known here"
    return all(key in keys and keys[key] in _listed(wanted) for key, wanted in tests.items())


def _matches(patterns: str | Sequence[str], text: str) -> bool:
    # The brackets of fnmatch mean nothing to AWS.
    return any(fnmatchcase(text, p.replace("[", "[[]")) for p in _listed(patterns))


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(json.loads(json.dumps(words)))
