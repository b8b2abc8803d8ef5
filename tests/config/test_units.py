"""Durations, sizes, addresses and places of a request, as people write them."""

import math
from contextlib import suppress
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.config.units import (
    LONGEST_SHOWN,
    Listen,
    Source,
    StateUrl,
    check_authority,
    check_host,
    parse_duration,
    parse_host_pattern,
    parse_money,
    parse_network,
    parse_rate,
    parse_share,
    parse_size,
    shown,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.8, "800ms"), (2.0, "2s"), (1.5, "1.5s"), (60.0, "1m"), (3600.0, "1h"), (86400.0, "1d")],
)
def test_duration_is_seconds(seconds: float, text: str) -> None:
    """A duration of any unit is kept in seconds."""
    assert math.isclose(seconds, parse_duration(text))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("'5' has no unit (write 5ms, 5s or 5m)", "5"),
        ("'fast' is no duration (write 800ms, 2s or 1h)", "fast"),
        ("'2 s' is no duration (write 800ms, 2s or 1h)", "2 s"),
        ("'-1s' is no duration (write 800ms, 2s or 1h)", "-1s"),
        ("'2S' is no duration (write 800ms, 2s or 1h)", "2S"),
        ("'1e9s' is no duration (write 800ms, 2s or 1h)", "1e9s"),
        ("'٣s' is no duration (write 800ms, 2s or 1h)", "٣s"),
        ("'' is no duration (write 800ms, 2s or 1h)", ""),
        ("'0s' is no time at all (write more than 0, such as 800ms)", "0s"),
    ],
)
def test_bad_duration_is_explained(message: str, text: str) -> None:
    """A text that is no duration is refused in words that say what to write."""
    with pytest.raises(ValueError, match=r"\(") as caught:
        parse_duration(text)

    assert message == str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1000, "1000B"),
        (1000, "1kB"),
        (524288, "512KiB"),
        (10**6, "1MB"),
        (2097152, "2MiB"),
        (10**9, "1GB"),
        (2**30, "1GiB"),
    ],
)
def test_size_is_bytes(size: int, text: str) -> None:
    """A size of any unit is kept in bytes."""
    assert size == parse_size(text)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("'512' has no unit (write 512B, 512KiB or 512MiB)", "512"),
        ("'1kb' is no size (write 1000B, 512KiB or 2MiB)", "1kb"),
        ("'big' is no size (write 1000B, 512KiB or 2MiB)", "big"),
        ("'0.1B' is less than one byte (write 1000B, 512KiB or 2MiB)", "0.1B"),
    ],
)
def test_bad_size_is_explained(message: str, text: str) -> None:
    """A text that is no size is refused in words that say what to write."""
    with pytest.raises(ValueError, match=r"\(") as caught:
        parse_size(text)

    assert message == str(caught.value)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.5, "50%"), (0.5, "0.5"), (1.0, "100%"), (1.0, "1"), (0.125, "12.5%"), (0.01, "0.01")],
)
def test_share_is_a_part_of_one(share: float, text: str) -> None:
    """A percentage and a number up to 1 are the same kind of value."""
    assert share == parse_share(text)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("'50' is more than the whole (write 50%)", "50"),
        ("'1.5' is more than the whole (write 1.5%)", "1.5"),
        ("'200' is more than the whole (write 100% or less)", "200"),
        ("'101%' is more than the whole (write 100% or less)", "101%"),
        ("'0' is no share at all (write more than 0%, such as 10%)", "0"),
        ("'0.0%' is no share at all (write more than 0%, such as 10%)", "0.0%"),
        ("'half' is no share (write 50%, or 0.5)", "half"),
        ("'50 %' is no share (write 50%, or 0.5)", "50 %"),
        ("'-5%' is no share (write 50%, or 0.5)", "-5%"),
        ("'' is no share (write 50%, or 0.5)", ""),
    ],
)
def test_bad_share_is_explained(message: str, text: str) -> None:
    """A text that is no share is refused in words that say what to write."""
    with pytest.raises(ValueError, match=r"\(") as caught:
        parse_share(text)

    assert message == str(caught.value)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (100.0, "100/s"),
        (100.0, "6000/m"),
        (100.0, "360000/h"),
        (0.5, "0.5/s"),
        (1 / 3600, "1/h"),
        (1_000_000.0, "1000000/s"),
    ],
)
def test_rate_is_times_a_second(rate: float, text: str) -> None:
    """A rate of any unit is kept in times a second."""
    assert rate == parse_rate(text)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("'100' has no unit (write 100/s, 100/m or 100/h)", "100"),
        ("'100/d' is no rate (write 100/s, 6000/m or 360000/h)", "100/d"),
        ("'100/' is no rate (write 100/s, 6000/m or 360000/h)", "100/"),
        ("'100rps' is no rate (write 100/s, 6000/m or 360000/h)", "100rps"),
        ("'100 / s' is no rate (write 100/s, 6000/m or 360000/h)", "100 / s"),
        ("'' is no rate (write 100/s, 6000/m or 360000/h)", ""),
        ("'0/s' is too seldom (write 1/h or more)", "0/s"),
        ("'0.5/h' is too seldom (write 1/h or more)", "0.5/h"),
        ("'1000001/s' is too often (write 1000000/s or less)", "1000001/s"),
    ],
)
def test_bad_rate_is_explained(message: str, text: str) -> None:
    """A text that is no rate is refused in words that say what to write."""
    with pytest.raises(ValueError, match=r"\(") as caught:
        parse_rate(text)

    assert message == str(caught.value)


@given(st.text())
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    """Every reader gives a value for any text, or raises ValueError and nothing else."""
    readers = (parse_duration, parse_size, parse_network, parse_host_pattern, Listen.parse)
    numbers = (parse_share, parse_rate, parse_money)
    for read in (*readers, *numbers, Source.parse, StateUrl.parse, check_authority):
        with suppress(ValueError):
            read(text)


@pytest.mark.parametrize(
    ("listen", "text"),
    [
        (Listen(host="127.0.0.1", port=8080), "127.0.0.1:8080"),
        (Listen(host="", port=80), ":80"),
        (Listen(host="localhost", port=0), "localhost:0"),
        (Listen(host="::1", port=8080), "[::1]:8080"),
        (Listen(path="/run/vastproxy.sock"), "unix:/run/vastproxy.sock"),
    ],
)
def test_listen_reads_and_writes_the_same_text(listen: Listen, text: str) -> None:
    """An address to listen on is parsed, and its text gives it back."""
    assert listen == Listen.parse(text)
    assert text == str(listen)


@pytest.mark.parametrize(
    "text",
    ["8080", "host", "host:", "host:65536", "::1:80", "[zz]:80", "[1]:80", "unix:run", "a b:80"],
)
def test_bad_listen_is_refused(text: str) -> None:
    """An address without a port, out of range, or of a wrong form is refused."""
    with pytest.raises(ValueError, match=r"\(write "):
        Listen.parse(text)


@pytest.mark.parametrize(
    ("local", "text"),
    [
        (True, "127.0.0.1:1"),
        (True, "127.8.8.8:1"),
        (True, "[::1]:1"),
        (True, "localhost:1"),
        (True, "unix:/x"),
        (False, ":1"),
        (False, "0.0.0.0:1"),
        (False, "[::]:1"),
        (False, "192.0.2.1:1"),
        (False, "ads.example.com:1"),
    ],
)
def test_listen_knows_what_is_local(local: bool, text: str) -> None:  # noqa: FBT001
    """Loopback addresses and Unix sockets are local, everything else is not."""
    assert local is Listen.parse(text).is_local


@pytest.mark.parametrize(
    ("clash", "one", "other"),
    [
        (True, "127.0.0.1:80", "127.0.0.1:80"),
        (True, "127.0.0.1:80", ":80"),
        (True, "0.0.0.0:80", "127.0.0.1:80"),
        (True, "unix:/a", "unix:/a"),
        (False, "127.0.0.1:80", "127.0.0.1:81"),
        (False, "127.0.0.1:80", "127.0.0.2:80"),
        (False, "127.0.0.1:0", "127.0.0.1:0"),
        (False, "unix:/a", "unix:/b"),
        (False, "unix:/a", ":80"),
    ],
)
def test_listeners_clash_over_a_port(clash: bool, one: str, other: str) -> None:  # noqa: FBT001
    """Two listeners clash where the system would refuse the second; free ports never do."""
    assert clash is Listen.parse(one).clashes(Listen.parse(other))
    assert clash is Listen.parse(other).clashes(Listen.parse(one))


def test_source_has_a_kind_and_a_name() -> None:
    """A place of a request has a kind and a name; those of headers are in lower case."""
    assert Source("query", "uid") == Source.parse("query:uid")
    assert Source("header", "x-uid") == Source.parse("header:X-Uid")
    assert Source("cookie", "Uid") == Source.parse("cookie:Uid")
    assert "cookie:Uid" == str(Source.parse("cookie:Uid"))


@pytest.mark.parametrize("text", ["uid", "query:", "query:a b", "header:a b", "cookie:a;b", "ip:x"])
def test_bad_source_is_refused(text: str) -> None:
    """A place that no request has is refused."""
    with pytest.raises(ValueError, match=r"names no part of a request \(write "):
        Source.parse(text)


def test_network_is_a_cidr_or_an_address() -> None:
    """An address is a network of one."""
    assert IPv4Network("10.0.0.0/8") == parse_network("10.0.0.0/8")
    assert IPv4Network("192.0.2.7/32") == parse_network("192.0.2.7")
    assert IPv6Network("2001:db8::/32") == parse_network("2001:db8::/32")


def test_network_with_bits_of_a_host_is_refused() -> None:
    """A CIDR that names one address of a network is answered with the network."""
    with pytest.raises(ValueError, match=r"\(write 10.0.0.0/8\)"):
        parse_network("10.1.2.3/8")


@pytest.mark.parametrize("text", ["ads.example.com", "ads.example.com:8443", "[::1]:80", "a_b.tv"])
def test_host_may_have_a_port(text: str) -> None:
    """A host is a name or an address, with or without a port."""
    check_host(text)


@pytest.mark.parametrize("text", ["", ":80", "a:0", "a:65536", "a/b", "*.a", "-a", "[x]", "a b"])
def test_bad_host_is_refused(text: str) -> None:
    """A text that no URL could have as its host is refused."""
    with pytest.raises(ValueError, match=r"\(write "):
        check_host(text)


def test_host_pattern_is_in_lower_case() -> None:
    """A pattern for hosts may begin with a star, and is compared in lower case."""
    assert "*.example.com" == parse_host_pattern("*.Example.com")
    with pytest.raises(ValueError, match="is no host"):
        parse_host_pattern("*")


@pytest.mark.parametrize(
    ("message", "url"),
    [
        ("is no absolute URL", "ads.example.com/vast"),
        ("is no absolute URL", "ftp://ads.example.com"),
        ("is no host", "https://"),
        ("is no host", "https://:80/"),
        ("a user and a password", "https://user:secret@ads.example.com/"),
        ("a user and a password", "https://@ads.example.com/"),
        ("a character that no URL can have", "https://ads.example.com/a b"),
    ],
)
def test_bad_url_is_refused(message: str, url: str) -> None:
    """A URL without scheme or host, with a password or with a space is refused."""
    with pytest.raises(ValueError, match=message):
        check_authority(url)


def test_password_of_a_url_is_not_repeated() -> None:
    """The message about a password in a URL does not have the password."""
    with pytest.raises(ValueError, match=r"\(") as caught:
        check_authority("https://user:secret@ads.example.com/")

    assert "secret" not in str(caught.value)


def test_long_value_is_shown_cut() -> None:
    """A message repeats the beginning of a long value only."""
    assert LONGEST_SHOWN == len(shown("x" * 1000))
    assert "'x'" == shown("x")


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (Decimal("2.5"), "2.50"),
        (Decimal(1000), "1000"),
        (Decimal("0.000001"), "0.000001"),
        (Decimal(9_000_000_000), "9000000000"),
    ],
)
def test_money_is_read_exactly(amount: Decimal, text: str) -> None:
    """An amount is the decimal that is written."""
    assert amount == parse_money(text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("memory", "memory://"),
        ("redis", "redis://127.0.0.1"),
        ("redis", "redis://r:6379/15?socket_keepalive=1"),
        ("redis", "rediss://[::1]:6380/"),
        ("cluster", "redis+cluster://node-1.example.com:7000"),
        ("cluster", "rediss+cluster://node-1/0"),
        ("sqlite", "sqlite:///vastproxy.db"),
        ("sqlite", "sqlite:////var/lib/vastproxy.db"),
        ("sqlite", "sqlite+aiosqlite:///caps.db"),
        ("postgresql", "postgresql://user@host/db"),
        ("postgresql", "postgres://host:5432/db?sslmode=require"),
        ("postgresql", "postgresql+asyncpg:///db?host=/run/postgresql"),
        ("postgresql", "postgresql+psycopg://host/db"),
    ],
)
def test_state_has_a_kind_and_keeps_its_url(kind: str, text: str) -> None:
    """The URL of a state is kept as it was written; its scheme says of which kind it is."""
    state = StateUrl.parse(text)

    assert (kind, text, text) == (state.kind, state.url, str(state))
    assert (kind != "memory") is state.is_shared


@pytest.mark.parametrize(
    ("public", "text"),
    [
        ("redis://:***@r:6379/0", "redis://:pass-word@r:6379/0"),
        ("redis://me:***@r", "redis://me:pass-word%40%2F:x@r"),
        ("redis://:***@r", "redis://:@r"),
        ("redis://r?password=***&db=1", "redis://r?password=pass-word&db=1"),
        ("rediss+cluster://me:***@r/", "rediss+cluster://me:pass-word@r/"),
        ("postgres://me:***@h:5432/db?a=b", "postgres://me:pass-word@h:5432/db?a=b"),
        ("postgres://h/db?SSLPassword=***", "postgres://h/db?SSLPassword=pass-word"),
    ],
)
def test_password_of_a_state_is_hidden(public: str, text: str) -> None:
    """The text and the repr of a state have no password; its URL has it whole."""
    state = StateUrl.parse(text)

    assert public == str(state)
    assert f"StateUrl({public!r})" == repr(state)
    assert text == state.url


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("this is the URL of no state", ""),
        ("this is the URL of no state", "memory"),
        ("this is the URL of no state", "redis:/r"),
        ("this is the URL of no state", "REDIS://r"),
        ("this is the URL of no state", "mysql://:s3cret@h/db"),
        ("this is the URL of no state", "postgresql+psycopg2://h/db"),
        ("this is the URL of no state", "postgres+asyncpg://h/db"),
        ("memory:// takes nothing behind it", "memory://x"),
        ("the URL names no file", "sqlite://vastproxy.db"),
        ("the URL names no file", "sqlite:///"),
        ("the URL names no file", "sqlite:////var/lib/"),
        ("no second process could open this", "sqlite:///:memory:"),
        ("the path has ?, # or a character", "sqlite:///file:a?mode=memory&uri=true"),
        ("the path has ?, # or a character", "sqlite:///a\nb"),
        ("the URL names no host", "redis://"),
        ("the URL names no host", "redis://:s3cret@/1"),
        ("the URL names no host", "postgresql:///db"),
        ("what stands between :// and /", "redis://:s3cr@et@r"),
        ("what stands between :// and /", "redis://:s3cr/et@r/0"),
        ("what stands between :// and /", "redis://:s3cr%et@r"),
        ("what stands between :// and /", "redis://:s3cr#et@r"),
        ("what stands between :// and /", "redis://r:port"),
        ("what stands between :// and /", "redis://r/0#x"),
        ("what stands between :// and /", "redis://a,b"),
        ("what stands in brackets is no IP address", "redis://[1]"),
        ("the port is none from 1 to 65535", "redis://r:0"),
        ("the port is none from 1 to 65535", "redis://r:65536"),
        ("there is a user without a password", "redis://s3cret@r"),
        ("what follows the host is no number", "redis://r/caps"),
        ("what follows the host is no number", "redis://r/-1"),
        ("what follows the host is no number", "redis://r/1/2"),
        ("a cluster has the database 0 only", "redis+cluster://r/1"),
        ("the URL names no database", "postgresql://h"),
        ("the URL names no database", "postgresql://h/"),
        ("the URL names no database", "postgresql://h/a/b"),
        ("what follows ? is no name=value", "postgresql://h/db?require"),
        ("what follows ? is no name=value", "postgresql://h/db?a=b&"),
    ],
)
def test_bad_state_is_explained(message: str, text: str) -> None:
    """A URL that is no state's is refused in words that say what to write, and repeat nothing."""
    with pytest.raises(ValueError, match=r"\(write ") as caught:
        StateUrl.parse(text)

    assert str(caught.value).startswith(message)
    assert "s3cr" not in str(caught.value)
