"""Chance that can be repeated."""

import os
import random

import pytest


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("NFLAB_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"NFLAB_TEST_SEED={seed} repeats these moments")
    return random.Random(seed)
