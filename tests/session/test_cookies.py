"""Cookies go back to the site that set them, as it set them, and to no other."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.session.cookies import (
    MAX_AGE,
    MAX_COOKIE_BYTES,
    MAX_COOKIES,
    MAX_HEADER_BYTES,
    Cookie,
    CookieJar,
    parse_date,
    parse_set_cookie,
    public_suffix_test,
)

SuffixTest = Callable[[str], bool]

NOW = 1_800_000_000.0
FIRST_SECOND_OF_1994 = 757_382_400.0


@pytest.fixture(scope="module")
def suffixes() -> SuffixTest:
    """Load the list once: it takes longer than all tests here together."""
    return public_suffix_test()


@pytest.fixture
def jar(suffixes: SuffixTest) -> CookieJar:
    """Give an empty jar."""
    return CookieJar(suffixes)


def parsed(
    header: str, host: str = "ads.shop.example", path: str = "/vast/tag", *, secure: bool = True
) -> Cookie | None:
    """Read *header* as *host* would have sent it at ``NOW``, by a list of two suffixes."""
    return parse_set_cookie(
        header,
        host=host,
        path=path,
        secure=secure,
        now=NOW,
        is_public_suffix=lambda domain: domain == "co.uk" or "." not in domain,
    )


def stored(
    jar: CookieJar, *headers: str, host: str = "ads.example.com", secure: bool = True
) -> tuple[str, ...]:
    """Store *headers* as an answer of *host* to ``/vast/tag``."""
    return jar.store(headers, host=host, path="/vast/tag", secure=secure, now=NOW)


def sent(
    jar: CookieJar,
    host: str = "ads.example.com",
    path: str = "/vast/tag",
    *,
    secure: bool = True,
    now: float = NOW,
) -> str:
    """Give the ``Cookie`` header of one request."""
    return jar.header_for(host=host, path=path, secure=secure, now=now)


def test_a_cookie_is_a_plain_value() -> None:
    """A cookie can be compared, hashed and taken apart, but not changed."""
    cookie = Cookie("u", "1", "a.example", host_only=True, path="/", secure=False, expires=None)

    assert cookie == replace(cookie)
    assert 1 == len({cookie, replace(cookie)})
    with pytest.raises(FrozenInstanceError):
        cookie.value = "2"  # type: ignore[misc]


def test_a_bare_cookie_belongs_to_its_host_and_directory() -> None:
    """Without attributes, a cookie is for the host alone, below the URL's directory, for good."""
    expected = Cookie(
        "uid", "7f", "ads.shop.example", host_only=True, path="/vast", secure=False, expires=None
    )

    assert expected == parsed("uid=7f", host="ADS.shop.example")


def test_every_attribute_is_read_in_any_case_and_with_blanks() -> None:
    """Attributes are read whatever their case and the blanks around; unknown ones do not matter."""
    header = (
        "  uid = 7f==  ;DOMAIN= .Shop.Example ; path=/v ;SECURE;max-age= 60;HttpOnly;X=Y;SameSite="
    )
    expected = Cookie(
        "uid",
        "7f==",
        "shop.example",
        host_only=False,
        path="/v",
        secure=True,
        expires=NOW + 60,
    )

    assert expected == parsed(header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        ";",
        "=",
        "=value",
        "  =value",
        "value",
        "value; Path=/",
        "a=b\x00c",
        "a=b\rc",
        "a=b\nc",
        "a=b\x7f",
        "a\x01=b",
        "a=b; Path=/\x1f",
        "a=b\udc85",
        "a=b; Path=/\ud800",
        "a=" + "v" * MAX_COOKIE_BYTES,
        "a=" + "é" * (MAX_COOKIE_BYTES // 2),
    ],
)
def test_what_cannot_be_sent_back_is_refused(header: str) -> None:
    """Without a name, with a control or a lone surrogate, or too long, a cookie is refused."""
    assert parsed(header) is None


def test_the_longest_cookie_is_kept() -> None:
    """Name and value may have 4,096 octets together."""
    cookie = parsed("a=" + "v" * (MAX_COOKIE_BYTES - 1))

    assert cookie is not None
    assert MAX_COOKIE_BYTES == len(cookie.name) + len(cookie.value)


@pytest.mark.parametrize(
    "value", ['"quoted"', "a,b c", "a%20b", "e30=.e30=", 'half"', "", "a\tb", "[CACHEBUSTING]", "ü"]
)
def test_a_value_goes_back_as_it_came(jar: CookieJar, value: str) -> None:
    """No value is quoted, unquoted or encoded."""
    stored(jar, f"u={value}; Path=/")

    assert f"u={value}" == sent(jar)


@pytest.mark.parametrize(
    ("attributes", "expires"),
    [
        ("", None),
        ("Max-Age=60", NOW + 60),
        ("Max-Age=0", NOW),
        ("Max-Age=-5", NOW),
        ("Max-Age=-" + "9" * 500, NOW),
        ("Max-Age=" + "9" * 1_000, NOW + MAX_AGE),
        ("Max-Age=" + "9" * 2_000, None),
        ("Max-Age=+60", None),
        ("Max-Age=6O", None),
        ("Max-Age=\u0666\u0660", None),
        ("Max-Age=1.5", None),
        ("Max-Age=", None),
        ("Max-Age=60; Max-Age=x", NOW + 60),
        ("Max-Age=60; Max-Age=30", NOW + 30),
        ("Max-Age=60; Expires=Sat, 01 Jan 1994 00:00:00 GMT", NOW + 60),
        ("Expires=Sat, 01 Jan 1994 00:00:00 GMT; Max-Age=60", NOW + 60),
        ("Expires=Sat, 01 Jan 1994 00:00:00 GMT", FIRST_SECOND_OF_1994),
        ("Expires=Sat, 01 Jan 1994 00:00:00 GMT; Expires=soon", FIRST_SECOND_OF_1994),
        ("Expires=never", None),
        ("Expires=Fri, 31 Dec 9999 23:59:59 GMT", NOW + MAX_AGE),
    ],
)
def test_a_life_ends_by_max_age_then_by_expires(attributes: str, expires: float | None) -> None:
    """``Max-Age`` goes before ``Expires``, what cannot be read is passed over, 400 days are all."""
    cookie = parsed(f"a=b; {attributes}")

    assert cookie is not None
    assert expires == cookie.expires


@pytest.mark.parametrize(
    "text",
    [
        "Sat, 01 Jan 1994 00:00:00 GMT",
        "Saturday, 01-Jan-94 00:00:00 GMT",
        "Sat Jan  1 00:00:00 1994",
        "Sat, 1 Jan 1994 0:0:0",
        "1994 january 1th 00:00:00+02:00",
        "00:00:00 1994 JAN 01",
        "1/Jan/1994;00:00:00",
        "01-jan-1994 00:00:00 1995",
        "00:00:00abc 1 Jan 94x",
        "1 Januar 94 00:00:00",
    ],
)
def test_dates_are_read_in_every_form(text: str) -> None:
    """The three forms of HTTP, and what servers make of them, are one date."""
    assert FIRST_SECOND_OF_1994 == parse_date(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "tomorrow",
        "01 Jan 1994",
        "Jan 1994 00:00:00",
        "01 1994 00:00:00",
        "01 Jan 00:00:00",
        "00 Jan 1994 00:00:00",
        "32 Jan 1994 00:00:00",
        "30 Feb 1994 00:00:00",
        "29 Feb 1900 00:00:00",
        "01 Jan 1600 00:00:00",
        "01 Jan 0194 00:00:00",
        "01 Jan 19940 00:00:00",
        "01 Jan 1994 24:00:00",
        "01 Jan 1994 00:60:00",
        "01 Jan 1994 00:00:60",
        "01 Jan 1994 000:00:00",
        "01 Jan 1994 00:00:000",
        "01 Jan 1994 00:00",
        "\u0660\u0661 Jan 1994 00:00:00",
        "01 \u017fep 1994 00:00:00",
    ],
)
def test_what_is_no_date_is_none(text: str) -> None:
    """A field that is missing, out of its range or no ASCII makes a text no date."""
    assert parse_date(text) is None


@pytest.mark.parametrize(
    ("year", "seconds"),
    [
        ("69", 3_124_224_000.0),
        ("70", 0.0),
        ("00", 946_684_800.0),
        ("99", 915_148_800.0),
        ("1601", -11_644_473_600.0),
    ],
)
def test_two_digits_of_a_year_stand_for_a_century(year: str, seconds: float) -> None:
    """Years 70 to 99 are of the last century, 0 to 69 of this one; the first year is 1601."""
    assert seconds == parse_date(f"Thu, 01 Jan {year} 00:00:00 GMT")


@pytest.mark.parametrize(
    ("host", "domain", "scope"),
    [
        ("ads.shop.example", "", ("ads.shop.example", True)),
        ("ads.shop.example", ".", ("ads.shop.example", True)),
        ("ads.shop.example", "ads.shop.example", ("ads.shop.example", False)),
        ("ads.shop.example", "shop.example", ("shop.example", False)),
        ("ads.shop.example", ".shop.example", ("shop.example", False)),
        ("ads.shop.example", "SHOP.Example", ("shop.example", False)),
        ("ads.shop.example", "evil.example; Domain=shop.example", ("shop.example", False)),
        ("ads.shop.example", "evil.example; Domain=", ("ads.shop.example", True)),
        ("ads.shop.example", "example", None),
        ("ads.shop.example", "hop.example", None),
        ("ads.shop.example", "other.example", None),
        ("ads.shop.example", "x.ads.shop.example", None),
        ("ads.shop.example", "..shop.example", None),
        ("ads.shop.example", "shop.example.", None),
        ("ads.shop.example", "shop.éxample", None),
        ("a.example", "example", None),
        ("shop.co.uk", "co.uk", None),
        ("co.uk", "co.uk", ("co.uk", True)),
        ("localhost", "localhost", ("localhost", True)),
        ("localhost", "", ("localhost", True)),
        ("127.0.0.1", "", ("127.0.0.1", True)),
        ("127.0.0.1", "127.0.0.1", ("127.0.0.1", True)),
        ("127.0.0.1", "0.0.1", None),
        ("[::1]", "", ("[::1]", True)),
        ("[::1]", "[::1]", ("[::1]", True)),
        ("[2001:DB8::1]", "", ("[2001:db8::1]", True)),
        ("[::1]", "::1", None),
    ],
)
def test_a_domain_must_hold_the_host(
    host: str, domain: str, scope: tuple[str, bool] | None
) -> None:
    """``Domain`` widens a cookie up to the site, never beyond; addresses have no subdomains."""
    cookie = parsed(f"a=b; Domain={domain}", host=host)

    assert scope == (cookie and (cookie.domain, cookie.host_only))


@pytest.mark.parametrize(
    ("path", "attribute", "expected"),
    [
        ("/vast/tag", "", "/vast"),
        ("/vast/tag", "; Path=", "/vast"),
        ("/vast/tag", "; Path=vast", "/vast"),
        ("/vast/tag", "; Path=/", "/"),
        ("/vast/tag", "; Path=/x/", "/x/"),
        ("/vast/tag", "; Path=/x; Path=/y", "/y"),
        ("/vast/tag", "; Path=/x; Path=y", "/vast"),
        ("/vast/", "", "/vast"),
        ("/vast", "", "/"),
        ("/", "", "/"),
        ("", "", "/"),
        ("vast/tag", "", "/"),
        ("/vast/tag", "; Path=/" + "x" * 1_024, "/vast"),
    ],
)
def test_a_path_is_the_attribute_or_the_directory(path: str, attribute: str, expected: str) -> None:
    """Without a path that begins with a slash, it is the directory of the URL."""
    cookie = parsed(f"a=b{attribute}", path=path)

    assert cookie is not None
    assert expected == cookie.path


@pytest.mark.parametrize(
    ("header", "secure", "kept"),
    [
        ("a=b; Secure", True, True),
        ("a=b; Secure", False, False),
        ("__Secure-a=b; Secure", True, True),
        ("__Secure-a=b", True, False),
        ("__secure-a=b", True, False),
        ("__Host-a=b; Secure; Path=/", True, True),
        ("__Host-a=b; Secure", True, False),
        ("__Host-a=b; Path=/", True, False),
        ("__Host-a=b; Secure; Path=/v", True, False),
        ("__Host-a=b; Secure; Path=/; Domain=shop.example", True, False),
        ("__Host-a=b; Secure; Path=/; Domain=ads.shop.example", True, False),
        ("__HOST-a=b", True, False),
        ("__Host-a=b; Secure; Path=/", False, False),
        ("__Hosta=b", False, True),
    ],
)
def test_names_keep_what_they_promise(header: str, secure: bool, kept: bool) -> None:  # noqa: FBT001  a table
    """A secure cookie comes over https; ``__Host-`` is for one host, ``__Secure-`` is secure."""
    assert kept == (parsed(header, secure=secure) is not None)


def test_an_empty_jar_sends_nothing(jar: CookieJar) -> None:
    """A jar without cookies gives an empty header, no names and a length of nothing."""
    assert "" == sent(jar)
    assert () == jar.names_for(host="a.example", path="/", secure=True, now=NOW)
    assert () == stored(jar)
    assert 0 == len(jar)
    assert "<CookieJar empty>" == repr(jar)


def test_a_jar_shows_names_and_no_values(jar: CookieJar) -> None:
    """What is printed says whose the cookies are and hides what they hold."""
    stored(jar, "uid=secret", "sid=secret; Domain=example.com")

    assert "<CookieJar ads.example.com uid, *.example.com sid>" == repr(jar)


def test_longer_paths_go_first_then_older_cookies(jar: CookieJar) -> None:
    """The most special path is sent first; a changed value keeps its place in line."""
    stored(jar, "a=1; Path=/", "b=2; Path=/", "c=3; Path=/vast", "a=4; Path=/")

    assert "c=3; a=4; b=2" == sent(jar)
    assert ("c", "a", "b") == jar.names_for(
        host="ads.example.com", path="/vast/tag", secure=True, now=NOW
    )


@pytest.mark.parametrize(
    ("cookie_path", "path", "matches"),
    [
        ("/", "/anything", True),
        ("/", "", True),
        ("/vast", "/vast", True),
        ("/vast", "/vast/", True),
        ("/vast", "/vast/tag", True),
        ("/vast/", "/vast/tag", True),
        ("/vast", "/vastness", False),
        ("/vast/", "/vast", False),
        ("/vast", "/", False),
        ("/vast", "/Vast", False),
    ],
)
def test_a_path_matches_whole_steps(
    jar: CookieJar, cookie_path: str, path: str, *, matches: bool
) -> None:
    """A cookie goes to its path and below, counted in whole steps."""
    stored(jar, f"a=b; Path={cookie_path}")

    assert matches == bool(sent(jar, path=path))


@pytest.mark.parametrize(
    ("domain", "host", "matches"),
    [
        ("", "ads.example.com", True),
        ("", "ADS.EXAMPLE.COM", True),
        ("", "example.com", False),
        ("", "x.ads.example.com", False),
        ("; Domain=example.com", "example.com", True),
        ("; Domain=example.com", "x.y.example.com", True),
        ("; Domain=example.com", "badexample.com", False),
        ("; Domain=example.com", "example.com.evil.net", False),
        ("; Domain=example.com", "com", False),
        ("; Domain=example.com", "example.org", False),
    ],
)
def test_a_cookie_goes_to_its_own_domain(
    jar: CookieJar, domain: str, host: str, *, matches: bool
) -> None:
    """A cookie for a host stays there; one for a domain goes below it, and to no other name."""
    stored(jar, f"a=b; Path=/{domain}")

    assert matches == bool(sent(jar, host=host))


def test_a_secure_cookie_stays_off_the_clear_wire(jar: CookieJar) -> None:
    """A secure cookie goes over https alone."""
    stored(jar, "a=b; Secure")

    assert "a=b" == sent(jar)
    assert "" == sent(jar, secure=False)


def test_a_clear_hop_cannot_replace_a_secure_cookie(jar: CookieJar) -> None:
    """What came in the clear stands in for no secure cookie of the site, nor removes it."""
    stored(jar, "uid=good; Secure; Path=/; Domain=example.com")

    assert () == stored(jar, "uid=bad; Path=/vast", secure=False)
    assert () == stored(jar, "uid=bad; Path=/; Domain=example.com; Max-Age=0", secure=False)
    assert () == stored(jar, "uid=bad; Path=/", host="example.com", secure=False)
    assert ("uid",) == stored(jar, "uid=own; Path=/", host="example.org", secure=False)
    assert ("other",) == stored(jar, "other=1", secure=False)
    assert "uid=good" == sent(jar, path="/")


def test_a_cookie_dies_at_its_time(jar: CookieJar) -> None:
    """A cookie is sent up to the moment it expires, and not from it on."""
    stored(jar, "a=b; Max-Age=10")

    assert "a=b" == sent(jar, now=NOW + 9.9)
    assert "" == sent(jar, now=NOW + 10)


def test_an_expiry_in_the_past_removes_a_cookie(jar: CookieJar) -> None:
    """A dead cookie takes the living one of its name, domain and path away, and only that."""
    stored(jar, "a=1", "a=2; Path=/", "a=3; Domain=example.com", "b=4")

    assert ("a",) == stored(jar, "a=; Expires=Thu, 01 Jan 1970 00:00:00 GMT")
    assert () == stored(jar, "a=; Max-Age=0")
    assert "a=3; b=4; a=2" == sent(jar)


def test_one_name_lives_once_for_a_host_and_once_for_its_domain(jar: CookieJar) -> None:
    """A host's own cookie and the one it set for the same name as a domain are two."""
    stored(jar, "a=1; Path=/", "a=2; Path=/; Domain=ads.example.com")

    assert "a=1; a=2" == sent(jar)
    assert "a=2" == sent(jar, host="x.ads.example.com")


def test_storing_tells_what_changed(jar: CookieJar) -> None:
    """The names of what was set are told in order; what was refused is not among them."""
    changed = stored(jar, "a=1", "nameless", "b=2; Domain=com", "__Host-c=3", "d=4")

    assert ("a", "d") == changed
    assert ["a", "d"] == [each.name for each in jar]


def test_the_oldest_cookie_makes_room(jar: CookieJar) -> None:
    """A full jar lets its oldest cookie go for a new one."""
    stored(jar, *(f"c{number}=v" for number in range(MAX_COOKIES + 2)))

    assert MAX_COOKIES == len(jar)
    assert "c2" == next(iter(jar)).name


def test_a_flood_drives_out_nobody_else(jar: CookieJar) -> None:
    """A hop that sets too many cookies loses its own oldest ones, and no other site loses any."""
    stored(jar, "uid=1", "sid=2", host="ads.other.example")
    stored(jar, *(f"c{number}=v" for number in range(60)))

    assert "uid=1; sid=2" == sent(jar, "ads.other.example")
    assert MAX_COOKIES == len(jar)
    assert [f"c{number}=v" for number in range(12, 60)] == sent(jar).split("; ")


@pytest.mark.parametrize("value", ["v" * 1_000, "v" * 3_990, "é" * 1_990])
def test_a_header_is_no_longer_than_servers_take(jar: CookieJar, value: str) -> None:
    """What would make the header too long is left out, later cookies first, and not named."""
    stored(jar, *(f"c{number:02}={value}" for number in range(20)))
    header = sent(jar)
    names = jar.names_for(host="ads.example.com", path="/vast/tag", secure=True, now=NOW)

    assert MAX_HEADER_BYTES - len(value.encode()) - 10 < len(header.encode()) <= MAX_HEADER_BYTES
    assert names == tuple(pair.partition("=")[0] for pair in header.split("; "))
    assert "c00" == names[0]
    assert 20 == len(jar)


def test_a_dead_cookie_makes_room_first(jar: CookieJar) -> None:
    """A full jar lets a cookie go that has expired, before it touches the living."""
    stored(jar, "old=v", "short=v; Max-Age=1", *(f"c{number}=v" for number in range(48)))
    jar.store(["new=v"], host="ads.example.com", path="/", secure=True, now=NOW + 2)

    assert MAX_COOKIES == len(jar)
    assert {"old", "new"} <= {each.name for each in jar}
    assert "short" not in {each.name for each in jar}


def test_a_seeded_cookie_is_for_its_host_alone(jar: CookieJar) -> None:
    """What is put in by hand goes to one host, on every path and scheme, for good."""
    assert jar.put("uid", "seed", "Ads.Example.com")
    assert "uid=seed" == sent(jar, path="/any", secure=False, now=NOW * 2)
    assert "" == sent(jar, host="x.ads.example.com")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "v"),
        ("a", "b; c=d"),
        ("a;b", "c"),
        ("a=b", "c"),
        ("a", "\r\nX: y"),
        ("a", " b"),
        (" a", "b"),
    ],
)
def test_a_seed_cannot_break_out_of_its_header(jar: CookieJar, name: str, value: str) -> None:
    """A name or a value that would read as something else is not put in."""
    assert not jar.put(name, value, "a.example")
    assert 0 == len(jar)


def test_a_jar_is_restored_from_its_cookies(jar: CookieJar, suffixes: SuffixTest) -> None:
    """A jar made of another's cookies sends the same."""
    stored(jar, "a=1; Path=/", "b=2; Domain=example.com; Max-Age=60")

    again = CookieJar(suffixes, jar)

    assert list(jar) == list(again)
    assert sent(jar) == sent(again)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_hosts_of_tests_and_sidecars_have_cookies(jar: CookieJar, host: str) -> None:
    """Addresses and single names get their own cookies back."""
    stored(jar, "a=1; Path=/", host=host)

    assert "a=1" == sent(jar, host=host)


@pytest.mark.parametrize(
    "domain",
    ["com", "co.uk", "github.io", "example", "test", "foo.ck", "s3.amazonaws.com", "xn--p1ai"],
)
def test_public_suffixes_are_known(suffixes: SuffixTest, domain: str) -> None:
    """Names of registries and of hosting sites are suffixes; so is a single unknown label."""
    assert suffixes(domain)


@pytest.mark.parametrize(
    "domain", ["example.com", "a.test", "a.example", "shop.co.uk", "me.github.io", "www.ck", ""]
)
def test_registrable_domains_are_no_suffixes(suffixes: SuffixTest, domain: str) -> None:
    """What one may register under a suffix is none itself."""
    assert not suffixes(domain)


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("ads.example.com", "com"),
        ("ads.example.co.uk", "co.uk"),
        ("me.github.io", "github.io"),
        ("me.github.io", "io"),
        ("a.example", "example"),
        ("a.s3.amazonaws.com", "s3.amazonaws.com"),
        ("a.s3.amazonaws.com", "amazonaws.com"),
        ("s3.amazonaws.com", "amazonaws.com"),
    ],
)
def test_no_cookie_crosses_a_public_suffix(jar: CookieJar, host: str, domain: str) -> None:
    """A domain that other sites share, or that lies beyond a shared one, voids the cookie."""
    assert () == stored(jar, f"a=1; Domain={domain}", host=host)


PIECES = st.sampled_from(
    (
        *(
            "a=b",
            "=",
            ";",
            " ",
            "\t",
            ".",
            "\x00",
            "\udc85",
            "é",
            "-1",
            "__Host-",
            "01 Jan 1994 0:0:0",
        ),
        *("Domain=", "Path=/", "Secure", "Max-Age=", "Expires=", "example", "ads.example", "co.uk"),
    )
)
LABELS = st.sampled_from(
    ["a", "ads", "com", "co", "uk", "github", "io", "example", "1", "ck", "s3"]
)
HOSTS = st.lists(LABELS, min_size=1, max_size=4).map(".".join)


def test_copied_jar_goes_its_own_way(suffixes: SuffixTest) -> None:
    """A copy has the same cookies, and neither learns what becomes of the other's."""
    jar = CookieJar(suffixes)
    stored(jar, "a=1; Path=/")
    copy = jar.copied()
    stored(copy, "b=2; Path=/")
    stored(jar, "a=3; Path=/")

    assert "a=3" == sent(jar)
    assert "a=1; b=2" == sent(copy)


@given(header=st.text() | st.lists(PIECES).map("".join), secure=st.booleans())
def test_any_text_gives_a_cookie_or_none(header: str, *, secure: bool) -> None:
    """Any text as ``Set-Cookie`` gives a cookie that can be sent as it is, or None."""
    cookie = parsed(header, secure=secure)

    assert cookie is None or (f"{cookie.name}={cookie.value}".encode() and cookie.name)
    assert cookie is None or (secure or not cookie.secure)


@given(text=st.text())
def test_any_text_gives_a_date_or_none(text: str) -> None:
    """Any text as a date gives seconds or None."""
    assert parse_date(text) is None or isinstance(parse_date(text), float)


@given(setter=HOSTS, domain=st.just("") | HOSTS, other=HOSTS)
def test_cookies_stay_with_their_site(
    suffixes: SuffixTest, setter: str, domain: str, other: str
) -> None:
    """A cookie goes to its setter, or below the setter's domain on one site; else nowhere."""
    jar = CookieJar(suffixes)
    stored(jar, f"a=1; Path=/; Domain={domain}", host=setter)
    if sent(jar, host=other) and other != setter:
        assert setter.endswith(f".{domain}") or setter == domain
        assert other.endswith(f".{domain}") or other == domain
        assert site(setter, suffixes) == site(other, suffixes)


def site(host: str, is_public_suffix: SuffixTest) -> str:
    """Give the registrable domain of *host*: the shortest end that is no public suffix."""
    labels = host.split(".")
    ends = [".".join(labels[at:]) for at in range(len(labels))]
    suffix = next(at for at, each in enumerate(ends) if is_public_suffix(each))
    return ends[max(0, suffix - 1)]


@given(
    headers=st.lists(st.lists(PIECES).map("".join), max_size=70),
    host=HOSTS,
    now=st.floats(0, 4e9),
)
def test_a_jar_stays_small_and_sends_only_text_for_a_header(
    suffixes: SuffixTest, headers: list[str], host: str, now: float
) -> None:
    """Whatever is stored, a jar keeps 50 cookies at most and sends no control characters."""
    jar = CookieJar(suffixes)
    jar.store(headers, host=host, path="/", secure=True, now=now)
    header = jar.header_for(host=host, path="/", secure=True, now=now)

    assert MAX_COOKIES >= len(jar)
    assert header.replace("\t", "").isprintable()
    assert header.encode().decode() == header
