"""
Beacons: the proxy's own impressions, whose coming counts an ad.

Rule 1: a beacon says all that is needed to count it, sealed; any process can take it, and nobody
can make one.
Rule 2: taking it twice counts once: the operation's id is in it.
Rule 3: whatever comes as a token, nothing is raised: a player waits for no explanation.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import structlog

from vastproxy.errors import StateBackendError, TokenError
from vastproxy.session.seals import Seal
from vastproxy.state.base import Hold
from vastproxy.state.guard import GuardedState
from vastproxy.state.records import dumped, loaded

PATH = "/beacon/"
"""Where beacons are taken."""
SUFFIX = ".gif"
"""Of a beacon's URL where the player wants to see a picture."""

Result = Literal["counted", "late", "again", "deferred", "forged"]


def _worst(bookings: Sequence[str]) -> Result:
    """Sum up what came of a beacon's holds in the word that an operator should see."""
    if "deferred" in bookings:
        return "deferred"
    if "late" in bookings:
        return "late"
    return "counted" if "booked" in bookings else "again"


class Beacons:
    """
    Makes beacons, and takes them.

    *ttl* is how long one is taken, in seconds; *now* gives Unix seconds.
    """

    def __init__(
        self, seal: Seal, state: GuardedState, *, ttl: float, now: Callable[[], float]
    ) -> None:
        self._seal = seal
        self._state = state
        self._ttl = ttl
        self._now = now
        self._log = structlog.get_logger("vastproxy.beacons")

    def url(self, base: str, holds: Sequence[Hold]) -> str:
        """Make the URL below *base* whose request counts *holds*; empty for none."""
        if not holds:
            return ""
        return f"{base}{PATH}{self._seal.close(dumped(holds).encode(), self._now())}"

    async def take(self, token: str) -> Result:
        """Count what *token* says, once; tell what came of it."""
        now = self._now()
        try:
            holds = self._opened(token.removesuffix(SUFFIX), now)
        except (TokenError, StateBackendError) as error:
            self._log.info("beacon.refused", problem=str(error))
            return "forged"
        return _worst(await self._state.confirm(holds))

    def _opened(self, token: str, now: float) -> list[Hold]:
        holds = loaded(self._seal.open(token, now, self._ttl), int(now * 1000))
        # A longer time for beacons, after a reload, is none for those of before: what they count
        # may have been counted, and forgotten.
        if self._seal.age(token, now) * 1000 > min(each.keep_ms for each in holds):
            raise TokenError("this token is older than what is remembered")
        return holds

    def __repr__(self) -> str:
        return f"<Beacons {self._seal!r}, {self._state!r}>"
