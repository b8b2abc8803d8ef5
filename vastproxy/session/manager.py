"""A session for the length of a block of code."""

from typing import Protocol

import structlog

from vastproxy.errors import VastproxyError
from vastproxy.session.session import UpstreamSession


class Sessions(Protocol):
    """Who makes the session: a :class:`vastproxy.session.factory.SessionFactory`."""

    async def create_session(
        self, user_id: str = "", device_id: str = "", publisher_id: str = ""
    ) -> UpstreamSession:
        """Open a session."""


class SessionManager:
    """
    Opens a session of *factory* when a block is entered, and closes it when it is left.

    What goes wrong in closing is logged; it neither fails the block nor hides how it failed.
    """

    def __init__(
        self, factory: Sessions, user_id: str = "", device_id: str = "", publisher_id: str = ""
    ) -> None:
        self._factory = factory
        self._ids = user_id, device_id, publisher_id
        self._log = structlog.get_logger("vastproxy.session")
        self.session: UpstreamSession | None = None
        """The session while the block runs."""

    async def __aenter__(self) -> UpstreamSession:
        if self.session is not None:
            raise RuntimeError(f"{self!r} is in use (make one manager for each session)")
        self.session = await self._factory.create_session(*self._ids)
        return self.session

    async def __aexit__(self, *_: object) -> None:
        session, self.session = self.session, None
        if session is None:
            return
        try:
            await session.close()
        except (VastproxyError, OSError) as problem:
            self._log.error(
                "session.not_closed", request_id=session.context.request_id, problem=str(problem)
            )

    def __repr__(self) -> str:
        return f"<SessionManager {self.session!r}>"
