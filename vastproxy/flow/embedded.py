"""
What an ad server is made of where no configuration made it: for code that uses the library.

The route is made for each call, and the way of the ad is the proxy's. Ads are counted when they are
answered: there is no listener that a beacon could come back to.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal

import structlog

from vastproxy.errors import StateBackendError
from vastproxy.flow.accounting import Accounting
from vastproxy.flow.admission import Terms
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.budgets import Budget
from vastproxy.flow.caps import Cap
from vastproxy.flow.leases import Leases
from vastproxy.flow.reporter import ErrorReporter
from vastproxy.flow.routing import Route
from vastproxy.model import AdResponse
from vastproxy.observe.tasks import Tasks
from vastproxy.session.factory import SessionFactory
from vastproxy.session.seals import Seal, new_secret
from vastproxy.session.session import CAP_SCOPE, HOUR, spendable
from vastproxy.state.base import StateBackend
from vastproxy.state.guard import GuardedState
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.windows import Span
from vastproxy.upstream.upstream import VastUpstream

PATH = "serve_ad"
"""What the route of the library is called in traces and logs."""

STATE_TIMEOUT = 0.25
"""Seconds that an ad waits for the state."""

FLUSH_TIMEOUT = 5.0
"""Seconds that reports still under way get at the end."""

WINDOW = Span("rolling", round(HOUR * 1000))
"""Of the cap. It is the default of a session's, and they share a counter."""


class Embedded:
    """
    The parts of an ad server over *upstreams*, the first of them asked first.

    *state* is the caller's, who opens and closes it; None: one in memory.
    """

    def __init__(
        self,
        upstreams: Sequence[VastUpstream],
        state: StateBackend | None,
        factory: SessionFactory | None,
    ) -> None:
        backend = InMemoryBackend() if state is None else state
        local = isinstance(backend, InMemoryBackend)
        self.upstreams = tuple(upstreams)
        self.factory = SessionFactory() if factory is None else factory
        self.tasks = Tasks("reports")
        self.reporter = ErrorReporter(upstreams[0].client, self.tasks)
        self._state = GuardedState(backend, timeout=STATE_TIMEOUT, local=local)
        self._opening = asyncio.Lock()
        self._is_open = False
        self._log = structlog.get_logger("vastproxy.ads")

    def accounting(self) -> Accounting:
        """Put together what caps and budgets need."""
        factory = self.factory
        beacons = Beacons(Seal((new_secret(),), "beacon"), self._state, ttl=0, now=factory.now)
        return Accounting(
            self._state,
            beacons,
            Leases(self._state, ()),
            factory.names,
            factory.is_public_suffix,
            factory.now,
        )

    def route(
        self,
        campaign: str,
        limit: Decimal | float | str,
        cap: int,
        price: Decimal | float | str | None,
    ) -> Route:
        """Make the route of one ad: its cap by viewer, and its campaign's budget."""
        budget = Budget(
            campaign,
            spendable(limit),
            price=None if price is None else spendable(price),
            count_at="decision",
        )
        caps = (Cap(CAP_SCOPE, cap, WINDOW, count_at="decision"),)
        return Route(PATH, self.upstreams, terms=Terms(caps, budget))

    async def open(self) -> None:
        """
        See, once, whether the state is there; if not, ads are served without it meanwhile.

        Raises StateBackendError where it is there, but cannot be used.
        """
        if self._is_open:
            return
        async with self._opening:
            if not self._is_open:
                await self._state.open()
                self._is_open = True

    def tell(self, campaign: str, answer: AdResponse) -> None:
        """Log what came of one call."""
        self._log.info(
            "ad.served" if answer.ads else "ad.not_served",
            request_id=answer.request_id,
            campaign=campaign,
            upstream=answer.upstream,
            ads=answer.ads,
            hops=answer.hops,
            flags=answer.flags,
            refused=answer.refused,
        )

    async def close(self) -> None:
        """Let reports end, and write what the state has still to be told; it stays open."""
        await self.tasks.wait_idle(FLUSH_TIMEOUT)
        try:
            async with self.tasks:
                if len(self._state.journal):
                    await self._write_journal()
                await self._state.flush()
        finally:
            await self._state.stop()

    async def _write_journal(self) -> None:
        """Count what was served while the state was away; if it still is, that is lost here."""
        with suppress(StateBackendError):
            await self._state.open()
        if waiting := len(self._state.journal):
            self._log.error("ad.not_counted", waiting=waiting)

    def __repr__(self) -> str:
        return f"<Embedded {[each.name for each in self.upstreams]}, {self._state!r}>"
