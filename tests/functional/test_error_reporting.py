"""
Who is told of a failure, by whom, with which code, and how often.

An ad that is answered belongs to the player, Errors and all. Of an ad that is not, nobody but the
proxy knows: it tells each wrapper above the failure, once (VAST 4.3 section 2.3.6).
"""

import itertools
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from lxml import etree

from tests.support.ad_server import AdServer, Received, Reply, in_thread
from tests.support.hostile import Trap, a_wrapper, an_inline, wrapper_element
from tests.support.proxy import Answer, Proxy, running_proxy

GRACE = 0.2
"""Seconds in which a ping that nobody ought to send would show."""
WITHIN = 5.0
AT_ONCE = 0.4
"""Seconds within which an answer comes that waits for nothing."""
MAX_PENDING = 1000
"""Pings that may wait at the same time."""

DEVICE = (
    ("User-Agent", "TheSofa/1.0 (TV)"),
    ("Accept-Language", "de-AT"),
    ("Referer", "http://page.example/film"),
)


@dataclass(slots=True)
class Field:
    """A proxy in front of an ad server that is also the one whose Errors are told."""

    proxy: Proxy
    server: AdServer
    trap: Trap
    names: Iterator[str] = field(default_factory=lambda: (f"t{n}" for n in itertools.count()))

    def story(self) -> "Story":
        """Give a set of documents that no other test knows."""
        return Story(self, next(self.names))


@dataclass(slots=True)
class Story:
    """The documents and Errors of one test, under a path of their own."""

    field: Field
    name: str

    @property
    def server(self) -> AdServer:
        """The ad server."""
        return self.field.server

    def url(self, document: str) -> str:
        """Give the URL of a *document*."""
        return self.server.url(f"/{self.name}/{document}")

    def error(self, who: str) -> str:
        """Give the Error URI of *who*."""
        return self.url(f"error/{who}?code=[ERRORCODE]")

    def put(self, document: str, reply: Reply | bytes | str) -> None:
        """Let the ad server answer *reply* for *document*."""
        body = reply.encode() if isinstance(reply, str) else reply
        self.server.replies[f"/{self.name}/{document}"] = body

    def chain(self, *documents: str) -> None:
        """Put wrappers that lead from the first of *documents* to the last, which is left out."""
        for document, following in itertools.pairwise(documents):
            self.put(document, a_wrapper(self.url(following), errors=[self.error(document)]))

    def ask(self, document: str, *, route: str = "proxy") -> Answer:
        """Ask the proxy for *document*."""
        return self.field.proxy.get(f"/{route}/{self.name}/{document}", DEVICE)

    def pings(self) -> list[Received]:
        """Give the requests for Error URIs so far."""
        prefix = f"/{self.name}/error/"
        return [each for each in list(self.server.requests) if each.path.startswith(prefix)]

    def told(self, count: int) -> dict[str, list[str]]:
        """Wait for *count* pings, and for none more; give their queries by who was told."""
        ends = time.monotonic() + WITHIN
        while len(self.pings()) < count and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(GRACE)
        found: dict[str, list[str]] = {}
        for each in self.pings():
            found.setdefault(each.path.rpartition("/")[2], []).append(each.query)
        return found

    def requests(self, document: str) -> int:
        """Count the requests for *document*."""
        return len(self.server.seen(f"/{self.name}/{document}"))


def code(number: int) -> list[str]:
    """Give what one ping with code *number* leaves behind."""
    return [f"code={number}"]


def ad_ids(answer: Answer) -> tuple[str, ...]:
    """Give the ids of the ads that are answered."""
    assert 200 == answer.status
    return tuple(ad.get("id", "") for ad in etree.fromstring(answer.body).findall("{*}Ad"))


def texts(answer: Answer, path: str) -> list[str]:
    """Give the texts of the elements at *path* of the answer."""
    found = etree.fromstring(answer.body).findall(path)
    return [(each.text or "").strip() for each in found]


def a_vast(*ads: str, version: str = "3.0") -> str:
    """Give a document with *ads*."""
    return f'<VAST version="{version}">{"".join(ads)}</VAST>'


def an_ad(body: str, *, sequence: int | None = None) -> str:
    """Give an ad with *body* (an InLine or a Wrapper); with *sequence* it belongs to a pod."""
    return f"<Ad>{body}</Ad>" if sequence is None else f'<Ad sequence="{sequence}">{body}</Ad>'


def an_inline_ad(ad_id: str, *, errors: Iterable[str] = (), sequence: int | None = None) -> str:
    """Give an InLine ad for :func:`a_vast`."""
    start = "<Ad " if sequence is None else f'<Ad sequence="{sequence}" '
    inline = an_inline(ad_id, errors=errors).decode()
    return start + inline.partition("<Ad ")[2].removesuffix("</VAST>")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Give a proxy with a route for each way to report errors, and one with two upstreams."""
    with Trap("127.0.0.2") as trap, in_thread(AdServer()) as server:
        server.fallback = lambda request: Reply(status=200 if "/error/" in request.path else 404)
        own = {"endpoint": server.url("/{rest}"), "session_params": [], "timeout": "1s"}
        second = own | {"endpoint": server.url("/second/{rest}")}
        config = {
            "egress": {"allow": ["127.0.0.1/32"]},
            "upstreams": {"own": own, "second": second},
            "routes": [
                {"path": "/proxy/{rest}", "upstreams": ["own"]},
                {"path": "/player/{rest}", "upstreams": ["own"], "error_reporting": "player"},
                {"path": "/both/{rest}", "upstreams": ["own", "second"]},
            ],
        }
        with running_proxy(config, tmp_path_factory.mktemp("errors")) as proxy:
            yield Field(proxy, server, trap)


@pytest.fixture
def story(stage: Field) -> Story:
    """Give the test a story of its own."""
    return stage.story()


def test_answered_ad(story: Story) -> None:
    """An ad that is answered leaves the Errors of all its levels to the player."""
    story.chain("one", "two", "ad")
    story.put("ad", an_inline("ad", errors=[story.error("ad")]))
    answer = story.ask("one")

    assert ("ad",) == ad_ids(answer)
    expected = [story.error("one"), story.error("two"), story.error("ad")]
    assert sorted(expected) == sorted(texts(answer, "{*}Ad/{*}InLine/{*}Error"))
    assert {} == story.told(0)


def test_failed_chain(story: Story) -> None:
    """Where a chain breaks, each wrapper above is told, and nobody below."""
    story.chain("one", "two", "three", "missing")
    answer = story.ask("one")

    assert () == ad_ids(answer)
    assert [] == texts(answer, "{*}Error")
    assert {"one": code(301), "two": code(301), "three": code(301)} == story.told(3)


def test_several_errors_of_one_wrapper(story: Story) -> None:
    """A wrapper with several Errors has all of them told."""
    errors = [story.error("first"), story.error("second"), story.error("third")]
    story.put("one", a_wrapper(story.url("missing"), errors=errors))
    story.ask("one")

    assert dict.fromkeys(["first", "second", "third"], code(301)) == story.told(3)


def test_failed_pod_ad(story: Story) -> None:
    """A pod ad that fails is left out and told; those that remain are the player's."""
    failing = wrapper_element(story.url("missing"), errors=[story.error("failing")])
    story.put(
        "pod",
        a_vast(
            an_inline_ad("a", errors=[story.error("a")], sequence=1),
            an_ad(failing, sequence=2),
            an_inline_ad("c", errors=[story.error("c")], sequence=3),
        ),
    )
    answer = story.ask("pod")

    assert ("a", "c") == ad_ids(answer)
    assert {"failing": code(301)} == story.told(1)


def test_failed_pod_behind_wrapper(story: Story) -> None:
    """A wrapper whose pod fails wholly is told of each of its ads: each had it above."""
    story.put(
        "one",
        a_wrapper(
            story.url("pod"), errors=[story.error("one")], attributes='allowMultipleAds="true"'
        ),
    )
    first = wrapper_element(story.url("missing"), errors=[story.error("first")])
    second = wrapper_element(story.url("empty"), errors=[story.error("second")])
    story.put("pod", a_vast(an_ad(first, sequence=1), an_ad(second, sequence=2)))
    story.put("empty", a_vast())
    answer = story.ask("one")
    told = story.told(4)

    assert () == ad_ids(answer)
    assert code(301) == told.pop("first")
    assert code(303) == told.pop("second")
    assert {"code=301", "code=303"} >= set(told.pop("one"))
    assert {} == told


def test_other_candidate(story: Story) -> None:
    """Where the first of several ads fails and another one plays, only the first is told."""
    failing = wrapper_element(story.url("missing"), errors=[story.error("failing")])
    story.put(
        "buffet",
        a_vast(
            an_ad(failing),
            an_inline_ad("b", errors=[story.error("b")]),
            an_inline_ad("c", errors=[story.error("c")]),
        ),
    )
    answer = story.ask("buffet")

    assert ("b",) == ad_ids(answer)
    assert {"failing": code(301)} == story.told(1)


def test_fallback_on_no_ad(story: Story) -> None:
    """A wrapper with fallbackOnNoAd gives its place to a stand-alone ad, and is told 303."""
    failing = wrapper_element(
        story.url("empty"),
        errors=[story.error("failing")],
        attributes='fallbackOnNoAd="true"',
    )
    story.put(
        "pod",
        a_vast(
            an_inline_ad("a", sequence=1),
            an_ad(failing, sequence=2),
            an_inline_ad("spare", errors=[story.error("spare")]),
        ),
    )
    story.put("empty", a_vast())
    answer = story.ask("pod")

    assert ("a", "spare") == ad_ids(answer)
    assert {"failing": code(303)} == story.told(1)


def test_next_upstream(story: Story) -> None:
    """Where the second upstream answers for the first, the first one's wrappers are told."""
    story.chain("one", "missing")
    story.server.replies[f"/second/{story.name}/one"] = an_inline("b", errors=[story.error("b")])
    answer = story.ask("one", route="both")

    assert ("b",) == ad_ids(answer)
    assert {"one": code(301)} == story.told(1)


def test_five_wrappers(story: Story) -> None:
    """Five wrappers before an InLine are followed."""
    story.chain("1", "2", "3", "4", "5", "ad")
    story.put("ad", an_inline("ad"))

    assert ("ad",) == ad_ids(story.ask("1"))
    assert {} == story.told(0)


def test_six_wrappers(story: Story) -> None:
    """The sixth wrapper is followed no more, and all six are told 302."""
    story.chain("1", "2", "3", "4", "5", "6", "ad")
    story.put("ad", an_inline("ad"))

    assert () == ad_ids(story.ask("1"))
    assert {name: code(302) for name in "123456"} == story.told(6)
    assert 0 == story.requests("ad")


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b'<VAST version="4.2"/>'),
        Reply(b'<VAST version="3.0"></VAST>'),
        Reply(status=204),
    ],
    ids=["empty", "open and closed", "204"],
)
def test_no_ad(story: Story, reply: Reply) -> None:
    """No ad behind wrappers is 303 to each of them."""
    story.chain("one", "two", "none")
    story.put("none", reply)

    assert () == ad_ids(story.ask("one"))
    assert {"one": code(303), "two": code(303)} == story.told(2)


def test_no_ad_with_error(story: Story) -> None:
    """No ad with an Error of its own is 303 to that one as well (VAST 4.3 section 3.2.1)."""
    story.chain("one", "none")
    story.put("none", a_vast(f"<Error><![CDATA[{story.error('none')}]]></Error>"))

    assert () == ad_ids(story.ask("one"))
    assert {"one": code(303), "none": code(303)} == story.told(2)


def test_no_ad_at_entry(story: Story) -> None:
    """The Error of an entry without ads goes on to the player, and is left to it."""
    story.put("none", a_vast(f"<Error><![CDATA[{story.error('none')}]]></Error>"))
    answer = story.ask("none")

    assert () == ad_ids(answer)
    assert [story.error("none")] == texts(answer, "{*}Error")
    assert {} == story.told(0)


def test_wrappers_not_followed(story: Story) -> None:
    """A wrapper that allows no further wrapper and is answered with one is told 303."""
    story.put(
        "one",
        a_wrapper(
            story.url("two"),
            errors=[story.error("one")],
            attributes='followAdditionalWrappers="false"',
        ),
    )
    story.chain("two", "ad")
    story.put("ad", an_inline("ad"))

    assert () == ad_ids(story.ask("one"))
    assert code(303) == story.told(1)["one"]
    assert 0 == story.requests("ad")


def test_loop(story: Story) -> None:
    """A chain that comes back to itself is 300 to each wrapper in it; nothing is asked twice."""
    story.chain("one", "two", "three", "two")

    assert () == ad_ids(story.ask("one"))
    told = story.told(3)
    assert [1, 1, 1] == [story.requests(name) for name in ("one", "two", "three")]
    assert {"one": code(300), "two": code(300), "three": code(300)} == told


def test_loop_to_entry(story: Story) -> None:
    """A chain that comes back to its entry is a loop, too."""
    story.chain("one", "two", "one")

    assert () == ad_ids(story.ask("one"))
    assert {"one": code(300), "two": code(300)} == story.told(2)
    assert 1 == story.requests("one")


def test_same_target_twice(story: Story) -> None:
    """Two ads of a pod may lead to the same URL: that is no loop."""
    ads = [an_ad(wrapper_element(story.url("ad")), sequence=n) for n in (1, 2)]
    story.put("pod", a_vast(*ads))
    story.put("ad", an_inline("ad"))

    assert ("ad", "ad") == ad_ids(story.ask("pod"))
    assert 2 == story.requests("ad")
    assert {} == story.told(0)


def test_neither_inline_nor_wrapper(story: Story) -> None:
    """An ad with neither InLine nor Wrapper is 101 to the wrapper above."""
    story.chain("one", "bad")
    story.put("bad", a_vast('<Ad id="bad"/>'))

    assert () == ad_ids(story.ask("one"))
    assert {"one": code(101)} == story.told(1)


def test_wrapper_without_target(story: Story) -> None:
    """A wrapper without VASTAdTagURI is 101, to it and to the one above."""
    bad = wrapper_element("x", errors=[story.error("bad")])
    story.chain("one", "bad")
    story.put("bad", a_vast(an_ad(re.sub("<VASTAdTagURI>.*?</VASTAdTagURI>", "", bad))))

    assert () == ad_ids(story.ask("one"))
    assert {"one": code(101), "bad": code(101)} == story.told(2)


@pytest.mark.parametrize("entry", ["one", "bad"])
def test_inline_without_creatives(story: Story, entry: str) -> None:
    """An InLine without Creatives is 101 to itself and to the wrapper above, if there is one."""
    story.chain("one", "bad")
    bad = an_inline("bad", errors=[story.error("bad")]).decode()
    story.put("bad", re.sub("<Creatives>.*</Creatives>", "", bad))
    expected = {name: code(101) for name in {entry, "bad"}}

    assert () == ad_ids(story.ask(entry))
    assert expected == story.told(len(expected))


def test_vast_1(story: Story) -> None:
    """A document of VAST 1.x is 102 to the wrapper above."""
    story.chain("one", "old")
    story.put("old", "<VideoAdServingTemplate><Ad/></VideoAdServingTemplate>")

    assert () == ad_ids(story.ask("one"))
    assert {"one": code(102)} == story.told(1)


def test_blocked_category(story: Story) -> None:
    """An ad of a category that a wrapper blocks is 205, to it and to the wrappers above."""
    blocked = '<BlockedAdCategories authority="iabtechlab.com">IAB7</BlockedAdCategories>'
    wrapper = a_wrapper(story.url("two"), errors=[story.error("one")], extra=blocked).decode()
    story.put("one", wrapper.replace('version="3.0"', 'version="4.2"'))
    story.chain("two", "ad")
    ad = an_inline("ad", errors=[story.error("ad")]).decode()
    category = '<Category authority="iabtechlab.com">IAB7</Category><Creatives>'
    story.put("ad", ad.replace("<Creatives>", category).replace('"3.0"', '"4.2"', 1))

    assert () == ad_ids(story.ask("one"))
    assert {"one": code(205), "two": code(205), "ad": code(205)} == story.told(3)


def test_left_to_player(story: Story) -> None:
    """Where Errors are the player's, it is handed all of them as root Errors; no ping is sent."""
    story.chain("one", "two", "missing")
    answer = story.ask("one", route="player")
    found = texts(answer, "{*}Error")

    assert () == ad_ids(answer)
    expected = {f"{story.url('error/' + name)}?code=" for name in ("one", "two")}
    assert expected == {each.partition("=")[0] + "=" for each in found}
    assert {"[ERRORCODE]", "301"} >= {each.partition("=")[2] for each in found}
    assert {} == story.told(0)


def test_ping(story: Story) -> None:
    """A ping has its macros filled and tells whose ad it was about."""
    error = story.url("error/one?[ERRORCODE]&c=[CACHEBUSTING]&u=[UNHEARDOF]&e=%5BERRORCODE%5D")
    story.put("one", a_wrapper(story.url("missing"), errors=[error]))
    story.ask("one")
    story.told(1)
    (ping,) = story.pings()

    assert "GET" == ping.method
    assert re.fullmatch(r"301&c=\d{8}&u=\[UNHEARDOF\]&e=(301|%5BERRORCODE%5D)", ping.query)
    assert "127.0.0.1" == ping.header("x-device-ip")
    assert "TheSofa/1.0 (TV)" == ping.header("x-device-user-agent")
    assert "de-AT" == ping.header("x-device-accept-language")
    assert "http://page.example/film" == ping.header("x-device-referer")
    assert None is ping.header("cookie")


def test_ping_is_redirected(story: Story) -> None:
    """A ping follows redirects, and each step is taken once."""
    for name, following in (("one", "two"), ("two", "three")):
        location = story.url(f"error/{following}?step")
        story.put(f"error/{name}", Reply(status=302, headers=(("Location", location),)))
    story.chain("one", "missing")
    story.ask("one")

    assert {"one": code(301), "two": ["step"], "three": ["step"]} == story.told(3)


@pytest.mark.parametrize(
    "reply",
    [Reply(status=500), Reply(status=503), Reply(reset=True), Reply(raw=b"nonsense")],
    ids=repr,
)
def test_ping_is_not_repeated(story: Story, reply: Reply) -> None:
    """A ping that fails is not sent again: it may have been counted."""
    story.put("error/one", reply)
    story.chain("one", "missing")
    for _ in range(2):
        story.ask("one")

    assert {"one": code(301) * 2} == story.told(2)


def test_no_ping_for_nothing(story: Story) -> None:
    """What is no http URL is passed over, and keeps nobody else from being told."""
    errors = ["about:blank", "", "javascript:alert(1)", "file:///etc/passwd", "http://[bad", "//"]
    errors += [story.error("good")]
    story.put("one", a_wrapper(story.url("missing"), errors=errors))

    assert () == ad_ids(story.ask("one"))
    assert {"good": code(301)} == story.told(1)


def test_ping_is_guarded(story: Story) -> None:
    """A ping goes through the egress guard, redirected or not."""
    forbidden = f"http://127.0.0.2:{story.field.trap.port}/"
    moved = Reply(status=302, headers=(("Location", forbidden),))
    story.put("error/moved", moved)
    errors = [forbidden, story.error("moved"), story.error("good")]
    story.put("one", a_wrapper(story.url("missing"), errors=errors))
    story.ask("one")

    assert {"moved": code(301), "good": code(301)} == story.told(2)
    assert 0 == story.field.trap.reached


def test_ping_delays_no_answer(story: Story) -> None:
    """An answer does not wait for the servers that are told of its failure."""
    story.put("error/one", Reply(delay=1.5))
    story.chain("one", "missing")
    times = []
    for _ in range(3):
        began = time.perf_counter()
        story.ask("one")
        times.append(time.perf_counter() - began)

    assert AT_ONCE > min(times)
    assert {"one": code(301) * 3} == story.told(3)


# The last one: it leaves the proxy with pings to send.
def test_ping_flood(stage: Field) -> None:
    """Of more pings than may wait, the rest is dropped; one line of the log says how many."""
    story = stage.story()
    errors = [story.url(f"error/{n}") for n in range(3 * MAX_PENDING)]
    story.put("flood", a_wrapper(story.url("missing"), errors=errors))
    began = time.perf_counter()
    answer = story.ask("flood")
    seconds = time.perf_counter() - began
    dropped = stage.proxy.wait_record(event="report.dropped")["dropped"]

    assert () == ad_ids(answer)
    assert AT_ONCE > seconds
    assert 2 * MAX_PENDING <= dropped < 3 * MAX_PENDING
    assert 3 * MAX_PENDING - dropped == len(story.told(3 * MAX_PENDING - dropped))
    assert 1 == len(stage.proxy.records(event="report.dropped"))
