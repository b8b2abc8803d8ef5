"""
Holds as text: in sealed beacons, and in the journal.

What is written down is what a confirmation needs: account, operation, keys and amounts. Limits are
left out, since a confirmation always counts; windows are in the keys.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from vastproxy.errors import StateBackendError
from vastproxy.state.base import Account, Hold, check_hold
from vastproxy.state.windows import claim_of

_KINDS: dict[str, Literal["viewer", "campaign"]] = {"v": "viewer", "c": "campaign"}


def dumped(holds: Sequence[Hold]) -> str:
    """Write *holds*: one line of JSON."""
    return json.dumps([_record(each) for each in holds], separators=(",", ":"))


def _record(hold: Hold) -> list[Any]:
    amounts = {each.key: each.amount for each in hold.claims}
    record = [hold.account.kind[0], hold.account.name, hold.operation, hold.keep_ms, amounts]
    return [*record, hold.lease] if hold.lease else record


def loaded(text: str | bytes, now: int) -> list[Hold]:
    """
    Read what :func:`dumped` wrote, with windows around *now*, in Unix milliseconds.

    Raises StateBackendError for anything else.
    """
    try:
        return [_hold(now, each) for each in json.loads(text)]
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise StateBackendError(f"no record of holds: {error}") from None
    except RecursionError:
        raise StateBackendError("no record of holds: lists in lists") from None


def _hold(now: int, record: list[Any]) -> Hold:
    kind, name, operation, keep, amounts, *lease = record
    if not (isinstance(name, str) and isinstance(operation, str)):
        raise TypeError("a name that is no text")
    claims = tuple([claim_of(key, int(amount), now) for key, amount in amounts.items()])
    hold = Hold(Account(_KINDS[kind], name), operation, claims, keep_ms=int(keep))
    check_hold(hold)
    return replace(hold, lease=str(lease[0])) if lease else hold
