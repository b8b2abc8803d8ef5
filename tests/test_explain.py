"""One tag, resolved and told: for people, for programs, and for whoever wants the document."""

import json
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.support.ad_server import AdServer, Reply, in_thread
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import a_config
from vastproxy.config.load import loads
from vastproxy.explain import (
    Question,
    RouteQuestion,
    answered,
    as_json,
    print_answer,
    print_answers,
    printable,
    resolved,
    trees,
    why_not,
)
from vastproxy.flow.ad_server import Explained
from vastproxy.upstream.headers import PROXY_USER_AGENT

ALLOW = (ip_network("127.0.0.0/8"),)


@pytest.fixture(scope="module")
def module_server() -> Iterator[AdServer]:
    """Run an ad server for this module."""
    with in_thread(AdServer()) as running:
        yield running


@pytest.fixture
def server(module_server: AdServer) -> AdServer:
    """Give the ad server with a chain that sets a cookie, and with no requests yet."""
    server = module_server
    cookie = ("Set-Cookie", "uid=1; Path=/")
    server.requests.clear()
    server.replies |= {
        "/chain": Reply(
            a_wrapper(server.url("/moved?t=[TIMESTAMP]"), impressions=["http://i/"], ad="w"),
            headers=(cookie,),
        ),
        "/moved": Reply(status=302, headers=(("Location", "/end"),)),
        "/end": an_inline(ad="last"),
        "/dead": a_wrapper(server.url("/gone"), errors=[server.url("/error")]),
        "/none": b'<VAST version="3.0"/>',
    }
    return server


async def explained(server: AdServer, path: str = "/chain", **more: Any) -> Explained:
    """Resolve the tag at *path*."""
    return await resolved(Question(server.url(path), allow=ALLOW, **more))


def drawn(answer: Explained) -> str:
    """Draw *answer* as text."""
    console = Console(width=1000)
    with console.capture() as capture:
        for each in trees(answer):
            console.print(each)
    return capture.get()


async def test_tag_is_taken_literally(server: AdServer) -> None:
    """Braces in a tag are the ad server's, not placeholders; nothing is added to it."""
    await explained(server, "/chain?a={query.b}&c=%2f")
    first = server.requests[0]

    assert "/chain?a={query.b}&c=%2f" == first.target
    assert PROXY_USER_AGENT == first.header("User-Agent")
    assert first.header("X-Device-IP") is None


async def test_tree(server: AdServer) -> None:
    """The tree tells every hop as it was named, every request as it went out, ads and merging."""
    told = drawn(await explained(server))
    lines = [line.strip("└─├│ ") for line in told.splitlines()]

    assert lines[0].startswith(f"hop 1 {server.url('/chain')}  ")
    assert "VAST 3.0" in lines[0]
    assert any(line.startswith(f"GET {server.url('/chain')}  200  ") for line in lines)
    assert any(line.startswith(f"hop 2 {server.url('/moved?t=[TIMESTAMP]')}  ") for line in lines)
    assert any("  302  " in line and "out: uid" in line for line in lines)
    assert "in: uid" in next(line for line in lines if line.startswith("GET "))
    assert "Wrapper w (S)" in lines
    assert "InLine last (S)" in lines
    assert "ad last (S)" in lines
    assert "w (S): merged 1 Impression" in lines


async def test_tree_of_a_dead_chain(server: AdServer) -> None:
    """A failure is told where it happened, in sum, and by how many would have heard of it."""
    told = drawn(await explained(server, "/dead"))

    assert "301: HTTP status 404" in told
    assert "no ad: HTTP status 404 (301)" in told
    assert "the proxy would tell 1 <Error> URIs" in told


async def test_nothing_is_reported(server: AdServer) -> None:
    """Who debugs a tag raises nobody's error counts."""
    await explained(server, "/dead")

    assert [] == server.seen("/error")


async def test_tree_does_not_read_markup() -> None:
    """Brackets and controls in what ad servers say are text, and nothing more."""
    document = an_inline(ad="[bold red]x[/bold red]")
    told = drawn(await resolved(Question("file", document)))

    assert "InLine [bold red]x[/bold red] (S)" in told
    assert "\x1b" not in told


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("ad (Łódź) 🎬 [bold]", "ad (Łódź) 🎬 [bold]"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\x9b31mb", r"a\x9b31mb"),
        ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"),
        ("a\r\n\tb\x07\x7f", r"a\r\n\tb\x07\x7f"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
        ("", ""),
    ],
)
def test_printable(written: str, text: str) -> None:
    """What can be printed stays; escapes, C1 and bidi characters and breaks are spelled out."""
    assert text == printable(written)


STEERING = "x\x9b31m\u202e\u2066\x85\u2028y"
"""Characters that steer a terminal and may stand in XML 1.0."""


async def test_tree_does_not_steer_a_terminal(server: AdServer) -> None:
    """Names, addresses and reasons in the tree have no character that steers a terminal."""
    server.replies["/dead"] = a_wrapper(f"http://{STEERING}/", ad=STEERING)
    told = drawn(await explained(server, "/dead"))
    wrapper = a_wrapper(server.url(f"/end?{STEERING}"), ad=STEERING, impressions=["http://i/"])
    document = wrapper.replace(b"<AdSystem>S", f"<AdSystem>{STEERING}".encode())
    told += drawn(await resolved(Question("file", document, allow=ALLOW)))

    assert "ad last (S)" in told
    assert rf"Wrapper {printable(STEERING)} ({printable(STEERING)})" in told
    assert rf"{printable(STEERING)} ({printable(STEERING)}): merged 1 Impression" in told
    assert [] == [each for each in told if not each.isprintable() and each != "\n"]


async def test_reason_does_not_steer_a_terminal(
    server: AdServer, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Nor has the reason on standard error."""
    body = f"<BlockedAdCategories>{STEERING}</BlockedAdCategories>"
    server.replies["/dead"] = a_wrapper(server.url("/end")).replace(
        b"</Wrapper>", f"{body}</Wrapper>".encode()
    )
    server.replies["/end"] = an_inline().replace(
        b"</InLine>", f"<Category>{STEERING}</Category></InLine>".encode()
    )
    answer = await explained(server, "/dead")
    print_answer(answer, "vast")
    text = capsysbinary.readouterr().err.decode().removesuffix("\n")

    assert r"x\x9b31m\u202e\u2066" in text
    assert text.isprintable()


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"nonsense", "(100)"),
        (b"<html/>", "(101)"),
        (b'<VAST version="3.0"/>', "the ad server has none"),
        (b'<VAST version="3.0"><Ad><InLine/></Ad></VAST>', "without Creatives (101)"),
    ],
)
async def test_why_not(document: bytes, reason: str) -> None:
    """There is always a reason in words for having no ad."""
    answer = await resolved(Question("file", document))

    assert reason in why_not(answer)
    assert b'<VAST version="3.0"' in answer.body


async def test_json_is_whole(server: AdServer) -> None:
    """The JSON holds the document, each hop with its requests, and what was merged."""
    answer = await explained(server)
    told = json.loads(json.dumps(as_json(answer)))
    first, second = told["hops"]

    assert answer.body.decode() == told["vast"]
    assert (1, [], 1) == (told["ads"], told["reports"], second["parent"])
    assert ["uid"] == first["exchanges"][0]["cookies_set"]
    assert [302, 200] == [each["status"] for each in second["exchanges"]]
    assert [[{"wrapper": "w", "system": "S", "taken": {"Impression": 1}, "dropped": {}}]] == (
        told["merged"]
    )


async def test_json_of_a_dead_chain(server: AdServer) -> None:
    """The JSON of a dead chain has the report that the proxy would send."""
    told = as_json(await explained(server, "/dead"))

    assert (0, []) == (told["ads"], told["merged"])
    assert [(301, (server.url("/error"),))] == [
        (each["code"], each["uris"]) for each in told["reports"]
    ]


async def test_document_is_printed_alone(
    server: AdServer, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """As a document, the answer and a line break are all of standard output."""
    answer = await explained(server)
    capsysbinary.readouterr()  # the log, which nobody has set up here
    print_answer(answer, "vast")

    assert (answer.body + b"\n", b"") == capsysbinary.readouterr()


async def test_reason_is_printed_beside(
    server: AdServer, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Where there is no ad, the reason goes to standard error."""
    answer = await explained(server, "/none")
    capsysbinary.readouterr()  # the log, which nobody has set up here
    print_answer(answer, "vast")
    out, err = capsysbinary.readouterr()

    assert answer.body + b"\n" == out
    assert b"no ad: the ad server has none (--format tree tells more)\n" == err


@pytest.mark.parametrize("style", ["tree", "json"])
async def test_other_styles_print_on_standard_output(
    server: AdServer, capsys: pytest.CaptureFixture[str], style: str
) -> None:
    """Tree and JSON go to standard output; long lines are not folded in a pipe."""
    long = replace(Question(server.url("/chain?x=" + "x" * 500)), allow=ALLOW)
    print_answer(await resolved(long), style)
    out, err = capsys.readouterr()

    assert "x" * 500 in out
    assert "" == err


async def test_limits_of_the_question(server: AdServer) -> None:
    """The question's limits hold: wrappers, time, and networks that are private."""
    few = await explained(server, max_hops=0)
    server.replies["/end"] = Reply(b"", delay=30)
    slow = await explained(server, timeout=0.2)
    private = await resolved(Question(server.url("/chain")))

    assert "(302)" in why_not(few)
    assert "(301)" in why_not(slow)
    assert "(300)" in why_not(private)


# --- By a route of a configuration --------------------------------------------------------------


def a_question(
    server: AdServer, target: str = "/ad", times: int = 1, **route: Any
) -> RouteQuestion:
    """Ask a route whose upstreams are at ``/main`` and ``/house``."""
    upstreams: dict[str, Any] = {
        "main": {
            "endpoint": server.url("/main"),
            "params": {"slot": "{query.slot}", "agent": "{header.User-Agent}"},
            "circuit_breaker": {"fail_max": 2},
        },
        "house": server.url("/house"),
    }
    routes = [{"path": "/ad", "upstreams": ["main", "house"], **route}]
    config = loads(
        yaml.safe_dump(a_config(upstreams, routes), sort_keys=False),
        source="config.yaml",
        environ={},
    )
    return RouteQuestion(config, target, (("User-Agent", "TV"),), times)


async def test_route_is_asked_as_by_a_player(server: AdServer) -> None:
    """The route's upstreams are asked with the query and the headers that a player would send."""
    server.replies |= {"/main": an_inline(ad="first")}
    [answer] = await answered(a_question(server, "/ad?slot=pre"))

    assert b'id="first"' in answer.body
    assert ["slot=pre&agent=TV"] == [each.query for each in server.seen("/main")]
    assert "TV" == server.seen("/main")[0].header("User-Agent")
    assert "waterfall" not in drawn(answer)


async def test_breaker_is_seen_at_work(server: AdServer) -> None:
    """Asked several times in a row, breakers are as the requests before have left them."""
    server.replies |= {"/main": Reply(status=500), "/house": an_inline(ad="second")}
    first, second, third = await answered(a_question(server, times=3))
    lines = [line.strip("└─├│ ") for line in drawn(third).splitlines()]

    assert 2 == len(server.seen("/main"))
    assert () == first.changes
    assert ["open"] == [each.new for each in second.changes]
    assert any(
        line.startswith("breaker main closed->open: ") for line in drawn(second).splitlines()
    )
    assert "waterfall" in lines
    assert any("  main: breaker (" in line for line in lines)
    assert any(line.endswith("  house: ad") for line in lines)
    told = json.loads(json.dumps(as_json(third)))
    assert ["breaker", "ad"] == [each["what"] for each in told["waterfall"]]
    assert ([], [], 1) == (told["breakers"], told["shadowed"], told["ads"])


async def test_nothing_is_counted(server: AdServer) -> None:
    """Caps are not asked: whoever debugs sees the ad however often it is asked for."""
    server.replies |= {"/main": an_inline()}
    cap = {"limit": 1, "window": "1h", "kind": "rolling", "by": "viewer"}
    question = a_question(server, "/ad?uid=me", 3, viewer=["query:uid"], frequency_caps=[cap])

    assert [1, 1, 1] == [each.outcome.ads for each in await answered(question)]


async def test_document_that_is_passed_through(server: AdServer) -> None:
    """Of a route that passes documents through it is said that it did."""
    server.replies |= {"/main": a_wrapper("http://gone.example/")}
    [answer] = await answered(a_question(server, mode="passthrough"))

    assert "the document is passed through, with 1 ads" in drawn(answer)
    assert b"<Wrapper>" in answer.body
    assert 1 == as_json(answer)["ads"]


async def test_path_of_no_route(server: AdServer) -> None:
    """A path that no route has is told, with those that there are."""
    with pytest.raises(ValueError, match=r"no route has the path /x \(there are: /ad\)"):
        await answered(a_question(server, "/x?a=1"))


@pytest.mark.parametrize("style", ["tree", "json", "vast"])
async def test_several_answers_are_printed(
    server: AdServer, capsysbinary: pytest.CaptureFixture[bytes], style: str
) -> None:
    """Several answers are told apart for people, and are a list for programs."""
    server.replies |= {"/main": an_inline(ad="first")}
    answers = await answered(a_question(server, times=2))
    capsysbinary.readouterr()  # the log, which nobody has set up here
    print_answers(answers, style)
    text = capsysbinary.readouterr().out.decode()

    assert 2 == text.count("InLine first" if style == "tree" else "<InLine>")
    assert ("--- 2 of 2 ---" in text) == (style == "tree")
    if style == "json":
        assert [1, 1] == [each["ads"] for each in json.loads(text)]
