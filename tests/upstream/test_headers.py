"""What an ad server is told of the device, and that no header can be broken by it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy import __version__
from vastproxy.model import Device
from vastproxy.upstream.headers import device_headers, safe

PROXY = f"vastproxy/{__version__}"
DEVICE = Device(
    ip="192.0.2.1",
    user_agent="TV/1",
    referer="https://p.example/",
    accept_language="de",
    requested_with="com.example.app",
    forwarded_for="192.0.2.1, 198.51.100.2",
)


def told(device: Device, **choices: str) -> dict[str, str]:
    """Give the headers for *device* by name."""
    return dict(device_headers(device, **choices))  # type: ignore[arg-type]


def test_everything_is_told() -> None:
    """A known device is told in all headers of VAST 4.3 section 1.1.3, and by its own agent."""
    headers = told(DEVICE)
    headers.pop("Accept")

    assert headers == {
        "User-Agent": "TV/1",
        "X-Device-IP": "192.0.2.1",
        "X-Device-User-Agent": "TV/1",
        "X-Device-Referer": "https://p.example/",
        "X-Device-Accept-Language": "de",
        "X-Device-Requested-With": "com.example.app",
        "X-Forwarded-For": "192.0.2.1",
    }


def test_unknown_is_not_told() -> None:
    """What is not known has no header; the agent is then the proxy's."""
    assert {"Accept", "User-Agent"} == set(told(Device()))
    assert PROXY == told(Device())["User-Agent"]


def test_proxy_may_be_the_agent() -> None:
    """With the proxy's own agent, the device's is still told beside it."""
    headers = told(DEVICE, user_agent="proxy")

    assert (PROXY, "TV/1") == (headers["User-Agent"], headers["X-Device-User-Agent"])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("set", "192.0.2.1"), ("append", "192.0.2.1, 198.51.100.2"), ("off", None)],
)
def test_forwarded_for(choice: str, expected: str | None) -> None:
    """X-Forwarded-For is the device's address alone, the whole way here, or not there."""
    assert expected == told(DEVICE, forwarded_for=choice).get("X-Forwarded-For")


def test_forwarded_for_begins_with_the_device() -> None:
    """Where nobody told the way here, appending gives the device's address."""
    headers = told(Device(ip="192.0.2.1"), forwarded_for="append")

    assert "192.0.2.1" == headers["X-Forwarded-For"]


@given(text=st.text(alphabet=st.characters(), max_size=40))
def test_safe_is_fit_for_a_header(text: str) -> None:
    """No text can end a header or break its encoding, and what is safe stays as it is."""
    made = safe(text)

    assert not set(made) & {chr(each) for each in (*range(32), 127)} - {"\t"}
    assert made.encode().decode() == made
    assert made == safe(made)


def test_safe_replaces_what_is_not() -> None:
    """Line breaks become blanks, lone surrogates question marks; tabs inside may stay."""
    assert "a  X: 1" == safe("a\r\nX: 1")
    assert "a?b\tc" == safe("a\udc85b\tc\n")
