"""
What a whole answer must hold: figures of a program that answers something else are worth nothing.

Each check takes a body and gives what is wrong with it in a few words, or nothing.
"""

import json

from lxml import etree

from benchmarks.documents import LEVELS, impression_prefix


def fault_of_last(body: bytes) -> str:
    """Say what is wrong with the last document of a chain, handed out as it came."""
    return _fault_of_vast(body, LEVELS[-1:])


def fault_of_merged(body: bytes) -> str:
    """Say what is wrong with one InLine ad that carries the tracking of every level."""
    return _fault_of_vast(body, LEVELS)


def fault_of_json(body: bytes) -> str:
    """Say what is wrong with what vast-client made of the chain, as JSON."""
    try:
        ads = json.loads(body)["ads"]
    except (ValueError, KeyError, TypeError):
        return "no JSON with ads"
    if not ads or not any(each.get("mediaFiles") for each in ads[0]["creatives"]):
        return "no ad with media files"
    urls = [each["url"] for each in ads[0]["impressionURLTemplates"]]
    return _fault_of_impressions(urls, LEVELS)


def _fault_of_vast(body: bytes, levels: tuple[str, ...]) -> str:
    try:
        root = etree.fromstring(body)
    except etree.XMLSyntaxError as error:
        return f"no XML: {error}"
    if root.find("Ad/InLine") is None:
        return "no InLine"
    if root.find(".//Wrapper") is not None:
        return "a Wrapper is left"
    urls = [(each.text or "").strip() for each in root.iterfind("Ad/InLine/Impression")]
    return _fault_of_impressions(urls, levels)


def _fault_of_impressions(urls: list[str], levels: tuple[str, ...]) -> str:
    for level in levels:
        if not any(url.startswith(impression_prefix(level)) for url in urls):
            return f"the impression of the {level} level is missing"
    return ""
