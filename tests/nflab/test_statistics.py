"""Means with intervals, against a textbook's example and tables."""

import math

import pytest

from nflab.analysis.statistics import estimate, verdict


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


def test_intervals_that_are_read_together_are_wider() -> None:
    # t of four degrees of freedom at 97.5 % is 3.495.
    found = estimate([1, 2, 3, 4, 5], comparisons=2)
    assert found.high == pytest.approx(3 + 3.4954 * math.sqrt(2.5 / 5), abs=1e-3)
    assert "97.5 % interval" in verdict(found)


def test_what_differences_tell() -> None:
    assert verdict(estimate([1.0, 1.1, 0.9])).endswith("3 seeds)")
    assert verdict(estimate([1.0, -1.1, 0.9])).endswith("not distinguishable from none")
    # Accuracies come in steps: two equal ones are not certainty.
    assert verdict(estimate([0.28, 0.28])).endswith("too few to tell")
