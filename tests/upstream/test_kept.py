"""Keys of a cache, what it keeps, and what it says of it."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.documents import a_wrapper, an_inline
from vastproxy.config.units import Source
from vastproxy.model import HopReply
from vastproxy.session.session import Fetched
from vastproxy.upstream.freshness import Lifetime
from vastproxy.upstream.kept import (
    CLOCK_TOLERANCE,
    Answer,
    Asking,
    CacheSettings,
    CacheVerdict,
    Facts,
    decoded,
    encoded,
    facts_of_document,
    kept_form,
    key_of,
)
from vastproxy.vast.parse import parse

URL = "https://ads.example/vast?slot=pre"
AN_AD = Facts(filled=True, priced=False, expires=None)
NO_AD = Facts(filled=False, priced=False, expires=None)
FREE = CacheSettings(scope="shared")
PERSONAL = CacheSettings(scope="viewer")
LIFETIME = Lifetime(300, 10, 200)


def an_answer(body: bytes = b"<VAST/>", *headers: tuple[str, str]) -> Answer:
    """Build an answer with an ad."""
    return Answer(Fetched(HopReply(200, headers, body), URL), AN_AD)


def key(settings: CacheSettings = FREE, url: str = URL, **more: object) -> str:
    """Give the key of a request at the upstream "house"."""
    return key_of("house", settings, Asking(url, **more))  # type: ignore[arg-type]


# --- Keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://ads.example/vast?slot=pre&cb=1",
        "https://ads.example/vast?correlator=2&slot=pre&timestamp=%20",
        "https://ads.example/vast?slot=pre&ord",
        "https://ads.example/vast?slot=pre#top",
    ],
)
def test_volatile_parameters_are_in_no_key(url: str) -> None:
    """Parameters that are another in each request, and the fragment, do not tell URLs apart."""
    assert key() == key(url=url)


@pytest.mark.parametrize(
    "url",
    [
        "https://ads.example/vast",
        "https://ads.example/vast?slot=mid",
        "https://ads.example/vast?slot=%70re",
        "https://ads.example/vast?slot=pre&xcb=1",
        "https://ads.example/vast?slot=pre&CB=1",
        "https://ads.example/vast/cb=1?slot=pre",
        "http://ads.example/vast?slot=pre",
    ],
)
def test_all_else_of_a_url_is_in_the_key(url: str) -> None:
    """What is not ignored tells URLs apart, byte for byte."""
    assert key() != key(url=url)


@pytest.mark.parametrize("query", ["?", "?cb=1", "?cb=1&ord=2", "?&", "?cb&#top"])
def test_query_of_ignored_parameters_is_none(query: str) -> None:
    """A URL whose query has nothing that counts is the URL without one."""
    url = "https://ads.example/vast"

    assert key(url=url) == key(url=url + query)
    assert key(url=url) != key(url=f"{url}?a")


def test_order_of_parameters_counts() -> None:
    """An ad server may read the first of two: their order is part of the key."""
    assert key(url=f"{URL}&a=1&a=2") != key(url=f"{URL}&a=2&a=1")


def test_ignored_parameters_are_the_operators() -> None:
    """With a list of one's own, its parameters are ignored, and the usual ones count."""
    settings = CacheSettings(scope="shared", ignore=frozenset({"uid"}))

    assert key(settings) == key(settings, f"{URL}&uid=1")
    assert key(settings) != key(settings, f"{URL}&cb=1")


def test_viewer_is_in_personal_keys_alone() -> None:
    """A personal answer is found by its viewer only, a shared one by everybody."""
    assert key(viewer="ann") == key(viewer="bob") == key()
    assert 3 == len({key(PERSONAL, viewer=each) for each in ("ann", "bob", "")})


def test_what_may_not_be_mixed_has_keys_of_its_own() -> None:
    """Upstreams, classes, paid and unpaid, vary sets and their values are apart."""
    language, uid = Source("header", "accept-language"), Source("query", "uid")
    keys = {
        key(),
        key(PERSONAL),
        key(CacheSettings(scope="shared", paid=True)),
        key(CacheSettings(scope="shared", vary=(language,)), varying=("de",)),
        key(CacheSettings(scope="shared", vary=(uid,)), varying=("de",)),
        key(varying=("de",)),
        key(varying=("d", "e")),
        key(varying=("", "de")),
        key(varying=("d', 'e",)),
        key_of("other", FREE, Asking(URL)),
    }

    assert 10 == len(keys)


def test_no_viewer_can_be_read() -> None:
    """Neither a key nor what is printed for people has the id of a viewer."""
    url = f"{URL}&uid=ann-7"
    asking = Asking(url, "ann-7", ("ann-7",), has_cookies=True, deadline=5.0)

    assert "Asking(has_cookies=True, deadline=5.0)" == repr(asking)
    assert "ann" not in key_of("house", PERSONAL, asking)
    assert re.fullmatch("1:house:viewer:free:[0-9a-f]{40}", key_of("house", PERSONAL, asking))


def test_any_text_makes_a_key() -> None:
    """What came as bytes that were no UTF-8 has a key as well."""
    assert key(url=f"{URL}&a=\udc85") != key(url=f"{URL}&a=\udc86")


# Nothing that ends a parameter or the URL: what is ignored, and fragments, are in no key.
REQUESTS = st.tuples(
    st.text(st.characters(exclude_characters="&#")), st.text(), st.lists(st.text(), max_size=3)
)


@given(REQUESTS, REQUESTS)
def test_different_requests_have_different_keys(
    first: tuple[str, str, list[str]], second: tuple[str, str, list[str]]
) -> None:
    """However values are spread over URL, viewer and vary set, no two meet in a key."""
    one, other = (
        key(PERSONAL, f"{URL}&a={value}", viewer=viewer, varying=tuple(varying))
        for value, viewer, varying in (first, second)
    )

    assert (first == second) == (one == other)


# --- Facts ------------------------------------------------------------------------------------


def ads(*bodies: str) -> Facts:
    """Read the facts of a document with such ads."""
    inside = "".join(f"<Ad>{each}</Ad>" for each in bodies)
    return facts_of_document(parse(f'<VAST version="4.2">{inside}</VAST>'.encode()))


def test_facts_of_documents() -> None:
    """InLines and wrappers are ads; a document without, or with empty ones, has none."""
    assert AN_AD == facts_of_document(parse(an_inline()))
    assert AN_AD == facts_of_document(parse(a_wrapper("https://a.example/")))
    assert NO_AD == ads() == ads("")


@pytest.mark.parametrize(
    "priced",
    [
        '<InLine><Pricing model="cpm" currency="USD">2</Pricing></InLine>',
        "<Wrapper><Pricing/></Wrapper>",
        "<InLine><Extensions><Extension><x><Pricing>1</Pricing></x></Extension></Extensions></InLine>",
        '<InLine xmlns="http://www.iab.com/VAST"><Pricing>2</Pricing></InLine>',
    ],
)
def test_any_price_is_one(priced: str) -> None:
    """An answer is priced if any of its ads has a price, wherever and whichever."""
    assert ads("<InLine/>", priced).priced
    assert not ads("<InLine/>").priced


@pytest.mark.parametrize(
    ("texts", "least"),
    [
        (("300", "60"), 60.0),
        ((" 5 ",), 5.0),
        (("0",), 0.0),
        (("-1",), 0.0),
        (("soon",), None),
        (("", "90"), 90.0),
        (("99999999999",), None),
    ],
)
def test_first_ad_to_expire_counts(texts: tuple[str, ...], least: float | None) -> None:
    """The least ``<Expires>`` is the answer's; what is no number says nothing."""
    assert least == ads(*(f"<InLine><Expires>{each}</Expires></InLine>" for each in texts)).expires


# --- The second level -------------------------------------------------------------------------


def test_kept_form_has_nothing_of_who_asked() -> None:
    """Headers but the type, cookies, redirects and the parsed document are not kept."""
    headers = (("content-type", "text/xml"), ("x-served-for", "ann"), ("set-cookie", "a=b"))
    reply = HopReply(200, headers, b"<VAST/>")
    redirect = HopReply(302, (("location", URL),), b"")
    fetched = Fetched(reply, URL, set_cookies=True, sent_cookies=True, on_the_way=(redirect,))
    answer = Answer(fetched, AN_AD, object())
    kept = HopReply(200, (("content-type", "text/xml"),), b"<VAST/>")

    assert Answer(Fetched(kept, URL), AN_AD) == kept_form(answer)


@given(
    body=st.binary(),
    url=st.text(max_size=20),
    kind=st.one_of(st.none(), st.text(max_size=10)),
    expires=st.one_of(st.none(), st.floats(0, 1e6)),
)
def test_answers_come_back(body: bytes, url: str, kind: str | None, expires: float | None) -> None:
    """What is written for the second level is read again, whatever bytes it has."""
    headers = () if kind is None else (("content-type", kind),)
    answer = Answer(
        Fetched(HopReply(200, headers, body), url),
        Facts(filled=False, priced=True, expires=expires),
    )
    found = decoded(encoded(answer, LIFETIME, 1000.0), 1100.0)

    assert (answer, LIFETIME, 100 + CLOCK_TOLERANCE) == found


def test_clocks_may_differ_a_little() -> None:
    """An answer from a clock slightly ahead is as if just fetched; from further, it is none."""
    value = encoded(an_answer(), LIFETIME, 1000.0)

    assert (CLOCK_TOLERANCE,) == (decoded(value, 999.0) or ())[2:]
    assert decoded(value, 997.9) is None


WRITTEN = encoded(an_answer(), LIFETIME, 1000.0)


def changed(**fields: object) -> bytes:
    """Write an answer whose head has other fields."""
    line, _, body = WRITTEN.partition(b"\n")
    return json.dumps({**json.loads(line), **fields}).encode() + b"\n" + body


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\n",
        b"<VAST/>",
        b"[" * 60_000,
        b"[" * 100_000,
        b"null\n<VAST/>",
        b"[]\n",
        b"{}\n",
        b"\xff\xfe\n<VAST/>",
        WRITTEN[:-1],
        WRITTEN + b"x",
        changed(format=2),
        changed(status=500),
        changed(status="200"),
        changed(url=None),
        changed(filled="yes"),
        changed(fetched=None),
        changed(fetched=float("nan")),
        changed(fetched=-float("inf")),
        changed(fetched=10**400),
        changed(ttl=float("nan")),
        changed(error=float("inf")),
        changed(ttl=10**400),
    ],
)
def test_anything_else_is_nothing(value: bytes) -> None:
    """What was not written here, or not whole, or by another version, is no answer."""
    assert decoded(value, 1100.0) is None


@given(st.data())
def test_garbage_is_nothing_or_an_answer(data: st.DataObject) -> None:
    """Bytes that were changed on the way give nothing, or what can be used."""
    start = data.draw(st.integers(0, len(WRITTEN)))
    cut = data.draw(st.integers(0, 5))
    value = WRITTEN[:start] + data.draw(st.binary(max_size=5)) + WRITTEN[start + cut :]
    found = decoded(value, 1100.0)

    assert found is None or (found[2] >= CLOCK_TOLERANCE and found[0].fetched.reply.status)


# --- Cache-Status -----------------------------------------------------------------------------

ITEM = r"""-?[0-9]{1,15}|[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*|"(?:[ !#-\[\]-~]|\\["\\])*\""""
PARAMETER = re.compile(rf"; *([a-z*][a-z0-9_.*-]*)(?:=({ITEM}))?")
REGISTERED = {"hit", "fwd", "fwd-status", "ttl", "stored", "collapsed", "key", "detail"}
REASONS = {"bypass", "method", "uri-miss", "vary-miss", "miss", "request", "stale", "partial"}


def parameters(member: str) -> dict[str, str]:
    """Read a member of a list of items, with its parameters (RFC 8941 section 3.1)."""
    assert re.fullmatch(rf"vastproxy(?:{PARAMETER.pattern})*", member), member
    return {name: value or "?1" for name, value in PARAMETER.findall(member)}


@pytest.mark.parametrize(
    ("verdict", "header", "words"),
    [
        (CacheVerdict("hit", age=13, ttl=287.9), "hit; ttl=287", "hit"),
        (
            CacheVerdict("stale", age=311, ttl=-11.2, reason="upstream failed: HTTP status 500"),
            "hit; ttl=-12",
            "stale (upstream failed: HTTP status 500)",
        ),
        (CacheVerdict("miss", stored=True, ttl=300), "fwd=uri-miss; stored", "miss, stored"),
        (CacheVerdict("miss", reason="vary"), "fwd=uri-miss", "miss (vary)"),
        (CacheVerdict("miss", stored=True, outdated=True), "fwd=stale; stored", "miss, stored"),
        (CacheVerdict("collapsed"), "fwd=uri-miss; collapsed", "collapsed"),
        (CacheVerdict("pass", reason="paid"), "fwd=miss", "pass (paid)"),
        (CacheVerdict("bypass", reason="cookies"), "fwd=bypass", "bypass (cookies)"),
    ],
)
def test_verdict_is_told(verdict: CacheVerdict, header: str, words: str) -> None:
    """A verdict is a member of Cache-Status for programs, and a few words for logs."""
    member = verdict.header("primary")
    found = parameters(member)

    assert f"vastproxy; {header}; detail=primary" == member
    assert words == verdict.words
    assert set(found) <= REGISTERED
    # RFC 9211 section 2.2: hit and fwd exclude each other.
    assert ("hit" in found) != ("fwd" in found)
    assert found.get("fwd", "miss") in REASONS


@given(st.text())
def test_any_name_makes_a_header(name: str) -> None:
    """Whatever an upstream is called, the header is well-formed, and can be sent."""
    member = CacheVerdict("hit", ttl=1).header(name)

    assert {"hit", "ttl", "detail"} == set(parameters(member))
    assert member.isascii()
    assert member.isprintable()


def test_name_is_quoted_where_it_has_to_be() -> None:
    """A name that is no token is a string, with what is no ASCII replaced."""
    assert 'vastproxy; hit; ttl=1; detail="1st \\"ü\\\\"'.replace("ü", "?") == CacheVerdict(
        "hit", ttl=1
    ).header('1st "ü\\')
