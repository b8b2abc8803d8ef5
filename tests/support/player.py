"""
Many players at once: they ask the proxy for ads, find its beacons in the answers, and fire them.

An answer is read as a player reads it, with lxml and by the names of elements; what is fired goes
out byte for byte as it stood in the document.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

import aiohttp
from lxml import etree
from yarl import URL

VERSIONS = {"2.0", "3.0", "4.0", "4.1", "4.2", "4.3"}
"""What a document may say that it is."""

MOST_AT_ONCE = 200
"""Beacons under way at one time: many of them, and no more than a listener's queue takes."""

WITHIN = 60.0
"""Seconds after which an answer does not come any more."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What one player got."""

    status: int
    body: bytes
    seconds: float
    """From the request to the last byte."""
    at: float = 0.0
    """When it was asked for, on the monotonic clock."""

    @property
    def root(self) -> etree._Element:
        """The document; an error where it is none."""
        return etree.fromstring(self.body)

    @property
    def is_vast(self) -> bool:
        """Whether a player can use it: status 200, VAST, and whole InLines or Wrappers in it."""
        root = self.root
        known = root.get("version") in VERSIONS and _name(root) == "VAST"
        ads = [each for each in root if _name(each) == "Ad"]
        return self.status == HTTPStatus.OK and known and all(map(_is_whole, ads))

    @property
    def ads(self) -> list[str]:
        """The ids of its ads."""
        return [each.get("id", "") for each in self.root.iter() if _name(each) == "Ad"]

    @property
    def beacons(self) -> list[str]:
        """The proxy's own impressions, ad by ad."""
        own = self.root.iterfind(".//{*}Impression[@id='vastproxy']")
        return [(each.text or "").strip() for each in own]


def _name(element: etree._Element) -> str:
    return etree.QName(element).localname if isinstance(element.tag, str) else ""


def _is_whole(ad: etree._Element) -> bool:
    bodies = [each for each in ad if _name(each) in {"InLine", "Wrapper"}]
    wanted = {"InLine": "Creatives", "Wrapper": "VASTAdTagURI"}
    return len(bodies) == 1 and all(
        any(_name(part) == name for part in bodies[0])
        for name in ("AdSystem", wanted[_name(bodies[0])])
    )


class Player:
    """Players of the proxy at *base*, with as many connections as they want; has no cookies."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=WITHIN),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, target: str, headers: Mapping[str, str] | None = None) -> Answered:
        """Ask for *target*."""
        return await self._get(f"{self.base}{target}", headers)

    async def _get(self, url: str, headers: Mapping[str, str] | None = None) -> Answered:
        assert self._session is not None
        began = time.monotonic()
        async with self._session.get(URL(url, encoded=True), headers=headers) as reply:
            body = await reply.read()
        return Answered(reply.status, body, time.monotonic() - began, began)

    async def ask_at_once(self, target: str, count: int) -> list[Answered]:
        """Ask *count* times for *target*, all at one time."""
        return await asyncio.gather(*(self.ask(target) for _ in range(count)))

    async def fire(
        self, urls: Iterable[str], headers: Mapping[str, str] | None = None
    ) -> list[Answered]:
        """Call *urls*, at most MOST_AT_ONCE at a time, and give the answers in their order."""
        room = asyncio.Semaphore(MOST_AT_ONCE)

        async def fired(url: str) -> Answered:
            """Call one of them when there is room."""
            async with room:
                return await self._get(url, headers)

        return await asyncio.gather(*map(fired, urls))

    def __repr__(self) -> str:
        return f"<Player of {self.base}>"


async def traffic(
    player: Player, targets: Sequence[str], *, rate: float, seconds: float
) -> list[Answered]:
    """
    Ask for *targets* in turn, *rate* times a second for *seconds*, whether or not answers come.

    Every ad's beacon is fired at once. Answers are in the order of asking.
    """
    count = round(rate * seconds)
    async with asyncio.TaskGroup() as group:
        began = time.monotonic()
        tasks = []
        for number in range(count):
            await asyncio.sleep(began + number / rate - time.monotonic())
            tasks.append(group.create_task(shown(player, targets[number % len(targets)])))
    return [each.result() for each in tasks]


async def shown(player: Player, target: str) -> Answered:
    """Ask for *target*, and fire what its ads want when they are shown."""
    answered = await player.ask(target)
    fired = await player.fire(answered.beacons)
    assert {HTTPStatus.NO_CONTENT} >= {each.status for each in fired}
    return answered


def percentile(answers: Sequence[Answered], share: float) -> float:
    """Give the seconds in which *share* of the *answers* came, at the most."""
    ordered = sorted(each.seconds for each in answers)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
