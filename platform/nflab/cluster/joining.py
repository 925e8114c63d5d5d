"""Machines that a cloud launched and that never joined the cluster: a loop that costs money.

A driver that does not load, a disk's key that may not be used, a command that fails: Ray's
autoscaler ends such a machine and launches the next, for ever.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from ray.autoscaler.tags import STATUS_UP_TO_DATE

IN_A_ROW = 3
"""Machines of a type that never join, one after the other, before it is left out."""

LEFT_OUT_SECONDS = 3600.0
"""For how long."""

VISIBLE_SECONDS = 60.0
"""By then a machine that was launched has stood in the cloud's lists, or never will."""


class Joining:
    """Follows machines from their launch until they have joined, or are gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: dict[str, tuple[str, float]] = {}
        self._seen: set[str] = set()
        self._failed: Counter[str] = Counter()
        self._until: dict[str, float] = {}

    def launched(self, machines: Iterable[str], node_type: str) -> None:
        """Machines of a type are on their way."""
        with self._lock:
            self._coming |= {machine: (node_type, time.time()) for machine in machines}

    def found(self, there: Mapping[str, str | None]) -> None:
        """What the cloud has now.

        Args:
            there: id of each machine of the cluster that is not gone -> its `ray-node-status`.
        """
        now = time.time()
        with self._lock:
            for machine, (node_type, since) in list(self._coming.items()):
                if there.get(machine) == STATUS_UP_TO_DATE:
                    self._failed[node_type] = 0
                    self._until.pop(node_type, None)
                elif machine in there:
                    self._seen.add(machine)
                    continue
                elif machine not in self._seen and now < since + VISIBLE_SECONDS:
                    continue
                else:
                    self._failed[node_type] += 1
                    if self._failed[node_type] >= IN_A_ROW:
                        self._until[node_type] = now + LEFT_OUT_SECONDS
                del self._coming[machine]
                self._seen.discard(machine)

    def left_out(self, node_type: str) -> str | None:
        """Why no machine of the type is to be launched now; None if one may be.

        After its time a type may come again; the first that fails then leaves it out anew.
        """
        with self._lock:
            until, failed = self._until.get(node_type, 0.0), self._failed[node_type]
        if time.time() >= until:
            return None
        clock = time.strftime("%H:%M UTC", time.gmtime(until))
        return (
            f"{failed} machines in a row went away before they joined the cluster, so it is left "
            f"out until {clock}; make logs says what failed"
        )
