"""
Ask one upstream after the other until one has an ad: the waterfall, for code that uses the library.

It gives what an upstream answered, wrappers and all. Where the wrappers have to be followed before
an answer is one, and caps and budgets kept on the way, :class:`vastproxy.flow.ad_server.AdServer`
does the same for the proxy and for the library.
"""

from vastproxy.errors import UpstreamError
from vastproxy.session.factory import UID, SessionFactory
from vastproxy.upstream.upstream import VastUpstream


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
        go back to the site that set them, as in one session.
        """
        factory = self._factory
        context = factory.context(cookies={UID: user_id} if user_id else None)
        jar = factory.jar()
        for upstream in self.upstreams:
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
                    continue
                if session.ads:
                    return answer
        return None

    def __repr__(self) -> str:
        return f"<UpstreamSelector {[each.name for each in self.upstreams]}>"
