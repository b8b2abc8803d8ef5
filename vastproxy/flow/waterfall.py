"""
The waterfall: which upstream is asked next, and whose ad wins. Nothing here waits.

Rule 1: upstreams are started in their order, one at first.
Rule 2: the next is started when the one that was started last has ended without an ad, or when its
soft limit has passed. One that was overtaken and ends without an ad starts nobody.
Rule 3: of those that have ended with an ad, the first in the order wins. Nobody waits for one
before it that is still under way.
Rule 4: when somebody has won, or all have ended, it is over. Those that still run have lost.

Deadlines are no business of this file: whoever is asked ends by itself when there is no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Start:
    """An upstream to be started, by its place in the order."""

    at: int
    late: int | None = None
    """Whose soft limit has passed; None: nobody's, all before it have ended."""


class Waterfall:
    """
    The state of one ad request's upstreams.

    *soft_timeouts* are theirs, in seconds; None: it may take its time. Whoever drives it asks
    :meth:`next` until that is None, sleeps until :attr:`wakes_at` or until somebody ends, says so
    by :meth:`ended`, and begins again until it is :attr:`over`.
    """

    def __init__(self, soft_timeouts: Sequence[float | None]) -> None:
        self._soft = soft_timeouts
        self._started = 0
        self._ended: set[int] = set()
        self.winner: int | None = None
        """Whose ad is answered."""
        self.wakes_at: float | None = None
        """When the soft limit of the one that was started last passes, if that starts another."""

    @property
    def staggers(self) -> bool:
        """Whether two may ever run at one time."""
        return any(each is not None for each in self._soft[:-1])

    def next(self, now: float) -> Start | None:
        """Say who is to be started *now*, if anybody; it counts as started from then on."""
        if self.winner is not None or self._started == len(self._soft):
            return None
        late = None
        if self._started and self._started - 1 not in self._ended:
            if self.wakes_at is None or now < self.wakes_at:
                return None
            late = self._started - 1
        return Start(self._begin(now), late)

    def _begin(self, now: float) -> int:
        at = self._started
        self._started += 1
        limit = None if self._started == len(self._soft) else self._soft[at]
        self.wakes_at = None if limit is None else now + limit
        return at

    def ended(self, at: int, *, ad: bool) -> None:
        """Take note that the one at place *at* has ended, with an ad or without."""
        self._ended.add(at)
        if ad and (self.winner is None or at < self.winner):
            self.winner = at
        if at == self._started - 1:
            self.wakes_at = None

    @property
    def over(self) -> bool:
        """Whether there is nothing to start and nothing to wait for."""
        return self.winner is not None or len(self._ended) == len(self._soft)

    def __repr__(self) -> str:
        running = [at for at in range(self._started) if at not in self._ended]
        return f"<Waterfall of {len(self._soft)}, running: {running}, winner: {self.winner}>"
