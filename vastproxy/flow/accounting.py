"""What caps, budgets and kept cookies need, the same for all ad requests of a proxy."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vastproxy.flow.admission import Admission, Terms
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.failures import FailureCounts
from vastproxy.flow.leases import Leases
from vastproxy.session.seals import ViewerNames
from vastproxy.session.viewer_cookies import ViewerCookies
from vastproxy.state.base import Account
from vastproxy.state.guard import GuardedState

FOR_EVER = float("inf")


@dataclass(frozen=True, slots=True)
class Accounting:
    """The state, and who speaks to it. *now* gives Unix seconds."""

    state: GuardedState
    beacons: Beacons
    leases: Leases
    names: ViewerNames
    is_public_suffix: Callable[[str], bool]
    now: Callable[[], float]
    failures: FailureCounts = field(init=False)
    """How often upstreams failed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", FailureCounts(self.state))

    def admission(self, terms: Terms, viewer: str, deadline: float = FOR_EVER) -> Admission:
        """
        Begin to decide on the ads for the viewer with the id *viewer*, empty for nobody.

        From *deadline* on, on the loop's clock, nothing is asked any more.
        """
        return Admission(
            terms, self.names.name(viewer), self.state, self.leases, self._milliseconds, deadline
        )

    def _milliseconds(self) -> int:
        return int(self.now() * 1000)

    def cookies(self, viewer: str, ttl: float) -> ViewerCookies | None:
        """Give the kept cookies of *viewer*, which live for *ttl* seconds; None for nobody."""
        if not viewer or not ttl:
            return None
        account = Account("viewer", self.names.name(viewer))
        return ViewerCookies(self.state, account, self.is_public_suffix, ttl=ttl, now=self.now)

    def __repr__(self) -> str:
        return f"<Accounting {self.state!r}>"
