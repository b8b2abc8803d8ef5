"""What caps and budgets read of an ad: whose it is, which one, and what it costs."""

import re
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.script import CREATIVES, Script, inline, wrapper
from tests.support.vast_facts import IAB
from tests.support.vast_strategies import mutated
from vastproxy.errors import VastError
from vastproxy.vast.facts import (
    MAX_EXTENSION_ELEMENTS,
    MAX_LENGTH,
    MAX_PRICE,
    AdFacts,
    Pricing,
    facts_of,
)
from vastproxy.vast.merge import merge
from vastproxy.vast.parse import parse
from vastproxy.vast.unwrap import ResolvedAd


def ad_behind(*levels: str) -> ResolvedAd:
    """Resolve the documents *levels*, each of which answers the one wrapper of the one before."""
    script = Script(parse(levels[0].encode()))
    for each in levels[1:]:
        (url,) = script.wants()
        script.feed(url, parse(each.encode()))
    (ad,) = script.unwrapper.result().ads
    return ad


def facts(body: str = "", *, ad: str = "a", creatives: str = CREATIVES, **rules: Any) -> AdFacts:
    """Read the facts of an InLine; *rules* are its wrappers' bodies, outermost first."""
    above = rules.get("wrappers", ())
    levels = [wrapper(f"w{n}", f"u:{n}", body=each) for n, each in enumerate(above)]
    levels.append(inline(ad, body=body, creatives=creatives))
    return facts_of(ad_behind(*(f'<VAST version="4.2">{each}</VAST>' for each in levels)))


def creative(inside: str = "", attributes: str = "", kind: str = "<Linear/>") -> str:
    """Write a creative in its container."""
    return f"<Creatives><Creative {attributes}>{inside}{kind}</Creative></Creatives>"


def campaign(inside: str) -> str:
    """Write an extension that holds *inside*."""
    return f'<Extensions><Extension type="any"><Deep>{inside}</Deep></Extension></Extensions>'


def price(text: str, model: str = "CPM", currency: str = "usd") -> str:
    """Write a Pricing."""
    return f'<Pricing model="{model}" currency="{currency}">{text}</Pricing>'


def test_nothing_said() -> None:
    """An ad that says nothing of itself gives empty facts, and is an ad all the same."""
    assert AdFacts() == facts(ad="", creatives="<Creatives/>")
    assert AdFacts() == facts(ad=" \n ", creatives=creative())


# --- Which ad -----------------------------------------------------------------------------------


def test_ad_is_named_with_its_server() -> None:
    """An ad is its AdSystem and its id: the "1" of one ad server is not that of another."""
    one, other = (facts(f"<AdSystem>{each}</AdSystem>", ad="1") for each in ("One", "Other"))

    assert ("One/1", "Other/1") == (one.ad, other.ad)


def test_ad_without_a_server() -> None:
    """Without an AdSystem there is nothing before the slash."""
    assert "/a" == facts().ad


@pytest.mark.parametrize(
    ("name", "system", "ad"),
    [
        ("A b/1", " A\n b ", " 1 "),
        ("a%2Fb/c", "a/b", "c"),
        ("a/b/c", "a", "b/c"),
        ("a%252Fb/c", "a%2Fb", "c"),
    ],
)
def test_names_of_ads_cannot_be_confused(name: str, system: str, ad: str) -> None:
    """Blanks are made even, and the first slash is always the end of the ad server's name."""
    assert name == facts(f"<AdSystem>{system}</AdSystem>", ad=ad).ad


def test_ad_without_an_id() -> None:
    """Without an id an ad is none to count by: its AdServingId is another one each time."""
    body = "<AdSystem>S</AdSystem><AdServingId> serving </AdServingId>"

    assert not facts(body, ad="").ad
    assert "S/a" == facts(body).ad


# --- Whose --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advertiser", "element"),
    [
        ("acme", "<Advertiser> ACME\n</Advertiser>"),
        ("acme & söhne", "<Advertiser><![CDATA[Acme  &\tSÖHNE]]></Advertiser>"),
        ("strasse", "<Advertiser>Straße</Advertiser>"),
        ("id-7", '<Advertiser id=" ID-7 ">Acme</Advertiser>'),
        ("acme", '<Advertiser id="  ">Acme</Advertiser>'),
        ("first", "<Advertiser>First</Advertiser><Advertiser>Second</Advertiser>"),
        ("", "<Advertiser/>"),
    ],
)
def test_advertiser(advertiser: str, element: str) -> None:
    """An advertiser is its id, else its name, in any case."""
    assert advertiser == facts(element).advertiser


# --- Which creative -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "universal"),
    [
        ("ad-id.org/8465", '<UniversalAdId idRegistry="Ad-ID.org"> 8465 </UniversalAdId>'),
        ("r/8465", '<UniversalAdId idRegistry="r" idValue="8465"/>'),
        ("r/text", '<UniversalAdId idRegistry="r" idValue="attribute">text</UniversalAdId>'),
        ("S/8465", '<UniversalAdId idRegistry="unknown">8465</UniversalAdId>'),
        ("S/8465", "<UniversalAdId>8465</UniversalAdId>"),
        ("S/own", '<UniversalAdId idRegistry="r">Unknown</UniversalAdId>'),
        ("S/own", '<UniversalAdId idRegistry="unknown" idValue="unknown">unknown</UniversalAdId>'),
        (
            "r/2",
            '<UniversalAdId>unknown</UniversalAdId><UniversalAdId idRegistry="r" idValue="2"/>',
        ),
        ("r/1", '<UniversalAdId idRegistry="r" idValue="1"/><UniversalAdId idValue="2"/>'),
    ],
)
def test_universal_ad_id(name: str, universal: str) -> None:
    """A creative is its first UniversalAdId that says something, with the registry."""
    assert (
        name == facts("<AdSystem>S</AdSystem>", creatives=creative(universal, 'id="own"')).creative
    )


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("S/1", 'adId="1" id="2"'),
        ("S/1", 'AdID="1" id="2"'),
        ("S/1", 'adID="1" id="2"'),
        ("S/2", 'adId=" " id="2"'),
        ("", ""),
    ],
)
def test_creative_of_old_versions(name: str, attributes: str) -> None:
    """Else it is the ad server's own id for it, however that was written."""
    assert name == facts("<AdSystem>S</AdSystem>", creatives=creative("", attributes)).creative


def test_first_linear_creative() -> None:
    """It is the first with a Linear that counts, and the first of all where none has one."""
    companion = '<Creative id="c"><CompanionAds/></Creative>'
    linears = '<Creative id="l"><Linear/></Creative><Creative id="m"><Linear/></Creative>'

    assert "/l" == facts(creatives=f"<Creatives>{companion}{linears}</Creatives>").creative
    assert "/c" == facts(creatives=f"<Creatives>{companion}</Creatives>").creative


# --- Which campaign -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("spring", "<Campaign> spring </Campaign>"),
        ("7", "<CampaignId>7</CampaignId>"),
        ("7", "<CampaignID><![CDATA[7]]></CampaignID>"),
        ("7", "<campaignid>7</campaignid>"),
        ("7", '<x:CAMPAIGN xmlns:x="urn:x">7</x:CAMPAIGN>'),
        ("7", '<Campaign id="7">Spring</Campaign>'),
        ("2", "<Campaign/><CampaignId>2</CampaignId>"),
        ("", "<CampaignName>7</CampaignName>"),
        ("", "<!-- <Campaign>7</Campaign> --><?Campaign 7?>"),
    ],
)
def test_campaign(name: str, element: str) -> None:
    """A campaign is an element of that name anywhere in the Extensions."""
    assert name == facts(campaign(element)).campaign


def test_campaign_stands_in_extensions_only() -> None:
    """An element of that name elsewhere says nothing."""
    assert not facts("<Campaign>7</Campaign>").campaign


def test_campaign_of_the_inline_goes_first() -> None:
    """The InLine's own goes before its wrappers', and of these the outermost goes first."""
    levels = [campaign("<Campaign>outer</Campaign>"), campaign("<Campaign>inner</Campaign>")]

    assert "own" == facts(campaign("<Campaign>own</Campaign>"), wrappers=levels).campaign
    assert "outer" == facts(wrappers=levels).campaign
    assert "inner" == facts(wrappers=["", levels[1]]).campaign


# --- What it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("2.50", " 2.50\n"),
        ("25", "<![CDATA[ 25 ]]>"),
        ("0", "0"),
        ("0.5", ".5"),
        ("1", "+1"),
        ("3", "3."),
        ("7", "007"),
        ("1000000", str(MAX_PRICE)),
        ("0.00000000000000000001", "0.00000000000000000001"),
    ],
)
def test_price(value: str, text: str) -> None:
    """A price is read exactly; its model and currency in one spelling."""
    assert Pricing("cpm", "USD", Decimal(value)) == facts(price(text)).pricing


@pytest.mark.parametrize(
    "text",
    [
        *("-1", "++1", "1e3", "NaN", "Infinity", "sNaN", "1,5", "$2", "2 USD", "1_000", "٣", "0x1"),
        *("1000000.01", "9" * 20, "1" * 5000, "0." + "1" * 21, ".", "TJ2BTGAACsMK", "[PRICE]"),
    ],
)
def test_what_is_no_price(text: str) -> None:
    """What is no plain number between none and a million is no price."""
    assert facts(price(text)).pricing is None


def test_price_of_the_outermost_wrapper() -> None:
    """The outermost wrapper that has a price goes before all others, the InLine's too."""
    levels = ["", price("1"), price("2")]

    assert Pricing("cpm", "USD", Decimal(1)) == facts(price("3"), wrappers=levels).pricing
    assert Pricing("cpm", "USD", Decimal(3)) == facts(price("3"), wrappers=[""]).pricing


def test_price_without_its_kind() -> None:
    """A price that does not say of what is read; who charges it decides."""
    assert Pricing("", "", Decimal(1)) == facts("<Pricing>1</Pricing>").pricing


def test_empty_price_is_none() -> None:
    """An empty element is passed over, as the merge does."""
    assert (
        Pricing("cpm", "USD", Decimal(3))
        == facts("<Pricing/>" + price("3"), wrappers=[price(" ")]).pricing
    )


def test_unreadable_price_hides_others() -> None:
    """One that cannot be read is the ad's price, and none: no other is charged in its place."""
    assert facts(price("3"), wrappers=[price("secret")]).pricing is None


@given(
    st.lists(st.sampled_from(("", price("1"), price(" "), price("x"), price("4"))), max_size=3),
    st.sampled_from(("", price("2"), price("y"), price("") + price("5"))),
)
@settings(max_examples=100, deadline=None)
def test_price_is_that_of_the_answer(levels: list[str], own: str) -> None:
    """The price of an ad is the one that its merged document carries."""
    documents = [wrapper(f"w{n}", f"u:{n}", body=each) for n, each in enumerate(levels)]
    script = Script(documents[0] if documents else inline("a", body=own))
    for at, each in enumerate([*documents[1:], inline("a", body=own)] if documents else []):
        script.feed(f"u:{at}", each)
    result = script.unwrapper.result()
    before = facts_of(result.ads[0]).pricing
    merge(result)

    assert before == facts_of(result.ads[0]).pricing


# --- What ad servers may send -------------------------------------------------------------------


def test_namespaces() -> None:
    """Elements are found in any namespace."""
    body = f"<AdSystem>S</AdSystem><Advertiser>Acme</Advertiser>{price('2')}"
    document = f'<VAST xmlns:v="{IAB}" version="4.2">{inline("a", body=body)}</VAST>'
    found = facts_of(ad_behind(re.sub(r"<(/?)(?=\w)", r"<\1v:", document)))

    assert ("S/a", "acme") == (found.ad, found.advertiser)
    assert Pricing("cpm", "USD", Decimal(2)) == found.pricing


def test_wrapper_of_a_passed_document() -> None:
    """In a document that is passed through, the ad may be a wrapper, and has facts too."""
    ad = parse(f"<VAST>{wrapper('w', 'u:1', body=price('2'))}</VAST>".encode()).ads[0]

    assert AdFacts(ad="/w", pricing=Pricing("cpm", "USD", Decimal(2))) == facts_of(
        ResolvedAd(ad, (), None)
    )


def test_facts_are_short() -> None:
    """No fact is longer than a key may be; two long ones that begin alike stay two."""
    long = "x" * 10_000
    body = f"<AdSystem>{long}</AdSystem><Advertiser>{long}</Advertiser>{price('1', long, long)}"
    found = facts(
        body + campaign(f"<Campaign>{long}</Campaign>"), creatives=creative("", f'id="{long}"')
    )
    names = (found.ad, found.advertiser, found.creative, found.campaign)
    assert found.pricing is not None

    assert {MAX_LENGTH} == {
        len(each) for each in (*names, found.pricing.model, found.pricing.currency)
    }
    assert found.ad != facts(body, ad="b").ad
    assert found.ad == facts(body).ad


def test_fact_of_the_greatest_length() -> None:
    """Up to the bound a fact is whole."""
    assert "x" * MAX_LENGTH == facts(f"<Advertiser>{'x' * MAX_LENGTH}</Advertiser>").advertiser


def test_few_elements_are_looked_through() -> None:
    """A campaign behind so many elements is not found: they are no place for a flood."""
    few, many = ("<x/>" * (MAX_EXTENSION_ELEMENTS - n) for n in (4, 3))

    assert "7" == facts(campaign(few + "<Campaign>7</Campaign>")).campaign
    assert not facts(campaign(many + "<Campaign>7</Campaign>")).campaign


def test_large_documents() -> None:
    """A hundred ads behind a wrapper with ten thousands of elements are read in short time."""
    flood = "<Impression/>" * 20_000 + campaign("<x/>" * 20_000)
    script = Script(wrapper("w", "u:1", multiple="true", body=flood))
    script.feed("u:1", *(inline(f"a{n}", seq=n + 1) for n in range(100)))
    ads = script.unwrapper.result().ads
    began = time.process_time()

    assert 100 == len({facts_of(each).ad for each in ads})
    assert 1.0 > time.process_time() - began


@given(mutated())
@settings(max_examples=300, deadline=None)
def test_any_ad_has_facts(data: bytes) -> None:
    """Whatever can be parsed gives facts, within their bounds."""
    try:
        document = parse(data)
    except VastError:
        return
    for ad in document.ads:
        found = facts_of(ResolvedAd(ad, (ad,), None))
        texts = (found.ad, found.advertiser, found.creative, found.campaign)

        assert all(len(each) <= MAX_LENGTH and each == each.strip() for each in texts)
