"""
Ask upstreams in their order until one has an ad, and the next one where one takes too long.

What decides is :mod:`vastproxy.flow.waterfall`; here is only waiting. It is the same for the proxy
(:class:`vastproxy.flow.ad_server.AdServer`) and for :class:`UpstreamSelector`, which is for code
that wants what an upstream answered, wrappers and all. Where the wrappers have to be followed
before an answer is one, and caps and budgets kept on the way, the ad server does it all.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from vastproxy.errors import UpstreamError
from vastproxy.flow.waterfall import Waterfall
from vastproxy.session.context import SessionContext
from vastproxy.session.cookies import CookieJar
from vastproxy.session.factory import UID, SessionFactory
from vastproxy.upstream.upstream import VastUpstream

Ask = Callable[[int], Awaitable[bool]]
"""Asks the upstream at a place in the order; tells whether it has an ad."""


async def first_with_ad(
    soft_timeouts: Sequence[float | None], ask: Ask, late: Callable[[int], None] = lambda _: None
) -> int | None:
    """
    Give the place of the upstream whose ad wins; None: nobody has any.

    *soft_timeouts* are those of the upstreams in their order, in seconds; *late* is told whose has
    passed. Who is still asked when somebody has won is cancelled, and has ended when this returns.
    """
    waterfall = Waterfall(soft_timeouts)
    if waterfall.staggers:
        try:
            return await _staggered(waterfall, ask, late)
        except BaseExceptionGroup as group:
            # A mistake is told as where there is no group.
            raise group.exceptions[0] from None
    # As most do. A task for each would cost more than the rest of this file.
    while (start := waterfall.next(0.0)) is not None:
        waterfall.ended(start.at, ad=await ask(start.at))
    return waterfall.winner


async def _staggered(waterfall: Waterfall, ask: Ask, late: Callable[[int], None]) -> int | None:
    clock = asyncio.get_running_loop().time
    running: dict[asyncio.Task[bool], int] = {}
    async with asyncio.TaskGroup() as group:
        while not waterfall.over:
            while (start := waterfall.next(clock())) is not None:
                if start.late is not None:
                    late(start.late)
                running[group.create_task(_asked(ask, start.at))] = start.at
            wakes_at = waterfall.wakes_at
            left = None if wakes_at is None else max(0.0, wakes_at - clock())
            done, _ = await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                waterfall.ended(running.pop(task), ad=task.result())
        for task in running:
            task.cancel()
    return waterfall.winner


async def _asked(ask: Ask, at: int) -> bool:
    return await ask(at)


class UpstreamSelector:
    """
    Asks *primary*, then each of *fallbacks*.

    *factory* makes the sessions; None makes one that counts nothing.
    """

    def __init__(
        self,
        primary: VastUpstream,
        *fallbacks: VastUpstream,
        factory: SessionFactory | None = None,
    ) -> None:
        self.upstreams = (primary, *fallbacks)
        self._factory = SessionFactory() if factory is None else factory

    async def serve_with_fallback(self, user_id: str = "") -> str | None:
        """
        Give the first answer that has an ad; None where nobody has one.

        All upstreams are asked as one ad request: with the same correlator, and with cookies that
        go back to the site that set them, as in one session. An upstream that exceeds its soft
        limit is not waited for any longer before the next one is asked too.
        """
        context = self._factory.context(cookies={UID: user_id} if user_id else None)
        jar = self._factory.jar()
        answers: dict[int, str] = {}

        async def ask(at: int) -> bool:
            answer = await self._answer(self.upstreams[at], context, jar)
            if answer is not None:
                answers[at] = answer
            return answer is not None

        winner = await first_with_ad([each.soft_timeout for each in self.upstreams], ask)
        return None if winner is None else answers[winner]

    async def _answer(
        self, upstream: VastUpstream, context: SessionContext, jar: CookieJar
    ) -> str | None:
        """Give what *upstream* answers, if that has an ad."""
        factory = self._factory
        async with factory.session_of(context, upstream, jar) as session:
            try:
                answer = await session.request()
            except UpstreamError as error:
                factory.log.warning(
                    "session.upstream_failed",
                    upstream=upstream.name,
                    request_id=context.request_id,
                    problem=str(error),
                )
                return None
            return answer if session.ads else None

    def __repr__(self) -> str:
        return f"<UpstreamSelector {[each.name for each in self.upstreams]}>"
