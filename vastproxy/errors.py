"""
Every exception of vastproxy, drawn as one tree.

::

    VastproxyError
    ├── ConfigError             the operator's file is wrong; says where, what, and what instead
    ├── VastError               a document cannot be used; carries the VAST code
    │   ├── VastSyntaxError     100: not well-formed, after every repair that is safe
    │   ├── VastSchemaError     101: well-formed, but no VAST that can be followed
    │   ├── VastVersionError    102: a version that is not understood (VAST 1.x)
    │   └── NoAdError           303: the HTTP status says that there is no ad
    ├── UpstreamError           an ad server could not be asked, or did not answer as one
    │   ├── UpstreamConnectError    301: no connection, so nothing was sent
    │   ├── UpstreamTimeoutError    301: no answer in time
    │   ├── UpstreamStatusError     301: an HTTP status that is no success
    │   ├── UpstreamTooLargeError   301: the body passes the cap
    │   ├── UpstreamRefusedError    300: the proxy itself did not ask
    │   ├── RedirectError           300: too many redirects, or one that leads nowhere
    │   └── EgressBlockedError      300: an address that hops may not reach
    ├── StateBackendError       the state backend did not do what it was asked
    │   └── StateAwayError      it cannot be reached, or did not answer in time
    └── TokenError              a sealed token is forged, of somebody else, or expired

The VAST code of a failure is on its class: who reports an error does not decide on it again.
"""

from typing import ClassVar, Literal


class VastproxyError(Exception):
    """The root: everything raised on purpose by vastproxy."""


class ConfigError(VastproxyError):
    """
    A configuration that cannot be used.

    *source* is the file's name; *problems* are the mistakes, all of them, one line each.
    """

    def __init__(self, source: str, problems: tuple[str, ...]) -> None:
        self.source = source
        self.problems = problems
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {each}" for each in problems)]))


class VastError(VastproxyError):
    """A document that cannot be used."""

    vast_code: ClassVar[int] = 900


class VastSyntaxError(VastError):
    """Bytes that are no XML, and cannot safely be made any."""

    vast_code = 100


class VastSchemaError(VastError):
    """XML that is no VAST, or VAST without what is needed to go on."""

    vast_code = 101


class VastVersionError(VastError):
    """A version of VAST that is not understood."""

    vast_code = 102


class NoAdError(VastError):
    """An answer that says by its HTTP status that there is no ad."""

    vast_code = 303


class UpstreamError(VastproxyError):
    """
    An ad server could not be reached, or broke off.

    *reason* is one line for the trace; it never goes to a player.
    """

    vast_code: ClassVar[int] = 301

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class UpstreamConnectError(UpstreamError):
    """
    No connection, so nothing was sent: the one failure after which a request may go out again.

    *local* says that it failed for want of something here, sockets or ports, and that the ad
    server has nothing to do with it; *unknown*, that there is no such name.
    """

    def __init__(self, reason: str, *, local: bool = False, unknown: bool = False) -> None:
        self.local = local
        self.unknown = unknown
        super().__init__(reason)


class UpstreamTimeoutError(UpstreamError):
    """
    No whole answer in time.

    *starved* says that it was not the ad server's own limit that passed, but what an
    earlier hop had left of the deadline; *late*, that it was noticed so late that this process
    must have been busy: an answer may have been there.
    """

    def __init__(self, reason: str, *, starved: bool = False, late: bool = False) -> None:
        self.starved = starved
        self.late = late
        super().__init__(reason)


class UpstreamStatusError(UpstreamError):
    """An HTTP status that carries no document. *status* is the number."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"HTTP status {status}")


class UpstreamTooLargeError(UpstreamError):
    """A body beyond the cap, counted after decompression."""


class UpstreamRefusedError(UpstreamError):
    """
    The proxy did not ask: an open breaker, a rate that is used up, too many calls under way.

    *by* says which of the three, *of* whose it is: an upstream's name, or a site.
    """

    vast_code = 300

    def __init__(
        self, reason: str, *, by: Literal["breaker", "rate_limit", "busy"], of: str = ""
    ) -> None:
        self.by = by
        self.of = of
        super().__init__(reason)


class RedirectError(UpstreamError):
    """Too many redirects, or one without a usable target."""

    vast_code = 300


class EgressBlockedError(UpstreamError):
    """A URL or an address that a third party may not send the proxy to."""

    vast_code = 300


class StateBackendError(VastproxyError):
    """The state backend did not do what it was asked; whether it happened is not known."""


class StateAwayError(StateBackendError):
    """The state backend cannot be reached, or did not answer in time."""


class TokenError(VastproxyError):
    """A sealed token that was not made here for this, was changed, or has expired."""
