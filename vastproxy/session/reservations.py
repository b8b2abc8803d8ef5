"""
What one ad request has reserved, until it is shown, counted or given back.

A reservation ends in one of three ways: the ad is answered with a beacon, whose coming counts it;
it is counted at once, where no beacon can come back; or nobody keeps it, and leaving the context
gives it back. What is cut off in the middle frees itself when its time is over.
"""

from collections.abc import Sequence
from typing import Protocol, Self

from vastproxy.state.base import Hold, Verdict


class State(Protocol):
    """What reservations need of a state backend."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*."""

    async def confirm(self, holds: Sequence[Hold]) -> Sequence[str]:
        """Count each of *holds*."""

    async def void(self, holds: Sequence[Hold]) -> None:
        """Release *holds*."""


class Reservations:
    """The reservations of one ad request in *state*."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._open: dict[tuple[str, str], Hold] = {}

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*, wholly or not at all. Raises StateBackendError."""
        # Before asking: who is cut off while waiting may have reserved, and gives it back.
        for each in holds:
            self._open[_key(each)] = each
        verdicts = await self._state.reserve(holds)
        for each, verdict in zip(holds, verdicts, strict=True):
            if not verdict.granted:
                del self._open[_key(each)]
        return verdicts

    def keep(self, holds: Sequence[Hold]) -> None:
        """Leave *holds* to a beacon."""
        for each in holds:
            self._open.pop(_key(each), None)

    async def count(self, holds: Sequence[Hold]) -> None:
        """Count *holds* now. Raises StateBackendError."""
        if holds:
            self.keep(holds)
            await self._state.confirm(holds)

    async def release(self, holds: Sequence[Hold]) -> None:
        """Give *holds* back now."""
        if holds:
            await self._state.void(holds)
            self.keep(holds)

    async def close(self) -> None:
        """Give back what nobody kept."""
        await self.release(list(self._open.values()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __len__(self) -> int:
        return len(self._open)

    def __repr__(self) -> str:
        return f"<Reservations open: {len(self)}>"


def _key(hold: Hold) -> tuple[str, str]:
    return str(hold.account), hold.operation
