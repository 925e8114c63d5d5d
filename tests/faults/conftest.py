"""Chance that can be repeated."""

import os
import random
from collections.abc import Iterator

import pytest

from tests.conftest import stop_marked
from tests.faults.runs import DISTURBED, MARK, STARTED, Run
from tests.faults.stores import Stores


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """Ends what a test that failed has left running."""
    yield
    while STARTED:
        STARTED.pop().kill()
    stop_marked(MARK)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("NFLAB_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"NFLAB_TEST_SEED={seed} repeats these moments")
    return random.Random(seed)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """A training of DISTURBED that nothing happened to."""
    stores = Stores(tmp_path_factory.mktemp("undisturbed"), "train", "u")
    run = Run(stores, "train.py", "--name", "u", *DISTURBED)
    assert run.wait() == 0, run.output()
    return stores
