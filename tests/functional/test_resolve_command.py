"""``vastproxy resolve``: one tag without a server, told to programs and to people."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.ad_server import EMPTY_VAST, AdServer, Reply
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import run_vastproxy
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
    ],
)
def test_mistakes(arguments: tuple[str, ...]) -> None:
    """A mistake on the command line is told in words, not in a traceback, with exit code 1 or 2."""
    done = run_vastproxy("resolve", *arguments)

    assert done.returncode in {1, 2}
    assert b"" == done.stdout
    assert re.search(rb"Error", done.stderr)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("document", [b"", b"no XML", b"<VAST", b"<rss/>", b"\xff\xfe\x00"])
def test_broken_document(document: bytes) -> None:
    """A document that is none gives an empty VAST, and the reason."""
    done = resolve("-", stdin=document)

    assert [] == read(done.stdout)
    assert b"no ad" in done.stderr
