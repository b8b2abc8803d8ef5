"""The demo: three ad servers, the proxy and a page, which show a chain being resolved."""

import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from lxml import etree

from tests.support.proxy import ROOT
from vastproxy.config.load import load
from vastproxy.config.units import Listen
from vastproxy.demo.ad_servers import ad_servers
from vastproxy.demo.run import config_path, page
from vastproxy.serving import served

PORTS = (9101, 9102, 9103)


def taken() -> list[int]:
    """Give those of the demo's ports that somebody else has."""
    found = []
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                found.append(port)
    return found


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """Run the demo with the config that ships, but for its listeners; give a player of it."""
    if ports := taken():
        pytest.skip(f"the demo's ports are fixed, and somebody has {ports}")
    config = load(ROOT / "config.yaml", {})
    where = {"listen": (Listen(path=f"{tmp_path}/s"),), "admin": ()}
    config = config.model_copy(update={"server": config.server.model_copy(update=where)})
    connector = aiohttp.UnixConnector(f"{tmp_path}/s")
    async with (
        ad_servers(),
        served(config, page),
        aiohttp.ClientSession("http://demo.example", connector=connector) as session,
    ):
        yield session


async def test_chain_gives_two_ads(demo: aiohttp.ClientSession) -> None:
    """A player gets the pod of two, numbered, each with the trackers of every wrapper above it."""
    reply = await demo.get("/vast/preroll?slot=pre&uid=me")
    ads = etree.fromstring(await reply.read()).findall("{*}Ad")
    impressions = [
        [(each.text or "").partition("?")[0] for each in ad.iterfind(".//{*}Impression")]
        for ad in ads
    ]

    assert [("advertiser-1", "1"), ("exchange-2", "2")] == [
        (ad.get("id"), ad.get("sequence")) for ad in ads
    ]
    above = ["http://127.0.0.1:9101/impression", "http://localhost:9102/impression"]
    advertiser = "http://127.0.0.1:9103/impression"
    assert [
        sorted([*above, advertiser]),
        sorted([*above, advertiser, "http://127.0.0.1:9101/impression"]),
    ] == [sorted(each) for each in impressions]


async def test_cookie_comes_back(demo: aiohttp.ClientSession) -> None:
    """The exchange knows on the last hop whom it met on the first; the reseller never learns."""
    reply = await demo.get("/demo/chain")
    told = json.loads(await reply.read())
    sent = {
        exchange["url"].partition("?")[0]: exchange["cookies_sent"]
        for hop in told["hops"]
        for exchange in hop["exchanges"]
    }

    assert sent == {
        "http://127.0.0.1:9101/vast": [],
        "http://localhost:9102/vast": [],
        "http://127.0.0.1:9103/pod": ["uid"],
        "http://127.0.0.1:9101/last": ["uid"],
    }
    assert "An ad for viewer-1" in told["vast"]


async def test_chain_as_json(demo: aiohttp.ClientSession) -> None:
    """The chain is told as JSON: its route, its four hops, and the document."""
    reply = await demo.get("/demo/chain")
    told = json.loads(await reply.read())

    assert ("/vast/preroll", 2, 4) == (told["route"], told["ads"], len(told["hops"]))
    assert [None, 1, 2, 3] == [each["parent"] for each in told["hops"]]
    assert [2, 3] == [len(each) for each in told["merged"]]


async def test_page(demo: aiohttp.ClientSession) -> None:
    """The page is HTML that asks for the chain, and loads nothing from elsewhere."""
    reply = await demo.get("/")
    html = await reply.text()

    assert (200, "text/html") == (reply.status, reply.content_type)
    assert "demo/chain" in html
    assert 'src="http' not in html
    assert "@import" not in html


async def test_other_routes_are_there(demo: aiohttp.ClientSession) -> None:
    """The config's other routes answer as well, and unknown paths do not."""
    direct = await demo.get("/vast/direct")

    assert b"<VASTAdTagURI>" in await direct.read()
    assert 404 == (await demo.get("/nothing")).status
    assert 404 == (await demo.post("/")).status


def test_config_of_the_demo(tmp_path: Path) -> None:
    """The demo takes the file that is asked for where it is there."""
    (tmp_path / "mine.yaml").touch()

    assert tmp_path / "mine.yaml" == config_path(tmp_path / "mine.yaml")
    assert "config.yaml" == config_path(Path("config.yaml")).name
