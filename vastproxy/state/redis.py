"""
State in Redis or Valkey: one server, or a cluster. Exact for all processes that share it.

Rule 1: a decision is one script, which the server runs alone. It takes a list of holds of one
account, so a crowd of reservations for one viewer is one call.
Rule 2: all keys of an account have its name as their hash tag: they live on one node of a cluster.
Rule 3: nothing that may have been run is repeated behind the caller's back. The caller repeats; ids
make that safe.

How holds are written for scripts, and their replies read, is in ``redis_scripts.py``; which server
is asked in ``redis_servers.py``; connections, and how long anything takes, in ``redis_node.py``.

Keys, with the default prefix; ``scripts/account.lua`` says what is in them:

- ``vp:{v:<name>}:c``: counters of a viewer; of a campaign, with ``c:`` instead of ``v:``
- ``vp:{v:<name>}:h`` and ``:e``: its reservations, and when they lapse
- ``vp:{v:<name>}:s``: its settled operations, and until when they are remembered
- ``vp:{v:<name>}:i``: its items
- ``vp:k:<key>``: a plain counter

Settled operations are a sorted set of their account, and not keys of their own: so they go by the
same clock as all else, and forgetting an account removes them without a search.

The server wants ``maxmemory-policy noeviction`` (an evicted counter is a cap that begins anew) and
``appendonly yes`` (else a restart forgets what was counted). A failover may lose what had not been
replicated: Redis' documentation, "Redis replication".
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Self
from urllib.parse import quote

from vastproxy.errors import StateBackendError
from vastproxy.state.base import (
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    MONEY_KEY,
    Account,
    Booking,
    Claim,
    Hold,
    Level,
    Verdict,
    campaign_of,
    check_holds,
    micros,
    units,
)
from vastproxy.state.redis_node import read
from vastproxy.state.redis_scripts import (
    Script,
    Scripts,
    booking_of,
    items_of,
    keys_of,
    level_of,
    rows_of,
    verdict_of,
    written,
)
from vastproxy.state.redis_servers import Call, Servers

HOLDS = 200
"""In one script: it keeps everybody else waiting, about two milliseconds."""

PROBES = 8
"""Keys, on any nodes of a cluster, of which one at least must take a value."""

_PLAIN = "!\"#$&'()*+,-./:;<=>?@[\\]^_`|~"
"""What stays as it is in names within keys: all printable ASCII but braces, which would end the
hash tag, the percent sign, and the space."""


class RedisBackend:
    """
    The backend of ``redis://``, ``rediss://`` and ``unix://``, and of clusters.

    A cluster's *url* begins with ``redis+cluster://`` or ``rediss+cluster://``, and names any of
    its nodes. *clock* gives Unix milliseconds, for tests; None: the server's time. *prefix* begins
    all keys.
    """

    def __init__(
        self, url: str, *, clock: Callable[[], int] | None = None, prefix: str = "vp:"
    ) -> None:
        if "{" in prefix:
            raise StateBackendError(f"prefix {prefix!r} has a brace (write one without, as `vp:`)")
        self._servers = Servers(url)
        self._clock = clock
        self._prefix = prefix
        self._scripts = Scripts.load()

    # --- Plain counters -------------------------------------------------------------------------

    async def get_count(self, key: str) -> int:
        """Give the count of *key*."""
        return read(int, await self._count(key, "get", 0))

    async def increment(self, key: str, amount: int = 1) -> int:
        """Add *amount* to *key*, and give the new count."""
        return read(int, await self._count(key, "add", amount))

    async def set_expiry(self, key: str, seconds: float) -> None:
        """Let the count of *key* vanish in *seconds*."""
        await self._count(key, "expire", int(seconds * 1000))

    async def _count(self, key: str, what: str, number: int) -> object:
        keys = [f"{self._prefix}k:{_tame(key)}"]
        return await self._ask(self._scripts.count.call(keys, self._now(), what, number))

    async def get_spend(self, key: str) -> Decimal:
        """Give what was spent on *key*."""
        counters = self._keys(campaign_of(key), "c")
        spent = await self._ask(Call(counters[0], ("HGET", *counters, f"c|{MONEY_KEY}")))
        return units(read(int, spent or 0))

    async def add_spend(self, key: str, amount: Decimal | float | str) -> Decimal:
        """Add *amount* to *key*, and give the new total."""
        counters = self._keys(campaign_of(key), "c")
        return units(read(int, await self._ask(self._scripts.spend.call(counters, micros(amount)))))

    # --- Operations -----------------------------------------------------------------------------

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*, wholly or not at all."""
        return [read(verdict_of, each) for each in await self._settle(self._scripts.reserve, holds)]

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count the claims of each of *holds*."""
        return [read(booking_of, each) for each in await self._settle(self._scripts.confirm, holds)]

    async def void(self, holds: Sequence[Hold]) -> None:
        """Release *holds*."""
        check_holds(holds)
        await self._servers.ask([self._call(self._scripts.void, part) for _, part in _parts(holds)])

    async def _settle(self, script: Script, holds: Sequence[Hold]) -> list[object]:
        """Run *script* over *holds*, by account, and give what it says of each, in their order."""
        check_holds(holds)
        told: dict[int, object] = {}
        left = _parts(holds)
        while left:
            replies = await self._servers.ask([self._call(script, part) for _, part in left])
            for (places, _), reply in zip(left, replies, strict=True):
                if reply is not None:
                    rows = read(partial(rows_of, count=len(places)), reply)
                    told.update(zip(places, rows, strict=True))
            # Nothing: so many reservations had lapsed that the script only took some of them off.
            left = [part for part, reply in zip(left, replies, strict=True) if reply is None]
        return [told[at] for at in range(len(holds))]

    def _call(self, script: Script, holds: Sequence[Hold]) -> Call:
        keys = self._keys(holds[0].account, "c", "h", "e", "s")
        return script.call(keys, self._now(), written(holds))

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell what stands on the counters of *claims*."""
        if not claims:
            return []
        asked = self._call(self._scripts.levels, [Hold(account, "levels", tuple(claims))])
        while (reply := await self._ask(asked)) is None:
            pass  # As in _settle.
        rows = read(partial(rows_of, count=len(claims)), reply)
        return [read(level_of, each) for each in rows]

    async def keys(self, account: Account) -> list[str]:
        """Give the keys of the counters of *account*."""
        counters = self._keys(account, "c")
        return read(keys_of, await self._ask(Call(counters[0], ("HKEYS", *counters))))

    async def forget(self, account: Account) -> bool:
        """Remove all that is kept of *account*."""
        keys = self._keys(account, "c", "h", "e", "s", "i")
        return read(int, await self._ask(Call(keys[0], ("UNLINK", *keys)))) > 0

    # --- Small items ----------------------------------------------------------------------------

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*."""
        keys = self._keys(account, "i")
        return read(items_of, await self._ask(self._scripts.read_items.call(keys, self._now())))

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Set or remove items, each by itself."""
        told = [
            word
            for name, value in changes.items()
            for word in (name, "drop" if value is None else "set", value or "")
        ]
        await self._ask(
            self._scripts.write_items.call(
                self._keys(account, "i"),
                self._now(),
                *(int(seconds * 1000), MAX_ITEMS, MAX_ITEM_BYTES, *told),
            )
        )

    # --- Life -----------------------------------------------------------------------------------

    def _now(self) -> int | str:
        return self._clock() if self._clock else ""

    def _keys(self, account: Account, *ends: str) -> list[str]:
        tag = f"{self._prefix}{{{account.kind[0]}:{_tame(account.name)}}}"
        return [f"{tag}:{end}" for end in ends]

    async def _ask(self, call: Call) -> object:
        return (await self._servers.ask([call]))[0]

    async def flush(self) -> None:
        """Return at once: nothing is ever pending."""

    async def sweep(self) -> int:
        """Delete nothing: keys expire by themselves, and scripts take off what has ended."""
        return 0

    async def ping(self) -> None:
        """Return if most primaries answer and one can be written to; tell them the scripts."""
        load = [("SCRIPT", "LOAD", each.source) for each in self._scripts.all()]
        await self._servers.everywhere([("PING",), *load])
        keys = [f"{self._prefix}ping:{at}" for at in range(PROBES)]
        written = [self._ask(Call(each, ("SET", each, 1, "PX", 1000))) for each in keys]
        ends = await asyncio.gather(*written, return_exceptions=True)
        problems = [each for each in ends if isinstance(each, BaseException)]
        if len(problems) == len(ends):
            raise problems[0]

    async def close(self) -> None:
        """Release connections."""
        await self._servers.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<RedisBackend {self._servers!r}>"


def _parts(holds: Sequence[Hold]) -> list[tuple[list[int], list[Hold]]]:
    """Part *holds* by account, HOLDS at a time; with each part go their places in *holds*."""
    places: dict[Account, list[int]] = {}
    for at, hold in enumerate(holds):
        places.setdefault(hold.account, []).append(at)
    cut = [each[at : at + HOLDS] for each in places.values() for at in range(0, len(each), HOLDS)]
    return [(each, [holds[at] for at in each]) for each in cut]


def _tame(name: str) -> str:
    """Write *name* so that it can stand within a hash tag."""
    return quote(name.encode("utf-8", "surrogatepass"), safe=_PLAIN)
