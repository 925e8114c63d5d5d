"""The package as a whole."""

import doctest

import nfnet


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(nfnet)
    assert result.attempted > 0
    assert result.failed == 0


def test_everything_exported_exists_and_is_documented() -> None:
    for name in nfnet.__all__:
        assert getattr(nfnet, name).__doc__, name
