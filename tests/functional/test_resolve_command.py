"""``vastproxy resolve``: one tag without a server, told to programs and to people."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.ad_server import EMPTY_VAST, AdServer, Reply
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import a_config, run_vastproxy
from tests.support.vast_facts import read

ALLOW = ("--egress-allow", "127.0.0.0/8")


def resolve(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Resolve with hops to loopback allowed; the exit code must be 0, and no traceback shown."""
    done = run_vastproxy("resolve", *ALLOW, *arguments, stdin=stdin)

    assert 0 == done.returncode, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def a_chain(ads: AdServer) -> str:
    """Let *ads* serve two wrappers and an InLine, and give the URL of the first."""
    ads.replies["/1"] = a_wrapper(
        ads.url("/2?x=%2F&cb=[CACHEBUSTING]"), impressions=["https://t.example/1"], ad="outer"
    )
    ads.replies["/2"] = Reply(
        a_wrapper("/3", impressions=["https://t.example/2"], ad="inner"),
        headers=(("Set-Cookie", "c=1; Path=/"),),
    )
    ads.replies["/3"] = an_inline(impressions=["https://t.example/3"])
    return ads.url("/1?a={b}&c=%2f")


def a_document(ads: AdServer) -> bytes:
    """Give the first document of the chain, which *ads* serves from the second on."""
    a_chain(ads)
    document = ads.replies.pop("/1")
    assert isinstance(document, bytes)
    return document


def impressions(document: bytes) -> list[list[str]]:
    """Give the impressions of each ad of *document*, in alphabetical order."""
    return [
        sorted(fact.text for fact in ad.facts.elements() if fact.kind == "Impression")
        for ad in read(document)
    ]


MERGED = [["https://t.example/1", "https://t.example/2", "https://t.example/3"]]


def test_url(ads: AdServer) -> None:
    """A URL is asked for as it is written, and the merged document is printed."""
    done = resolve(a_chain(ads))

    assert MERGED == impressions(done.stdout)
    assert b"" == done.stderr
    assert [b"GET /1?a={b}&c=%2f HTTP/1.1"] == [each.line for each in ads.seen("/1")]


def test_file(ads: AdServer, tmp_path: Path) -> None:
    """A file is where the chain starts."""
    path = tmp_path / "tag.xml"
    path.write_bytes(a_document(ads))

    assert MERGED == impressions(resolve(str(path)).stdout)
    assert [] == ads.seen("/1")


def test_standard_input(ads: AdServer) -> None:
    """``-`` reads the first document from standard input."""
    assert MERGED == impressions(resolve("-", stdin=a_document(ads)).stdout)


def test_max_hops(ads: AdServer) -> None:
    """A chain with more wrappers than allowed gives no ad, and the reason, 302."""
    url = a_chain(ads)
    done = resolve(url, "--max-hops", "1")

    assert [] == read(done.stdout)
    assert b"302" in done.stderr
    assert MERGED == impressions(resolve(url, "--max-hops", "2").stdout)


def test_timeout(ads: AdServer) -> None:
    """A chain that takes longer than allowed gives no ad, and the reason, 301."""
    url = a_chain(ads)
    ads.replies["/3"] = Reply(an_inline(), delay=30)
    done = resolve(url, "--timeout", "300ms")

    assert [] == read(done.stdout)
    assert b"301" in done.stderr


def test_private_networks_need_leave(ads: AdServer) -> None:
    """A wrapper may not lead to a private address that the command line does not allow."""
    done = run_vastproxy("resolve", a_chain(ads))

    assert [] == read(done.stdout)
    assert [] == ads.seen("/2")
    assert b"no ad" in done.stderr


def test_nothing_is_reported(ads: AdServer) -> None:
    """Who looks at a tag raises nobody's error counts."""
    ads.replies["/1"] = a_wrapper(ads.url("/gone"), errors=[ads.url("/error")])
    resolve(ads.url("/1"))

    assert [] == ads.seen("/error")


def test_tree(ads: AdServer) -> None:
    """The tree tells a person every hop: URL on the wire, status, time, cookies, merges."""
    text = resolve(a_chain(ads), "--format", "tree").stdout.decode()

    for path in ("/1?a={b}&c=%2f", "/2?x=%2F&cb=", "/3"):
        assert re.search(rf"GET {re.escape(ads.url(path))}\S*  200  \d+ bytes  \d+ ms", text)
    assert re.search(r"cookies in: c ", text)
    assert re.search(r"out: c\b", text)
    assert re.search(r"outer .*merged .*1 Impression", text)


def test_tree_of_failure(ads: AdServer) -> None:
    """The tree of a chain that fails tells where, and with which code."""
    ads.replies["/1"] = a_wrapper(ads.url("/2"), errors=["https://t.example/error"])
    ads.replies["/2"] = EMPTY_VAST
    text = resolve(ads.url("/1"), "--format", "tree").stdout.decode()

    assert "303" in text
    assert "1 <Error> URI" in text


def test_json(ads: AdServer) -> None:
    """JSON has the hops with their exchanges, and the document."""
    told = json.loads(resolve(a_chain(ads), "--format", "json").stdout)
    hops = told["hops"]
    exchanges = [each for hop in hops for each in hop["exchanges"]]

    assert MERGED == impressions(told["vast"].encode())
    assert 1 == told["ads"]
    assert [(1, None, 0), (2, 1, 1), (3, 2, 2)] == [
        (hop["number"], hop["parent"], hop["depth"]) for hop in hops
    ]
    assert [200, 200, 200] == [each["status"] for each in exchanges]
    assert [ads.url("/1?a={b}&c=%2f"), ads.url("/3")] == [exchanges[0]["url"], exchanges[2]["url"]]
    assert [[], [], ["c"]] == [each["cookies_sent"] for each in exchanges]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("no/such/file.xml",),
        ("ftp://ads.example/tag",),
        ("http://127.0.0.1/", "--timeout", "soon"),
        ("http://127.0.0.1/", "--egress-allow", "everything"),
        ("http://127.0.0.1/", "--max-hops", "-1"),
        ("http://127.0.0.1/", "--format", "pdf"),
        ("http://127.0.0.1/", "--times", "2"),
        ("http://127.0.0.1/", "-H", "X-Viewer: me"),
        ("/ad", "-c", "config.yaml", "--timeout", "1s"),
        ("/ad", "-c", "config.yaml", "-H", "nonsense"),
        ("/no/such/route", "-c", "config.yaml"),
        ("/ad", "-c", "no/such/config.yaml"),
    ],
)
def test_mistakes(arguments: tuple[str, ...]) -> None:
    """A mistake on the command line is told in words, not in a traceback, with exit code 1 or 2."""
    done = run_vastproxy("resolve", *arguments)

    assert done.returncode in {1, 2}
    assert b"" == done.stdout
    assert re.search(rb"[Ee]rror", done.stderr)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("document", [b"", b"no XML", b"<VAST", b"<rss/>", b"\xff\xfe\x00"])
def test_broken_document(document: bytes) -> None:
    """A document that is none gives an empty VAST, and the reason."""
    done = resolve("-", stdin=document)

    assert [] == read(done.stdout)
    assert b"no ad" in done.stderr


def a_route(ads: AdServer, tmp_path: Path) -> str:
    """Write a configuration whose first upstream fails, and give its path."""
    ads.replies |= {"/main": Reply(status=500), "/house": an_inline(ad="house")}
    upstreams = {
        "main": {"endpoint": ads.url("/main"), "circuit_breaker": {"fail_max": 2}},
        "house": {"endpoint": ads.url("/house"), "params": {"who": "{viewer}"}},
    }
    route = {"path": "/ad", "upstreams": ["main", "house"], "viewer": ["header:X-Viewer"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(a_config(upstreams, [route])))
    return str(path)


def test_route(ads: AdServer, tmp_path: Path) -> None:
    """With a configuration its routes are asked, with a player's query and headers."""
    arguments = ("-c", a_route(ads, tmp_path), "/ad?slot=pre", "-H", "X-Viewer: me")
    done = run_vastproxy("resolve", *arguments)

    assert (0, b"") == (done.returncode, done.stderr)
    assert ["house"] == [ad.id for ad in read(done.stdout)]
    assert ["who=me&slot=pre"] == [each.query for each in ads.seen("/house")]


def test_route_asked_several_times(ads: AdServer, tmp_path: Path) -> None:
    """Asked several times the tree shows when the breaker opens, and what that changes."""
    arguments = ("-c", a_route(ads, tmp_path), "/ad", "--times", "3", "--format", "tree")
    text = run_vastproxy("resolve", *arguments).stdout.decode()
    parts = text.split("--- ")

    assert 2 == len(ads.seen("/main"))
    assert "breaker main closed->open" in parts[2]
    assert re.search(r"ms  main: breaker \(.+\)\n.*ms  house: ad", parts[3])
