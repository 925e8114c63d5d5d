"""Means with intervals, against a textbook's example and tables."""

import math

import pytest

from nflab.statistics import estimate


def test_the_interval_is_students() -> None:
    # Five values of mean 3 and variance 2.5; t of four degrees of freedom at 95 % is 2.776.
    found = estimate([1, 2, 3, 4, 5])
    assert (found.mean, found.count) == (3, 5)
    assert found.std == pytest.approx(math.sqrt(2.5))
    half = 2.7764 * math.sqrt(2.5 / 5)
    assert found.low == pytest.approx(3 - half, abs=1e-4)
    assert found.high == pytest.approx(3 + half, abs=1e-4)
    assert str(found) == "3.00 ± 1.58 (5)"


def test_one_value_says_nothing_of_the_spread() -> None:
    found = estimate([98.5])
    assert (found.mean, found.low, found.high) == (98.5, -math.inf, math.inf)
    assert str(found) == "98.50 (1)"


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no results"):
        estimate([])
