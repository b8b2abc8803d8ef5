"""
A reverse proxy in front of video ad servers, and the classes that it is built from.

Start reading at :mod:`vastproxy.flow.ad_server`; the map is in ``docs/design.md``, and how to use
the classes without the proxy in ``docs/library.md``.

Names are looked up when they are first used: importing this package alone imports nothing, and
what needs a client of Redis or a database is imported only by who uses it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

from vastproxy.version import __version__

if TYPE_CHECKING:
    from vastproxy.errors import StateBackendError, UpstreamError, UpstreamTimeoutError
    from vastproxy.flow.ad_server import AdServer
    from vastproxy.flow.operator import SessionOperator
    from vastproxy.flow.selector import UpstreamSelector
    from vastproxy.observe.metrics import RequestMetrics
    from vastproxy.session.context import SessionContext
    from vastproxy.session.factory import SessionFactory
    from vastproxy.session.manager import SessionManager
    from vastproxy.session.session import UpstreamSession, VastSession
    from vastproxy.state.base import StateBackend
    from vastproxy.state.budgets import BudgetMetrics
    from vastproxy.state.database import DatabaseBackend
    from vastproxy.state.memory import InMemoryBackend
    from vastproxy.state.redis import RedisBackend
    from vastproxy.upstream.cache import ResponseCache
    from vastproxy.upstream.limiter import RateLimiter
    from vastproxy.upstream.resolver import VastChainResolver
    from vastproxy.upstream.upstream import VastUpstream

__all__ = [
    "AdServer",
    "BudgetMetrics",
    "DatabaseBackend",
    "InMemoryBackend",
    "RateLimiter",
    "RedisBackend",
    "RequestMetrics",
    "ResponseCache",
    "SessionContext",
    "SessionFactory",
    "SessionManager",
    "SessionOperator",
    "StateBackend",
    "StateBackendError",
    "UpstreamError",
    "UpstreamSelector",
    "UpstreamSession",
    "UpstreamTimeoutError",
    "VastChainResolver",
    "VastSession",
    "VastUpstream",
    "__version__",
]

_HOMES: Final = {
    "AdServer": "flow.ad_server",
    "BudgetMetrics": "state.budgets",
    "DatabaseBackend": "state.database",
    "InMemoryBackend": "state.memory",
    "RateLimiter": "upstream.limiter",
    "RedisBackend": "state.redis",
    "RequestMetrics": "observe.metrics",
    "ResponseCache": "upstream.cache",
    "SessionContext": "session.context",
    "SessionFactory": "session.factory",
    "SessionManager": "session.manager",
    "SessionOperator": "flow.operator",
    "StateBackend": "state.base",
    "StateBackendError": "errors",
    "UpstreamError": "errors",
    "UpstreamSelector": "flow.selector",
    "UpstreamSession": "session.session",
    "UpstreamTimeoutError": "errors",
    "VastChainResolver": "upstream.resolver",
    "VastSession": "session.session",
    "VastUpstream": "upstream.upstream",
}
"""Where each name is at home."""


def __getattr__(name: str) -> object:
    """Find a name of the library where it is at home (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{home}"), name)
    return found


def __dir__() -> list[str]:
    """Name everything, also what was not imported yet."""
    return sorted({*globals(), *__all__})
