"""What may be spent on the runs of a sweep or grid."""

from nflab.terminal.wording import money


class Budget:
    """What may be spent on the runs of a sweep or grid, and what has been spent."""

    def __init__(self, limit: float | None = None, spent: float = 0.0) -> None:
        """`limit` and `spent` are in USD; without a limit nothing is ever too much."""
        self.limit, self.spent = limit, spent

    def add(self, usd: float) -> None:
        """Something was spent."""
        self.spent += usd

    @property
    def reached(self) -> bool:
        """Whether no more may be spent."""
        return self.limit is not None and self.spent >= self.limit

    def __str__(self) -> str:
        limit = "no limit" if self.limit is None else money(self.limit)
        return f"the budget of {limit} is reached, with {money(self.spent)} spent"
