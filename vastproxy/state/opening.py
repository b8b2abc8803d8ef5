"""From the URL of a state to its backend. Clients of servers are imported where they are needed."""

from vastproxy.config.units import StateUrl
from vastproxy.state.base import StateBackend
from vastproxy.state.memory import InMemoryBackend


def backend_of(url: StateUrl) -> StateBackend:
    """
    Make the backend of *url*; it waits for no server before it is asked something.

    Raises StateBackendError where what it needs is not installed.
    """
    match url.kind:
        case "memory":
            return InMemoryBackend()
        case "redis" | "cluster":
            from vastproxy.state.redis import RedisBackend  # noqa: PLC0415 - takes 0.1 s

            return RedisBackend(url.url)
        case "sqlite" | "postgresql":
            from vastproxy.state.database import DatabaseBackend  # noqa: PLC0415 - an extra

            return DatabaseBackend(url.url)
