"""What leaves the proxy sealed comes back unread and unchanged, or not at all."""

import base64
import random
import string
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vastproxy.errors import TokenError
from vastproxy.session import seals
from vastproxy.session.seals import (
    MAX_CONTENT,
    MAX_TOKEN,
    ZIP_FROM,
    Seal,
    ViewerNames,
    derived,
    new_secret,
)

NOW = 1_800_000_000.0
TTL = 60.0
CONTENT = b'[["c","spring","o",1,{"spent":2500}]]'
SEAL = Seal(["one secret"], "beacon")


def accepted(token: str, seal: Seal = SEAL, now: float = NOW) -> bool:
    """Whether *token* opens; what is no TokenError comes out."""
    try:
        seal.open(token, now, TTL)
    except TokenError:
        return False
    return True


@given(st.binary(max_size=2 * ZIP_FROM), st.floats(0, 2e9))
@settings(max_examples=50)
def test_round_trip(content: bytes, now: float) -> None:
    """What is sealed comes out as it was, and its token needs no encoding in a URL."""
    token = SEAL.close(content, now)

    assert content == SEAL.open(token, now, TTL)
    assert set(token) <= set(f"{string.ascii_letters}{string.digits}-_")


def test_nothing_can_be_read() -> None:
    """A token shows nothing of its content, and is another one each time."""
    one, other = SEAL.close(CONTENT, NOW), SEAL.close(CONTENT, NOW)
    raw = base64.urlsafe_b64decode(one + "=" * (-len(one) % 4))

    assert one != other
    assert b"spring" not in raw


def test_long_content_is_zipped() -> None:
    """Long content is zipped where that makes it shorter, and comes out as it was."""
    plain, noise = b"a" * 5000, random.Random(1).randbytes(5000)

    assert 300 > len(SEAL.close(plain, NOW))
    assert plain == SEAL.open(SEAL.close(plain, NOW), NOW, TTL)
    assert noise == SEAL.open(SEAL.close(noise, NOW), NOW, TTL)


@pytest.mark.parametrize("length", range(4))
def test_every_character_counts(length: int) -> None:
    """A token with any one character changed, left out or put in opens nothing."""
    token = SEAL.close(b"x" * 16 * length, NOW)
    others = f"{string.ascii_letters}{string.digits}-_=+/ !%.\n\x00é\udc80"
    changed = {
        f"{token[:at]}{put}{token[at + cut :]}"
        for at in range(len(token) + 1)
        for put in ["", *others]
        for cut in (0, 1)
    } - {token}

    assert [] == [each for each in changed if accepted(each)]
    assert len(token) * len(others) < len(changed)
    assert accepted(token)


@pytest.mark.parametrize("size", range(16))
def test_padding_is_no_part_of_a_token(size: int) -> None:
    """Padding, blanks and line ends around a token make it another one, which opens nothing."""
    token = SEAL.close(b"x" * size, NOW)

    assert accepted(token)
    assert [] == [
        put
        for put in ("=", "==", "===", "====", " ", "\n", "\r\n", "!!!!", "A", "AAAA")
        if accepted(token + put) or accepted(put + token)
    ]


def test_truncated() -> None:
    """No beginning and no end of a token opens anything."""
    token = SEAL.close(CONTENT, NOW)

    assert [] == [at for at in range(len(token)) if accepted(token[:at])]
    assert [] == [at for at in range(1, len(token)) if accepted(token[at:])]


@given(st.text(max_size=200) | st.text(f"{string.ascii_letters}-_=", max_size=200))
@settings(max_examples=300)
def test_any_text(text: str) -> None:
    """Whatever is no token is refused by a TokenError."""
    assert not accepted(text)


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_in_base64(raw: bytes) -> None:
    """Bytes that look like a token from afar are refused as well."""
    text = base64.urlsafe_b64encode(b"\x80" + raw).rstrip(b"=").decode()

    assert not accepted(text)


def test_longest_token() -> None:
    """What is longer than any token is refused unread."""
    with pytest.raises(TokenError, match="no token"):
        SEAL.open("A" * (MAX_TOKEN + 1), NOW, TTL)
    with pytest.raises(TokenError, match="forged"):
        SEAL.open("A" * MAX_TOKEN, NOW, TTL)


def test_each_purpose_has_its_own_key() -> None:
    """A token for one thing opens nothing else, nor does one of another secret."""
    token = SEAL.close(CONTENT, NOW)

    assert not accepted(token, Seal(["one secret"], "hop"))
    assert not accepted(token, Seal(["another secret"], "beacon"))
    assert accepted(token, Seal(["one secret"], "beacon"))
    assert derived("a", "beacon") != derived("a", "viewer")


def test_change_of_secret() -> None:
    """The first secret seals, all open: a new one in front takes over, and the old one may go."""
    old, both, new = Seal(["a"], "x"), Seal(["b", "a"], "x"), Seal(["b"], "x")
    before, after = old.close(CONTENT, NOW), both.close(CONTENT, NOW)

    assert [True, True, False] == [accepted(before, each) for each in (old, both, new)]
    assert [False, True, True] == [accepted(after, each) for each in (old, both, new)]


def test_expiry() -> None:
    """A token opens to the second of its end, and not in the next one."""
    token = SEAL.close(CONTENT, NOW)

    assert accepted(token, now=NOW + TTL)
    assert not accepted(token, now=NOW + TTL + 1)


def test_clocks_that_differ() -> None:
    """A clock that is behind opens what another has sealed, however far it is."""
    token = SEAL.close(CONTENT, NOW)

    assert accepted(token, now=NOW - 60)
    assert accepted(token, now=NOW - 3_600)


def sealed(body: bytes) -> str:
    """Seal *body* as it is, with the right key."""
    return SEAL._fernet.encrypt_at_time(body, int(NOW)).rstrip(b"=").decode()


def test_content_larger_than_any() -> None:
    """What would unpack to more than any content is refused before it has."""
    largest = b"z" + zlib.compress(b"a" * MAX_CONTENT)

    assert MAX_CONTENT == len(SEAL.open(sealed(largest), NOW, TTL))
    for size in (MAX_CONTENT + 1, 4_000_000):
        with pytest.raises(TokenError, match="larger than any"):
            SEAL.open(sealed(b"z" + zlib.compress(b"a" * size)), NOW, TTL)


@pytest.mark.parametrize("body", [b"z", b"zz", b"z" + zlib.compress(b"a" * 99)[:-5], b"z\x78\x9c"])
def test_zip_that_is_none(body: bytes) -> None:
    """What was sealed with the right key and cannot be unpacked is refused."""
    with pytest.raises(TokenError, match="cannot be unpacked"):
        SEAL.open(sealed(body), NOW, TTL)


@pytest.mark.parametrize("body", [b"", b"-"])
def test_empty_content(body: bytes) -> None:
    """Nothing is content as well."""
    assert b"" == SEAL.open(sealed(body), NOW, TTL)


def test_viewer_names() -> None:
    """A viewer's name is always the same 22 characters, and shows nothing of the id."""
    names = ViewerNames(["a"])
    name = names.name("alice@example.com")

    assert name == names.name("alice@example.com")
    assert 22 == len(name)
    assert set(name) <= set(f"{string.ascii_letters}{string.digits}-_")
    assert "alice" not in name
    assert 3 == len({name, names.name("bob"), ViewerNames(["b"]).name("alice@example.com")})
    assert "" == names.name("")
    assert 22 == len(names.name("\udc80 é " * 1000))


def test_viewer_names_hang_on_the_last_secret() -> None:
    """A new secret in front changes no viewer's name."""
    assert ViewerNames(["a"]).name("v") == ViewerNames(["b", "a"]).name("v")
    assert ViewerNames(["a"]).name("v") != ViewerNames(["a", "b"]).name("v")


def test_new_secret() -> None:
    """A secret made for one run has 32 random bytes."""
    one, other = new_secret(), new_secret()

    assert one != other
    assert seals.KEY_BYTES == len(base64.urlsafe_b64decode(one + "="))


def test_repr() -> None:
    """What is printed of seals and names has no secret in it."""
    assert "<Seal for beacon>" == repr(SEAL)
    assert "<ViewerNames>" == repr(ViewerNames(["secret"]))
