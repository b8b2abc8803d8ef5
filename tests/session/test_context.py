"""The identity of one ad request: frozen, hashable, and the same on every hop."""

import uuid
from dataclasses import FrozenInstanceError

import pytest

from vastproxy.model import FrozenMapping
from vastproxy.session.context import (
    SessionContext,
    new_cachebusting,
    new_correlator,
    new_request_id,
)

MANY = 200


def a_context(request_id: str = "r1") -> SessionContext:
    """Build a context with a cookie."""
    return SessionContext(1, "2", "00000003", FrozenMapping({"uid": "me"}), request_id)


def test_context_is_frozen() -> None:
    """No field of a context can be changed."""
    context = a_context()

    with pytest.raises(FrozenInstanceError):
        context.correlator = "other"  # type: ignore[misc]


def test_context_is_hashable() -> None:
    """Equal contexts, cookies and all, are one key of a mapping."""
    assert {a_context(): 1} == {a_context(): 1}
    assert 1 == len({a_context(), a_context()})
    assert a_context("r2") != a_context("r1")


def test_correlators_are_positive_integers_of_63_bits() -> None:
    """A correlator is a positive integer below 2**63, and no two are equal."""
    made = {int(new_correlator()) for _ in range(MANY)}

    assert MANY == len(made)
    assert 0 < min(made)
    assert max(made) < 2**63


def test_cachebusting_has_eight_digits() -> None:
    """A cachebuster is exactly eight digits long."""
    assert {8} == {len(new_cachebusting()) for _ in range(MANY)}
    assert all(new_cachebusting().isdecimal() for _ in range(MANY))


def test_request_ids_are_random_uuids() -> None:
    """A request id is a UUID of version 4, and no two are equal."""
    made = {new_request_id() for _ in range(MANY)}

    assert MANY == len(made)
    assert {4} == {uuid.UUID(each).version for each in made}


def test_transaction_id_is_a_request_id_that_is_a_uuid() -> None:
    """A request id that is a UUID is the transaction id as well."""
    request_id = new_request_id()

    assert request_id == a_context(request_id).transaction_id


@pytest.mark.parametrize("request_id", ["r1", "", "0f/x+=:._-"])
def test_transaction_id_is_derived_from_any_other_request_id(request_id: str) -> None:
    """Any other request id gives a UUID, the same for whoever was given the same id."""
    made = a_context(request_id).transaction_id

    assert made == str(uuid.UUID(made))
    assert made == a_context(request_id).transaction_id
    assert made != a_context(request_id + "x").transaction_id
