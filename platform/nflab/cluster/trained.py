"""When jobs last trained, as the head of a cluster is told.

Epochs may take hours, and only workers know that their steps go on. So they say it themselves, each
minute, to Ray's store of keys on the head. There the driver reads it, and the timer that ends a
cluster at which nobody works (cluster/idle.py).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import ray
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_exists,
    _internal_kv_get,
    _internal_kv_put,
)

EVERY_SECONDS = 60.0
"""Between two words of a worker."""

_SPACE = b"nflab-trained"


@contextmanager
def training() -> Iterator[None]:
    """In the driver: while the block runs, this job is there to train, and nothing else."""
    _say()
    try:
        yield
    finally:
        with suppress(Exception):  # the head, or this process's connection, has gone
            _internal_kv_del(_key(), namespace=_SPACE)


def progress() -> Callable[[], None]:
    """In a worker: what to call as often as one likes while it trains or evaluates."""
    due = 0.0

    def progressed() -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        due = time.monotonic() + EVERY_SECONDS
        with suppress(Exception):
            waited_for = _internal_kv_exists(_key(), namespace=_SPACE)
            if waited_for:
                _say()

    return progressed


def seconds_since() -> float:
    """In the driver, while it is there to train: since when nothing did."""
    told = _internal_kv_get(_key(), namespace=_SPACE)
    return 0.0 if told is None else time.time() - float(told)


def by_job(address: str) -> dict[str, float]:
    """On the head: when each job that is there to train last did, in seconds since 1970, by Ray's
    id of its driver; it may have ended.

    Args:
        address: of the head's GCS.

    Raises:
        ray.exceptions.RayError: it does not answer.
    """
    store = ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]
    keys = store.internal_kv_keys(b"", _SPACE)
    found = {key.decode(): store.internal_kv_get(key, _SPACE) for key in keys}
    return {job: float(told) for job, told in found.items() if told is not None}


def _say() -> None:
    with suppress(Exception):  # training does not depend on it
        _internal_kv_put(_key(), str(time.time()), overwrite=True, namespace=_SPACE)


def _key() -> str:
    return str(ray.get_runtime_context().get_job_id())
