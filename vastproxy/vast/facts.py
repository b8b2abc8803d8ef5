"""
What caps and budgets ask about an ad: whose it is, which one, and what it costs.

Rule 1: any ad gives facts, and quickly; what is missing, or cannot be read, is empty.
Rule 2: facts are the ad servers' own words, cut to a length. They are names to count by, and are
believed no more than that: nothing keeps an ad server from using another's.
Rule 3: they are read before wrappers are merged: the merge moves what is read here.

Which element gives which fact is in ``docs/vast.md``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b
from itertools import chain, islice

from lxml import etree

from vastproxy.vast.document import Ad, child, children, local_name, text_of
from vastproxy.vast.unwrap import ResolvedAd

MAX_LENGTH = 200
"""Characters of a fact. Ids of a hundred are in use; a key of a counter should not be a page."""

MAX_EXTENSION_ELEMENTS = 300
"""Elements of one level's Extensions among which a campaign is looked for; real ones have some
tens."""

MAX_PRICE = 1_000_000
"""Units of currency. What costs more for one ad, or a thousand of it, is a mistake."""

_DIGEST_BYTES = 8
_CAMPAIGN_NAMES = frozenset({"campaign", "campaignid"})
_UNKNOWN = frozenset({"", "unknown"})
"""What VAST 4.3 section 3.7.1 has for a creative without an id or without a registry."""

# xs:decimal, but for negative ones. Longer ones are no prices, and float's words are none either.
_DECIMAL = re.compile(r"\+?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")


@dataclass(frozen=True, slots=True)
class Pricing:
    """What an ad says that it costs."""

    model: str
    """Lower case: ``cpm``, ``cpc``, ``cpe``, ``cpv``; empty where it is not said."""
    currency: str
    """Upper case, as in ISO 4217: ``USD``; empty where it is not said."""
    value: Decimal
    """In units of the currency, for what *model* says: for ``cpm``, for a thousand."""


@dataclass(frozen=True, slots=True)
class AdFacts:
    """What caps and budgets may count an ad by. Empty: the ad does not say."""

    ad: str = ""
    """``AdSystem/id``: ids are an ad server's own, and many have a "1"."""
    advertiser: str = ""
    creative: str = ""
    """``registry/id``, or ``AdSystem/id`` where the creative is in no registry."""
    campaign: str = ""
    pricing: Pricing | None = None


def facts_of(ad: ResolvedAd) -> AdFacts:
    """
    Read the facts of *ad*, whose wrappers are not yet merged into it.

    In a document that is passed through, its ``inline`` may be a wrapper as well.
    """
    inline = ad.inline
    system = inline.system
    return AdFacts(
        ad=_ad_id(inline, system),
        advertiser=_advertiser(inline),
        creative=_creative_id(inline, system),
        campaign=_campaign(inline) or next(filter(None, map(_campaign, ad.wrappers)), ""),
        pricing=_pricing((*ad.wrappers, inline)),
    )


def _ad_id(inline: Ad, system: str) -> str:
    # No AdServingId stands in: it is new at each serving, so a cap by it would never be met.
    own = _words(inline.id)
    return _scoped(system, own) if own else ""


def _advertiser(inline: Ad) -> str:
    found = child(inline.body, "Advertiser")
    if found is None:
        return ""
    # An agency writes "ACME" where another writes "Acme": a cap means both.
    return _bounded((_words(found.get("id", "")) or _words(text_of(found))).casefold())


def _creative_id(inline: Ad, system: str) -> str:
    """Read the id of the first linear creative; where there is none, of the first creative."""
    creatives = child(inline.body, "Creatives")
    if creatives is None:
        return ""
    linear = (each for each in children(creatives, "Creative") if child(each, "Linear") is not None)
    chosen = next(linear, None)
    if chosen is None:
        chosen = child(creatives, "Creative")
    return (_universal(chosen, system) or _own_id(chosen, system)) if chosen is not None else ""


def _own_id(creative: etree._Element, system: str) -> str:
    """Read the id that the ad server itself gave: ``AdID`` until VAST 3.0, ``adId`` since."""
    for name in ("adId", "AdID", "adID", "id"):
        if found := _words(creative.get(name, "")):
            return _scoped(system, found)
    return ""


def _universal(creative: etree._Element, system: str) -> str:
    """Read the first UniversalAdId that says something; VAST 4.0 has it in ``idValue`` as well."""
    for each in children(creative, "UniversalAdId"):
        value = _words(text_of(each)) or _words(each.get("idValue", ""))
        if value.casefold() not in _UNKNOWN:
            registry = _words(each.get("idRegistry", "")).casefold()
            return _scoped(system if registry in _UNKNOWN else registry, value)
    return ""


def _campaign(ad: Ad) -> str:
    """Read the first element called for a campaign: its ``id``, else its text."""
    inside = chain.from_iterable(each.iter(etree.Element) for each in _extensions(ad))
    for each in islice(inside, MAX_EXTENSION_ELEMENTS):
        if local_name(each).lower() in _CAMPAIGN_NAMES:
            found = _words(each.get("id", "")) or _words(text_of(each))
            if found:
                return _bounded(found)
    return ""


def _extensions(ad: Ad) -> Iterator[etree._Element]:
    return children(ad.body, "Extensions")


def _pricing(levels: tuple[Ad, ...]) -> Pricing | None:
    """
    Read the price that the merged ad will carry: the first there is, from the outermost inwards.

    VAST 4.3 section 3.4.8. One that cannot be read hides those further in.
    """
    for level in levels:
        for each in children(level.body, "Pricing"):
            if text := text_of(each):
                return _price(each, text)
    return None


def _price(element: etree._Element, text: str) -> Pricing | None:
    if not _DECIMAL.fullmatch(text):
        return None
    value = Decimal(text)
    if value > MAX_PRICE:
        return None
    model, currency = _words(element.get("model", "")), _words(element.get("currency", ""))
    return Pricing(_bounded(model.lower()), _bounded(currency.upper()), value)


def _scoped(scope: str, own: str) -> str:
    """Put *scope* before *own*, so that the first slash is where it ends."""
    return _bounded(f"{_words(scope).replace('%', '%25').replace('/', '%2F')}/{own}")


def _words(text: str) -> str:
    """Give *text* with single blanks between words, and none around."""
    return " ".join(text.split())


def _bounded(text: str) -> str:
    """Cut *text* to MAX_LENGTH; two that begin alike stay two, by a digest at the end."""
    if len(text) <= MAX_LENGTH:
        return text
    digest = blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{text[: MAX_LENGTH - len(digest) - 1]}~{digest}"
