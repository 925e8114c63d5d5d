"""Warm-up and cosine. The authors' numbers are in test_golden.py."""

import pytest

from nfnet import warmup_cosine


def test_corners() -> None:
    assert warmup_cosine(0, 100, 10, 0.4) == 0.0
    assert warmup_cosine(5, 100, 10, 0.4) == pytest.approx(0.2)
    assert warmup_cosine(10, 100, 10, 0.4) == pytest.approx(0.4)
    assert warmup_cosine(55, 100, 10, 0.4) == pytest.approx(0.2)
    assert warmup_cosine(100, 100, 10, 0.4) == 0.0
    assert warmup_cosine(101, 100, 10, 0.4) == 0.0


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert warmup_cosine(0, 100, 0, 0.4) == 0.4
    assert warmup_cosine(0, 0, 0, 0.4) == 0.0


def test_refuses_impossible_steps() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        warmup_cosine(-1, 100, 10, 0.4)
    with pytest.raises(ValueError, match="warmup_steps is 101, expected 0 to total_steps = 100"):
        warmup_cosine(0, 100, 101, 0.4)
