"""
Cookies of ad servers that are kept for a viewer from one ad request to the next.

A television keeps no cookies; an ad server that knows its viewers by them sees a new one each
time. Here they are kept for it, each for its own site, as everywhere.

Rule 1: what has changed is written, cookie by cookie. Two requests of one viewer at one time lose
nothing of each other's.
Rule 2: without the state the request goes on with an empty jar, and what was set is not kept.
"""

import json
from collections.abc import Callable, Mapping
from typing import Protocol

from vastproxy.session.cookies import Cookie, CookieJar
from vastproxy.state.base import MAX_ITEM_BYTES, Account


class Items(Protocol):
    """What viewer cookies need of a state backend."""

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*."""

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Set or remove items."""


class ViewerCookies:
    """
    The kept cookies of *account*, for one ad request.

    *state* keeps them for *ttl* seconds from the last change; *now* gives Unix seconds.
    """

    def __init__(
        self,
        state: Items,
        account: Account,
        is_public_suffix: Callable[[str], bool],
        *,
        ttl: float,
        now: Callable[[], float],
    ) -> None:
        self._state = state
        self._account = account
        self._ttl = ttl
        self._now = now
        self._is_public_suffix = is_public_suffix
        self._before: dict[str, str] = {}
        self.jar = CookieJar(is_public_suffix)

    async def load(self) -> None:
        """Fill the jar with what is kept. Raises StateBackendError."""
        found = await self._state.read_items(self._account)
        now = self._now()
        kept = {name: cookie for name, value in found.items() if (cookie := _cookie(name, value))}
        alive = [each for each in kept.values() if not each.expired(now)]
        self._before = found
        self.jar = CookieJar(self._is_public_suffix, alive)

    def changes(self) -> dict[str, str | None]:
        """Give what has to be written: new and changed cookies, and None for those that went."""
        # One that is larger than all may be together would drive the others out, and then itself.
        after = {
            name: value
            for name, value in map(_item, self.jar)
            if len(name) + len(value) <= MAX_ITEM_BYTES
        }
        changed: dict[str, str | None] = {
            name: value for name, value in after.items() if self._before.get(name) != value
        }
        return changed | dict.fromkeys(self._before.keys() - after.keys())

    async def save(self) -> None:
        """Write what has changed. Raises StateBackendError."""
        if changes := self.changes():
            await self._state.write_items(self._account, changes, self._ttl)

    def __repr__(self) -> str:
        return f"<ViewerCookies {self.jar!r}>"


def described(items: Mapping[str, str]) -> list[dict[str, str]]:
    """Name the cookies among *items*, and the sites they are for; no values: they name people."""
    cookies = [cookie for name, value in items.items() if (cookie := _cookie(name, value))]
    return [{"name": each.name, "site": each.domain, "path": each.path} for each in cookies]


def _item(cookie: Cookie) -> tuple[str, str]:
    name = [cookie.name, cookie.domain, int(cookie.host_only), cookie.path]
    value = [cookie.value, int(cookie.secure), cookie.expires]
    return json.dumps(name, separators=(",", ":")), json.dumps(value, separators=(",", ":"))


def _cookie(name: str, value: str) -> Cookie | None:
    """Read what :func:`_item` wrote; None for anything else, which may be of another version."""
    try:
        cookie_name, domain, host_only, path = json.loads(name)
        content, secure, expires = json.loads(value)
        ends = None if expires is None else float(expires)
    except (ValueError, TypeError):
        return None
    return Cookie(
        str(cookie_name),
        str(content),
        str(domain),
        host_only=bool(host_only),
        path=str(path),
        secure=bool(secure),
        expires=ends,
    )
