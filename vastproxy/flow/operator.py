"""
Serve one ad to code that uses the library: cap, budget, fetch, count.

Rule 1: cap and budget are taken before the ad server is asked, each in one step, and counted when
an ad came. Nothing is read first and written later.
Rule 2: where the state is away, ads are served all the same, and a line of the log says so.
"""

from collections.abc import Awaitable
from decimal import Decimal

import structlog

from vastproxy.errors import StateBackendError, UpstreamError
from vastproxy.session.factory import UID
from vastproxy.session.session import HOUR, VastSession


class SessionOperator:
    """Serves ads in sessions; *window* is how long an ad counts under the cap, in seconds."""

    def __init__(self, *, window: float = HOUR) -> None:
        self._window = window
        self._log = structlog.get_logger("vastproxy.session")

    async def serve_ad(
        self,
        session: VastSession,
        campaign_id: str,
        budget_limit: Decimal | float | str,
        frequency_cap: int = 3,
        *,
        price: Decimal | float | str = 0,
    ) -> str | None:
        """
        Give what the session's upstream answers, and count it; None where no ad may be, or is.

        The viewer is the context's cookie ``uid``; without one there is no cap. *price* is what
        this one ad costs the campaign, in units of currency (at a CPM of 2.50 it is 0.0025); at
        no price, it is only looked whether the campaign has spent its limit.
        """
        if not await self._may_serve(
            session,
            session.check_frequency_cap(
                session.context.cookies.get(UID, ""), frequency_cap, window=self._window
            ),
            "capped",
        ):
            return None
        if not await self._may_serve(
            session, _has_money(session, campaign_id, price, budget_limit), "over_budget"
        ):
            await self._settle(session)
            return None
        try:
            return await self._fetch(session)
        finally:
            await self._settle(session)

    async def _may_serve(
        self, session: VastSession, question: Awaitable[bool], refusal: str
    ) -> bool:
        """Tell whether *question* allows an ad; where the state cannot say it, one is served."""
        request_id = session.context.request_id
        try:
            allowed = await question
        except StateBackendError as error:
            self._log.warning(
                "session.state_away", asked=refusal, request_id=request_id, problem=str(error)
            )
            return True
        if not allowed:
            self._log.info("session.refused", reason=refusal, request_id=request_id)
        return allowed

    async def _fetch(self, session: VastSession) -> str | None:
        before = session.ads
        try:
            answer = await session.request()
        except UpstreamError as error:
            self._log.warning(
                "session.upstream_failed",
                upstream=session.upstream.name,
                request_id=session.context.request_id,
                problem=str(error),
            )
            return None
        return answer if session.ads > before else None

    async def _settle(self, session: VastSession) -> None:
        try:
            await session.settle()
        except StateBackendError as error:
            # The ad is served; closing the session tries again.
            self._log.warning(
                "session.not_settled", request_id=session.context.request_id, problem=str(error)
            )

    def __repr__(self) -> str:
        return f"<SessionOperator window: {self._window:g} s>"


async def _has_money(
    session: VastSession,
    campaign: str,
    price: Decimal | float | str,
    limit: Decimal | float | str,
) -> bool:
    if Decimal(str(price)):
        return await session.reserve_budget(campaign, price, limit)
    return await session.get_budget(campaign) < Decimal(str(limit))
