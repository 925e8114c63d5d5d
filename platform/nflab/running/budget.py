"""What may be spent on a sweep or grid."""

from nflab.cluster.bill import Bill
from nflab.terminal.wording import money


class Budget:
    """What may be spent on a sweep or grid, and what has been spent: on the whole cluster where
    that is counted, else on training."""

    def __init__(self, limit: float | None = None, spent: float = 0.0) -> None:
        """`limit`, and `spent` on training, are in USD; without a limit nothing is ever too
        much."""
        self.limit, self._trained = limit, spent
        self.bill: Bill | None = None
        """Of the whole cluster, where it is counted."""

    def add(self, usd: float) -> None:
        """So much training was paid."""
        self._trained += usd

    @property
    def spent(self) -> float:
        """USD, as far as they are known."""
        # The bill is a while behind, or was not counted from the beginning.
        return max(self._trained, (self.bill and self.bill.usd) or 0.0)

    @property
    def reached(self) -> bool:
        """Whether no more may be spent."""
        return self.limit is not None and self.spent >= self.limit

    def __str__(self) -> str:
        limit = "no limit" if self.limit is None else money(self.limit)
        return f"the budget of {limit} is reached, with {money(self.spent)} spent"
