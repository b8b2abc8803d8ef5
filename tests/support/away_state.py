"""A state in memory that can be away, as a server can."""

from collections.abc import Sequence
from decimal import Decimal

from vastproxy.errors import StateAwayError
from vastproxy.state.base import Account, Booking, Claim, Hold, Level, Verdict
from vastproxy.state.memory import InMemoryBackend


class AwayState(InMemoryBackend):
    """Raises StateAwayError for the calls that are named in *away*; counts its flushes."""

    def __init__(self, *away: str) -> None:
        super().__init__()
        self.away = set(away)
        self.flushes = 0

    def _look(self, call: str) -> None:
        if call in self.away:
            raise StateAwayError(f"{call} found nobody")

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, or be away."""
        self._look("reserve")
        return await super().reserve(holds)

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm, or be away."""
        self._look("confirm")
        return await super().confirm(holds)

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void, or be away."""
        self._look("void")
        await super().void(holds)

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell levels, or be away."""
        self._look("levels")
        return await super().levels(account, claims)

    async def get_spend(self, key: str) -> Decimal:
        """Tell what was spent, or be away."""
        self._look("get_spend")
        return await super().get_spend(key)

    async def ping(self) -> None:
        """Answer, or be away."""
        self._look("ping")

    async def flush(self) -> None:
        """Count, or be away."""
        self._look("flush")
        self.flushes += 1
