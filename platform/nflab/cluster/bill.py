"""What all machines and disks of a cluster on AWS cost while a run goes on.

AWS forgets a machine an hour after its end, so the cluster is looked at again and again, and what
was counted is kept with the run, whose next process goes on from there.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nflab.cluster.inventory import Cluster, Item, client_of, inventory
from nflab.storage.files import write_text
from nflab.terminal.wording import say

LOOK_SECONDS = 30.0
"""Between two looks at the cluster."""


class Bill:
    """A count of what a cluster costs, which adds up from look to look."""

    def __init__(self, file: Path, since: float) -> None:
        """Goes on with what stands in `file`.

        Args:
            since: when this process of the run began, in seconds since 1970: what was before is
                counted, or is none of the run's.
        """
        self.usd: float | None = None
        """So far; None before the first look."""
        self.unpriced: tuple[str, ...] = ()
        """Kinds of machines and disks that have no price, and are not in it."""
        self._file, self._until = file, since
        self._there: dict[str, float | None] = {}
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(file.read_text(encoding="utf-8"))
            self.usd, self.unpriced = float(known["usd"]), tuple(known["unpriced"])

    def add(self, there: Sequence[Item], now: float) -> None:
        """Counts up to now what is there: each machine since it was launched, or since the last
        look. What has gone since then counts as if it had been there until now.

        Raises:
            OSError: what is counted cannot be kept; in this process it is.
        """
        priced = {item.id: item.usd_per_hour for item in there}
        begun = {item.id: max(item.since, self._until) for item in there}
        gone = {key: price for key, price in self._there.items() if key not in priced}
        seconds = {key: max(0.0, now - begun.get(key, self._until)) for key in priced | gone}
        prices = (priced | gone).items()
        usd = sum((price or 0.0) * seconds[key] / 3600 for key, price in prices)
        without = {item.kind for item in there if item.usd_per_hour is None}
        self.unpriced = tuple(sorted({*self.unpriced, *without}))
        self.usd = (self.usd or 0.0) + usd
        self._there, self._until = priced, max(now, self._until)
        kept = {"usd": self.usd, "unpriced": self.unpriced}
        write_text(str(self._file), json.dumps(kept), patience=0)


class Meter:
    """Looks at a cluster as long as a run goes on."""

    def __init__(self, cluster: Cluster, bill: Bill) -> None:
        self.bill = bill
        self._cluster = cluster
        self._client: Any = None
        self._looking, self._ended = threading.Lock(), threading.Event()

    def look(self) -> str | None:
        """Counts up to now, unless the count has ended; returns why AWS does not tell."""
        with self._looking:
            if self._ended.is_set():
                return None
            try:
                self._client = self._client or client_of(self._cluster)
                there = inventory(self._cluster, self._client)
            except Exception as error:  # of boto3, and of the network below it: it may pass
                self._client = None  # one that found no keys never has any
                return (str(error).splitlines() or [type(error).__name__])[0]
            with suppress(OSError):  # a disk that is full: the next look may find room
                self.bill.add(there, time.time())
        return None

    def watch(self) -> None:
        """Looks every LOOK_SECONDS."""
        while not self._ended.wait(LOOK_SECONDS):
            self.look()

    def settle(self) -> None:
        """Looks a last time: from now on nothing is counted."""
        if not self._ended.is_set():  # else it may wait for AWS
            self.look()
            self.stop()

    def stop(self) -> None:
        """From now on nothing is counted."""
        self._ended.set()


@contextmanager
def metered(cluster: Cluster | None, file: Path, since: float) -> Iterator[Meter | None]:
    """Counts what a cluster costs while the block runs, if it is on AWS.

    Args:
        file: of the count (see `Bill`).
        since: when the run, or this process of it, began, in seconds since 1970.
    """
    if cluster is None:
        yield None
        return
    meter = Meter(cluster, Bill(file, since))
    reason = meter.look()
    if reason is not None:
        say(f"what the whole cluster costs is counted when AWS tells what it has: {reason}")
    threading.Thread(target=meter.watch, name="meter", daemon=True).start()
    try:
        yield meter
    finally:
        meter.stop()
