"""
Scripts for the unwrapper: documents as compact values, answers, and what was decided.

Rule 1: a URL is a word such as ``u:1``: absolute, and short enough to read in a table.
Rule 2: every ad has the error URI ``e:<id>``, so that a report names the ads that were told.
Rule 3: an ad that came out is written as its path, ``w1>w2>a``, with ``#2`` for its sequence.

Fetching is a plain function here: no network, no clock.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any
from urllib.parse import urljoin

from vastproxy.errors import VastError
from vastproxy.vast.document import VastDocument
from vastproxy.vast.merge import merge
from vastproxy.vast.parse import parse
from vastproxy.vast.serialise import assemble, to_bytes
from vastproxy.vast.unwrap import Policy, Report, ResolvedAd, Unwrapped, Unwrapper, Want

ENTRY = "u:entry"
"""Where the first document of a script comes from."""

CREATIVES = (
    "<Creatives><Creative><Linear><Duration>00:00:30</Duration></Linear></Creative></Creatives>"
)
"""What makes an InLine playable."""


def _attributes(**values: object) -> str:
    return "".join(f' {name}="{value}"' for name, value in values.items() if value is not None)


def inline(
    name: str, *, seq: object = None, body: str = "", creatives: str = CREATIVES, error: str = ""
) -> str:
    """Write an InLine called *name*; *body* stands between its Error and its *creatives*."""
    inside = f"<Error>{error or 'e:' + name}</Error>{body}{creatives}"
    return f"<Ad{_attributes(id=name, sequence=seq)}><InLine>{inside}</InLine></Ad>"


def wrapper(name: str, to: str | None, *, seq: object = None, body: str = "", **rules: Any) -> str:
    """
    Write a Wrapper called *name* that leads *to* a URL; None: that has no VASTAdTagURI.

    *rules* are ``follow``, ``multiple`` and ``fallback``, as written.
    """
    flags = _attributes(
        followAdditionalWrappers=rules.get("follow"),
        allowMultipleAds=rules.get("multiple"),
        fallbackOnNoAd=rules.get("fallback"),
    )
    tag = "" if to is None else f"<VASTAdTagURI>{to}</VASTAdTagURI>"
    inside = f"{tag}<Error>e:{name}</Error>{body}"
    return f"<Ad{_attributes(id=name, sequence=seq)}><Wrapper{flags}>{inside}</Wrapper></Ad>"


def broken(name: str, *, seq: object = None) -> str:
    """Write an InLine called *name* that has no Creatives, and cannot be played."""
    return inline(name, seq=seq, creatives="")


def response(*ads: str, version: str = "4.2", errors: tuple[str, ...] = ()) -> VastDocument:
    """Make a document of *ads*, with the *errors* of its root."""
    told = "".join(f"<Error>{each}</Error>" for each in errors)
    return parse(f'<VAST version="{version}">{told}{"".join(ads)}</VAST>'.encode())


class Script:
    """
    One tree of wrappers, told step by step.

    *first* is the entry document, or the ads of one; *rules* are those of :class:`Policy`.
    """

    def __init__(self, *first: str | VastDocument, **rules: Any) -> None:
        entry = first[0] if len(first) == 1 and isinstance(first[0], VastDocument) else None
        document = entry or response(*(str(each) for each in first))
        self.unwrapper = Unwrapper(document, ENTRY, Policy(**rules))
        self._open: list[Want] = []
        self._fresh: list[Want] = []

    def wants(self) -> list[str]:
        """Give the URLs that are asked for now, and not before."""
        self._look()
        fresh, self._fresh = self._fresh, []
        return [each.url for each in fresh]

    def want(self, url: str) -> Want:
        """Give the first open want of *url*."""
        self._look()
        return next(each for each in self._open if each.url == url)

    def feed(self, url: str, *ads: str | VastDocument, final: str = "") -> "Script":
        """Answer *url* by a document, or by *ads*; *final* is where redirects ended."""
        ready = ads[0] if len(ads) == 1 and isinstance(ads[0], VastDocument) else None
        want = self._taken(url)
        document = ready or response(*(str(each) for each in ads))
        self.unwrapper.feed(want, document, final or url)
        return self

    def fail(self, url: str, code: int = 301) -> "Script":
        """Let *url* lead nowhere."""
        self.unwrapper.fail(self._taken(url), code, "so the script says")
        return self

    def ads(self) -> list[str]:
        """Give the paths of the ads that came out, in playing order."""
        return [path_of(each) for each in self.unwrapper.result().ads]

    def reports(self) -> list[tuple[int, str]]:
        """Give code and URIs of each report, in the order they were made."""
        return [told(each) for each in self.unwrapper.result().reports]

    @property
    def is_done(self) -> bool:
        """Whether nothing is open."""
        return self.unwrapper.is_done

    def _look(self) -> None:
        fresh = self.unwrapper.wanted()
        self._open += fresh
        self._fresh += fresh

    def _taken(self, url: str) -> Want:
        want = self.want(url)
        self._open.remove(want)
        self._fresh = [each for each in self._fresh if each is not want]
        return want


def path_of(ad: ResolvedAd) -> str:
    """Write the path of *ad*."""
    names = ">".join(each.id for each in (*ad.wrappers, ad.inline))
    return names if ad.sequence is None else f"{names}#{ad.sequence}"


def told(report: Report) -> tuple[int, str]:
    """Write whom *report* tells, and which code."""
    return report.code, " ".join(report.uris)


Fetch = Callable[[str], tuple[bytes, str] | None]
"""Gives the body of a URL and where it finally came from, or None for a failure."""


def unwrapped(entry: bytes, url: str, fetch: Fetch, random: Random | None = None) -> Unwrapped:
    """Resolve *entry*; hops are answered in the order of *random*, or in the order asked for."""
    unwrapper = Unwrapper(parse(entry), url)
    for want in _in_some_order(unwrapper, random):
        answer = fetch(want.url)
        if answer is None:
            unwrapper.fail(want, 301, "no answer")
            continue
        try:
            document = parse(answer[0])
        except VastError as error:
            unwrapper.fail(want, error.vast_code, str(error))
        else:
            unwrapper.feed(want, document, answer[1])
    return unwrapper.result()


def _in_some_order(unwrapper: Unwrapper, random: Random | None) -> Iterator[Want]:
    waiting = list(unwrapper.wanted())
    while waiting:
        yield waiting.pop(random.randrange(len(waiting)) if random else 0)
        waiting += unwrapper.wanted()


def written(result: Unwrapped) -> bytes:
    """Merge and write *result*, which has an ad."""
    merge(result)
    return to_bytes(assemble(result))


def chained(*documents: bytes | str) -> bytes:
    """Merge *documents*, each of which answers the one wrapper of the one before."""
    bodies = [each.encode() if isinstance(each, str) else each for each in documents]
    rest = iter(bodies[1:])
    return written(unwrapped(bodies[0], ENTRY, lambda url: (next(rest), url)))


def served(pages: dict[str, Any], server: str) -> Fetch:
    """Answer from the *pages* of a random tree at *server*: replies, by target or by path."""

    def fetch(url: str) -> tuple[bytes, str] | None:
        target = url.removeprefix(server)
        reply = pages.get(target) or pages.get(target.partition("?")[0])
        if reply is None or reply.status >= 400:
            return None
        if 300 <= reply.status < 400:
            return fetch(urljoin(url, dict(reply.headers)["Location"]))
        return reply.body or b"<VAST/>", url

    return fetch
