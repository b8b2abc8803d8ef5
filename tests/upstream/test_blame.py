"""What one HTTP call says about the ad server that was asked."""

import asyncio
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest

from vastproxy.errors import (
    EgressBlockedError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamTooLargeError,
)
from vastproxy.model import HopReply
from vastproxy.upstream.blame import had_fair_time, of_error, of_reply, retry_after

NOW = 1_700_000_000.0


def a_reply(status: int, **headers: str) -> HopReply:
    """Give a reply of *status*; underscores in the names of *headers* are dashes."""
    listed = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return HopReply(status, listed, b"")


@pytest.mark.parametrize("status", [200, 204, 302, 400, 403, 404, 429, 451])
def test_whole_answers(status: int) -> None:
    """Whatever a server answers below 500 shows that it is there."""
    assert "ok" == of_reply(a_reply(status), NOW).outcome


@pytest.mark.parametrize("status", [500, 502, 503, 504, 599])
def test_server_errors(status: int) -> None:
    """From status 500 on it is a failure."""
    judged = of_reply(a_reply(status), NOW)

    assert ("failed", f"HTTP status {status}", None) == (
        judged.outcome,
        judged.reason,
        judged.retry_after,
    )


@pytest.mark.parametrize("status", [429, 503])
def test_asked_to_wait(status: int) -> None:
    """A server that asks to be left alone for a while is not healthy."""
    judged = of_reply(a_reply(status, retry_after="30"), NOW)

    assert ("failed", 30.0) == (judged.outcome, judged.retry_after)


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        (UpstreamError, "failed"),
        (UpstreamConnectError, "failed"),
        (UpstreamTooLargeError, "failed"),
        (UpstreamTimeoutError, "failed"),
        (EgressBlockedError, "neutral"),
        (asyncio.CancelledError, "neutral"),
        (KeyError, "neutral"),
    ],
)
def test_errors(kind: type[BaseException], outcome: str) -> None:
    """A failure is what another viewer would meet as well."""
    assert outcome == of_error(kind("why"), fair=True).outcome


def test_own_want() -> None:
    """What this machine did not have is not the ad server's failure."""
    error = UpstreamConnectError("no sockets", local=True)

    assert "neutral" == of_error(error, fair=True).outcome


def test_starved() -> None:
    """Who had no fair time has not failed by not answering; who broke off has all the same."""
    assert "neutral" == of_error(UpstreamTimeoutError("silent"), fair=False).outcome
    assert "failed" == of_error(UpstreamError("reset"), fair=False).outcome


async def test_fair_time() -> None:
    """Half of an upstream's own time is fair, less is not."""
    now = asyncio.get_running_loop().time()

    assert had_fair_time(now + 0.6, 1.0)
    assert not had_fair_time(now + 0.4, 1.0)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("9" * 40, 999_999_999.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("²", None),
        (format_datetime(datetime.fromtimestamp(NOW + 60, UTC), usegmt=True), 60.0),
        (format_datetime(datetime.fromtimestamp(NOW - 60, UTC), usegmt=True), 0.0),
        ("Fri, 99 Foo 2023 10:00:00 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    """Retry-After is a number of seconds or a date; what is neither says nothing."""
    assert seconds == retry_after(value, NOW)
