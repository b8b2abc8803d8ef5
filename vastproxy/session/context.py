"""What one ad request is known by, on every hop. It never changes."""

import secrets
import uuid
from dataclasses import dataclass, field

from vastproxy.model import FrozenMapping

CORRELATOR_BITS = 63
"""Google's ad server wants a positive integer that no other page view uses."""

_REQUEST_NAMESPACE = uuid.UUID("6f1d6b0e-7d0e-5d6f-9d54-9b9b8f6f3f0a")


@dataclass(frozen=True, slots=True)
class SessionContext:
    """The identity of one ad request: frozen, and hashable."""

    timestamp: int
    """When it came in: Unix milliseconds."""
    correlator: str
    """One and the same on every hop."""
    cachebusting: str
    """Eight digits (VAST 4.3 section 6.2)."""
    cookies: FrozenMapping = field(default_factory=FrozenMapping)
    """The player's, for the entry upstream; what upstreams set lives in the session's jar."""
    request_id: str = ""
    """What logs and answers call it."""

    @property
    def transaction_id(self) -> str:
        """
        The ``[TRANSACTIONID]``: a UUID, derived from the request id.

        So two proxies that were given the same request id tell ad servers the same.
        """
        try:
            return str(uuid.UUID(self.request_id))
        except ValueError:
            return str(uuid.uuid5(_REQUEST_NAMESPACE, self.request_id))


def new_correlator() -> str:
    """Make a random positive integer of 63 bits, as text."""
    return str(secrets.randbits(CORRELATOR_BITS) or 1)


def new_cachebusting() -> str:
    """Make eight random digits."""
    return f"{secrets.randbelow(100_000_000):08d}"


def new_request_id() -> str:
    """Make a random request id: a UUID of version 4."""
    return str(uuid.UUID(bytes=secrets.token_bytes(16), version=4))
