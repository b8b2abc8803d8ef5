"""
What a state backend promises. Memory, Redis and SQL keep it alike; one set of tests holds them.

Counters that change together live in one *account*: a viewer's, or a campaign's. An *operation*
is one ad that may be shown. Its caller chooses its id, so every call may be repeated:

- :meth:`StateBackend.reserve` takes room under every limit of a hold, or under none;
- :meth:`StateBackend.confirm` counts what was reserved, because the ad was shown;
- :meth:`StateBackend.void` gives the room back.

Rule 1: reserved and counted together never pass a limit, whoever asks at the same time.
Rule 2: a reservation that nobody confirms frees itself when its time is over.
Rule 3: a confirmation always counts, once: also late, after a void, and where nothing was ever
reserved. What was shown was shown; it is the only way past a limit.
Rule 4: time is the backend's own, never that of the process that asks.
Rule 5: a call that fails raises StateBackendError, and may or may not have happened.

Amounts are integers: one for an ad that is counted, micro-units of a currency for money.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Literal, Protocol, Self, runtime_checkable

from vastproxy.errors import StateBackendError

MICROS = 1_000_000
"""Micro-units in one unit of a currency."""

MAX_AMOUNT = 2**53 - 1
"""The largest sum that every backend counts exactly: Lua has doubles. Nine billion units."""

DAY_MS = 86_400_000

MAX_ITEMS = 50
"""Items kept for one account, as cookies in a browser for one site: RFC 6265 section 6.1."""

MAX_ITEM_BYTES = 4_096
"""Bytes of all items of an account, names and values."""

PIECES = 1_000
"""A rolling window is counted in so many pieces: what is counted stays a thousandth too long."""

BUDGET_PREFIX = "budget:"
"""Of a key that means a campaign's account: ``get_spend("budget:spring")``."""

MONEY_KEY = "spent"
"""The one counter of a campaign's account."""


@dataclass(frozen=True, slots=True, order=True)
class Account:
    """Counters that live, and change, together."""

    kind: Literal["viewer", "campaign"]
    name: str
    """Of a viewer: a keyed hash, never the id itself."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Window:
    """Which confirmations count."""

    kind: Literal["rolling", "fixed", "calendar", "lifetime"] = "lifetime"
    ms: int = 0
    """Of ``rolling``: how long each counts. Of ``fixed``: how long all do, from the first on."""
    bounds: tuple[int, ...] = ()
    """Of ``calendar``: when periods begin, in Unix milliseconds, ascending, from well before now
    to well behind it. The backend's clock says which of them it is."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One counter of an account that an ad would take from."""

    key: str
    """Names the counter within its account, and goes with one window for ever."""
    amount: int = 1
    limit: int | None = None
    """The most that may be counted and reserved; None: count only."""
    window: Window = Window()
    enforced: bool = True
    """False: where there is no room the claim is left out, and the hold is granted without it."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What one operation takes from one account."""

    account: Account
    operation: str
    """Chosen by the caller; unique within the account. Up to 100 printable ASCII characters."""
    claims: tuple[Claim, ...]
    ttl_ms: int = 600_000
    """How long a reservation waits for its confirmation, and how long a void is remembered."""
    keep_ms: int = DAY_MS
    """How long a confirmed operation is remembered, so that a repetition counts nothing."""
    lease: str = ""
    """The operation that reserved room for this one and others beforehand: confirming takes the
    amounts out of that reservation."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a reservation."""

    granted: bool
    refused: int | None = None
    """The first claim without room, by its place in the hold; None also where the operation had
    been voided before."""
    over: tuple[int, ...] = ()
    """Claims that are not enforced, had no room, and are not part of the reservation."""


Booking = Literal["booked", "late", "again"]
"""``booked``: counted, and room had been kept; ``late``: counted without; ``again``: counted
before."""


@dataclass(frozen=True, slots=True)
class Level:
    """What stands on one counter now."""

    counted: int = 0
    reserved: int = 0


@runtime_checkable
class StateBackend(Protocol):
    """
    Keeps counters, money and small items.

    Made from a URL; opened by ``async with``. All methods raise StateBackendError.
    """

    # --- Plain counters -------------------------------------------------------------------------

    async def get_count(self, key: str) -> int:
        """Give the count of *key*; 0 for none, and for one that has expired."""

    async def increment(self, key: str, amount: int = 1) -> int:
        """Add *amount* to *key*, atomically, and give the new count."""

    async def set_expiry(self, key: str, seconds: float) -> None:
        """Let the count of *key* vanish in *seconds*; nothing happens where there is none."""

    async def get_spend(self, key: str) -> Decimal:
        """Give what was spent on *key*: the confirmed money of campaign X for ``budget:X``."""

    async def add_spend(self, key: str, amount: Decimal | float | str) -> Decimal:
        """Add *amount*, in units of currency, exactly, and give the new total."""

    # --- Operations -----------------------------------------------------------------------------

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*, in their order, each wholly or not at all."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count the claims of each of *holds*: those that count, with their final amounts."""

    async def void(self, holds: Sequence[Hold]) -> None:
        """
        Release *holds*; what was confirmed stays counted, and a later reserve is refused.

        That is remembered for the hold's ``ttl_ms``: a reserve that was on its way comes sooner.
        """

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell what stands on the counters of *claims*, of which key and window matter."""

    async def keys(self, account: Account) -> list[str]:
        """Give the keys of the counters that are kept of *account*, in any order."""

    async def forget(self, account: Account) -> bool:
        """Remove all that is kept of *account*; whether there was anything."""

    # --- Small items ----------------------------------------------------------------------------

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*, the longest unchanged first."""

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """
        Set (or, with None, remove) items, each by itself; others stay as they are.

        All items of the account then live for *seconds*. Beyond MAX_ITEMS or MAX_ITEM_BYTES the
        longest unchanged are dropped.
        """

    # --- Life -----------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Return when nothing that was asked for is pending."""

    async def sweep(self) -> int:
        """Delete what has expired, where that does not happen by itself; tell how many rows."""

    async def ping(self) -> None:
        """Return if the backend can be used now; make it usable where it is new."""

    async def close(self) -> None:
        """Release connections."""

    async def __aenter__(self) -> Self:
        """Open, without waiting for a server."""

    async def __aexit__(self, *_: object) -> None:
        """Close."""


def micros(amount: Decimal | float | str) -> int:
    """
    Turn units of currency into micro-units, to the nearest.

    Of a float, the decimal that it is written as counts: 0.1 is a tenth. Raises ValueError for
    what is no finite number, or is beyond MAX_AMOUNT.
    """
    try:
        number = Decimal(str(amount)) * MICROS
        whole = int(number.to_integral_value(rounding=ROUND_HALF_EVEN))
    except (ArithmeticError, ValueError):
        raise ValueError(f"{amount!r} is no amount of money") from None
    if abs(whole) > MAX_AMOUNT:
        raise ValueError(f"{amount!r} is more money than can be counted")
    return whole


def units(amount: int) -> Decimal:
    """Turn micro-units into units of currency, exactly: 2.5, 10, 0.0025."""
    number = Decimal(amount) / MICROS
    return number.quantize(Decimal(1)) if number == number.to_integral_value() else number


def campaign_of(key: str) -> Account:
    """Give the account that *key* of ``get_spend`` and ``add_spend`` means."""
    return Account("campaign", key.removeprefix(BUDGET_PREFIX))


def check_hold(hold: Hold) -> None:
    """Raise StateBackendError for a hold that no backend can keep: a mistake of the caller."""
    operation = hold.operation
    if not (0 < len(operation) <= 100 and operation.isascii() and operation.isprintable()):  # noqa: PLR2004 - as Hold says
        raise StateBackendError(f"{operation!r} is no id of an operation")
    keys = [each.key for each in hold.claims]
    if not keys or len(set(keys)) < len(keys):
        raise StateBackendError(f"a hold needs claims, each with its own key: {keys}")
    if hold.account.kind == "campaign":
        _check_money(keys, hold.claims[0].window)
    if any(not 0 <= each.amount <= MAX_AMOUNT for each in hold.claims):
        raise StateBackendError("an amount is negative, or more than can be counted")
    windows = [each.window for each in hold.claims]
    if any(each.kind == "calendar" and not each.bounds for each in windows):
        raise StateBackendError("a window of a calendar does not say when its periods begin")
    if any(each.kind in {"rolling", "fixed"} and each.ms < 1 for each in windows):
        raise StateBackendError("a window of no length holds nothing")


def check_holds(holds: Sequence[Hold]) -> None:
    """Check each of *holds* before anything is changed for the first of them."""
    for each in holds:
        check_hold(each)


def _check_money(keys: list[str], window: Window) -> None:
    if keys != [MONEY_KEY]:
        raise StateBackendError(f"a campaign has the counter {MONEY_KEY!r} only, not {keys}")
    if window.kind != "lifetime":
        raise StateBackendError(
            f"a campaign's money counts for its lifetime, not in a {window.kind} window"
            " (leave the window out)"
        )


def money(amount: int, limit: int | None = None) -> Claim:
    """Claim *amount* micro-units of a campaign, of *limit* in all."""
    return Claim(MONEY_KEY, amount, limit)
