"""The proxy's own impressions: put into a tree, and into bytes that are passed through."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from tests.support.script import Script, inline, response, wrapper
from tests.support.vast_facts import IAB
from tests.support.vast_strategies import mutated
from vastproxy.errors import VastError
from vastproxy.vast import beacons, merge
from vastproxy.vast.beacons import Marked, add_impression, with_impressions
from vastproxy.vast.document import child, children, text_of
from vastproxy.vast.parse import hardened_parser, is_plain, parse
from vastproxy.vast.serialise import assemble, to_bytes
from vastproxy.vast.unwrap import ResolvedAd

URL = "https://proxy.example/beacon/a?b=1&c=[CACHEBUSTING]"
OURS = f'<Impression id="vastproxy"><![CDATA[{URL}]]></Impression>'


def added(body: str, url: str = URL) -> str:
    """Write an InLine of *body* after an Impression of *url* was added."""
    ad = parse(f"<VAST><Ad><InLine>{body}</InLine></Ad></VAST>".encode()).ads[0]
    add_impression(ResolvedAd(ad, (), None), url)
    written = etree.tostring(ad.body, encoding="unicode")
    return written.removeprefix("<InLine>").removesuffix("</InLine>")


def marked(document: str, *urls: str | None) -> str:
    """Write *document* after *urls* were put in, all of which have found a place."""
    done = with_impressions(document.encode(), urls)
    assert () == done.left_out
    return done.body.decode()


# --- Into a tree --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "before"),
    [
        ("<Impression>i</Impression>{}<Creatives/>", "<Impression>i</Impression><Creatives/>"),
        ("<Impression/><Error/><Impression/>{}", "<Impression/><Error/><Impression/>"),
        (
            "<AdSystem/><Error/>{}<Pricing/><Creatives/>",
            "<AdSystem/><Error/><Pricing/><Creatives/>",
        ),
        ("<!-- c -->{}<Creatives/><Extensions/>", "<!-- c --><Creatives/><Extensions/>"),
        ("<AdTitle/>{}", "<AdTitle/>"),
        ("{}", ""),
    ],
)
def test_place_in_a_tree(after: str, before: str) -> None:
    """It stands behind the last Impression, else where the merge would put one."""
    assert after.format(OURS) == added(before)


def test_place_is_that_of_the_merge() -> None:
    """What stands behind an Impression here is what stands behind one in the merge."""
    order = merge._INLINE_ORDER

    assert frozenset(order[order.index("Impression") + 1 :]) == beacons._BEHIND


def test_url_is_kept_as_it_is() -> None:
    """A URL is written in CDATA, whatever characters it has."""
    url = "https://e.example/?a=<&>'\"é]]>&amp;"
    ad = parse(f"<VAST><Ad><InLine>{added('', url)}</InLine></Ad></VAST>".encode()).ads[0]
    found = child(ad.body, "Impression")
    assert found is not None

    assert url == text_of(found)
    assert "<![CDATA[https" in added("", url)


def test_namespace_of_the_inline() -> None:
    """It is of the InLine's namespace, and so of the whole answer's."""
    document = parse(f'<VAST xmlns="{IAB}" version="4.2">{inline("a")}</VAST>'.encode())
    result = Script(document).unwrapper.result()
    add_impression(result.ads[0], URL)

    assert f"</Error>{OURS}<Creatives>" in to_bytes(assemble(result)).decode()


def test_behind_what_was_merged() -> None:
    """Added after the merge, it stands behind the Impressions of all levels."""
    script = Script(wrapper("w", "u:1", body="<Impression>outer</Impression>"))
    script.feed("u:1", inline("a", body="<Impression>own</Impression>"))
    result = script.unwrapper.result()
    merge.merge(result)
    add_impression(result.ads[0], URL, "us")
    impressions = list(children(result.ads[0].inline.body, "Impression"))

    assert ["outer", "own", URL] == [text_of(each) for each in impressions]
    assert "us" == impressions[-1].get("id")


# --- Into bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "before"),
    [
        ("<InLine><Creatives/>{}</InLine>", "<InLine><Creatives/></InLine>"),
        ("<InLine>{}</InLine>", "<InLine></InLine>"),
        ("<InLine> text {}</InLine >", "<InLine> text </InLine >"),
        ("<Wrapper><x/>{}</Wrapper>", "<Wrapper><x/></Wrapper>"),
        ("<InLine>{}</InLine>", "<InLine/>"),
        ("<InLine a='/>' >{}</InLine>", "<InLine a='/>' />"),
        ("<InLine><Impression/>{}<b/></InLine>", "<InLine><Impression/><b/></InLine>"),
        (
            "<InLine><Impression>i</Impression\n>{}<b/></InLine>",
            "<InLine><Impression>i</Impression\n><b/></InLine>",
        ),
        (
            "<InLine><Impression/><b/><Impression><![CDATA[</InLine>]]></Impression>{}</InLine>",
            "<InLine><Impression/><b/><Impression><![CDATA[</InLine>]]></Impression></InLine>",
        ),
        (
            "<InLine><Extensions><Impression/></Extensions>{}</InLine>",
            "<InLine><Extensions><Impression/></Extensions></InLine>",
        ),
        ("<InLine><!-- </InLine> -->{}</InLine>", "<InLine><!-- </InLine> --></InLine>"),
        (
            "<Other><Impression/></Other><InLine>{}</InLine>",
            "<Other><Impression/></Other><InLine/>",
        ),
        ("<Wrapper/><InLine>{}</InLine>", "<Wrapper/><InLine/>"),
        ("<InLine>{}</InLine><InLine/><Wrapper/>", "<InLine/><InLine/><Wrapper/>"),
    ],
)
def test_place_in_bytes(after: str, before: str) -> None:
    """It stands behind the last Impression of the InLine, else it is the last child."""
    form = "<VAST version='3.0' >\r\n<Ad id = 'a'>{}</Ad>\n</VAST>\n<!-- end -->"

    assert form.format(after.format(OURS)) == marked(form.format(before), URL)


def test_prefix_is_that_of_the_element() -> None:
    """Where the InLine has a prefix, so has its Impression."""
    document = f'<v:VAST xmlns:v="{IAB}"><v:Ad><v:InLine{{}}</v:Ad></v:VAST>'
    ours = OURS.replace("Impression", "v:Impression")

    assert document.format(f">{ours}</v:InLine>") == marked(document.format("/>"), URL)
    assert document.format(f"><v:Impression/>{ours}</v:InLine>") == marked(
        document.format("><v:Impression/></v:InLine>"), URL
    )


def test_prefix_that_is_called_like_the_element() -> None:
    """An end tag that only begins like the element's is not its own."""
    form = '<VAST xmlns:InLine="u"><InLine:Ad><InLine{}</InLine:Ad></VAST>'

    assert form.format(f">{OURS}</InLine>") == marked(form.format("/>"), URL)


def test_each_ad_has_its_own() -> None:
    """The i-th URL is the i-th ad's; an ad without one, and those behind, stay as they are."""
    form = (
        "<VAST><Ad><InLine>{}</InLine></Ad><Ad><Wrapper/></Ad><Ad><InLine>{}</InLine></Ad>{}</VAST>"
    )
    rest = "<Ad><InLine/></Ad>"
    one, three = (OURS.replace("/a", f"/{n}") for n in (1, 3))
    urls = URL.replace("/a", "/1"), None, URL.replace("/a", "/3")

    assert form.format(one, three, rest) == marked(form.format("", "", rest), *urls)
    assert form.format("", "", rest) == marked(form.format("", "", rest))


def test_what_finds_no_place_is_told() -> None:
    """A URL of an ad that is neither InLine nor Wrapper, or is not there, is left out and told."""
    body = b"<VAST><Ad/><Ad><InLine/></Ad><Creative><Ad><InLine/></Ad></Creative></VAST>"
    done = with_impressions(body, ("u:0", "u:1", None, "u:3"))

    assert (0, 3) == done.left_out
    assert 1 == done.body.count(b"u:")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"<VAST><Ad><InLine/></Ad>", b"<VAST><Ad><InLine/></Ad></VAST>x", b"\xff"),
        b"<VAST><Ad><InLine/></Ad><a>&nbsp;</a></VAST>",
        b"<!DOCTYPE VAST [<!ENTITY a '<InLine/>'>]><VAST><Ad>&a;</Ad></VAST>",
        "<VAST><Ad><InLine>é</InLine></Ad></VAST>".encode("latin-1"),
    ],
)
def test_what_cannot_be_read(body: bytes) -> None:
    """A body that cannot be read stays as it is, and every URL is told to be left out."""
    assert Marked(body, (0, 2)) == with_impressions(body, ("u:0", None, "u:2"))


def test_bytes_before_the_document() -> None:
    """A mark and a declaration, a wrong one too, stay where they are."""
    head = "\ufeff<?xml version='1.0' encoding='utf-16'?>\n<!-- é -->"
    form = head + "<VAST><Ad><InLine>é{}</InLine></Ad></VAST>"

    assert form.format(OURS) == marked(form.format(""), URL)


def test_order_of_a_valid_document_is_kept() -> None:
    """Impressions stay together, as the schemas want them, in a tree and in bytes alike."""
    document = response(inline("a", body="<Impression>own</Impression>"))
    body = to_bytes(document)
    result = Script(document).unwrapper.result()
    add_impression(result.ads[0], URL)

    assert to_bytes(assemble(result)) == with_impressions(body, [URL]).body


def test_many_ads() -> None:
    """Thousands of ads take time in proportion to their number."""
    body = f"<VAST>{'<Ad><InLine><Impression/></InLine></Ad>' * 10_000}</VAST>".encode()
    began = time.process_time()
    done = with_impressions(body, [URL] * 10_000)

    assert 10_000 == done.body.count(URL.encode())
    assert 2.0 > time.process_time() - began


@given(mutated(), st.lists(st.sampled_from(("u:1", "u:]]>&<", None)), max_size=4))
@settings(max_examples=400, deadline=None)
def test_nothing_else_is_touched(data: bytes, urls: list[str | None]) -> None:
    """Whatever can be read has one Impression more for each URL, and is otherwise the same."""
    try:
        document = parse(data)
    except VastError:
        return
    body = data if _is_well_formed(data) else to_bytes(document)
    done = with_impressions(body, urls)
    put_in = {at: url for at, url in enumerate(urls) if url and at not in done.left_out}
    ads = parse(done.body).ads

    assert all(at >= len(ads) or ads[at].body is ads[at].element for at in done.left_out)
    for at, ad in enumerate(ads):
        ours = [each for each in children(ad.body, "Impression") if each.get("id") == "vastproxy"]
        assert ([put_in[at]] if at in put_in else []) == [text_of(each) for each in ours]
        for each in ours:
            _remove(each)
    assert etree.tostring(document.root, method="c14n2") == etree.tostring(
        ads[0].document.root if ads else parse(done.body).root, method="c14n2"
    )


def _is_well_formed(data: bytes) -> bool:
    """Whether *data* is a document as it is; the proxy's own parser forgives a declaration."""
    try:
        etree.fromstring(data, hardened_parser())
    except etree.XMLSyntaxError:
        return False
    return is_plain(data)


def _remove(element: etree._Element) -> None:
    """Take *element* out, and leave the text behind it where it is."""
    parent, before = element.getparent(), element.getprevious()
    assert parent is not None
    if before is not None:
        before.tail = (before.tail or "") + (element.tail or "") or None
    else:
        parent.text = (parent.text or "") + (element.tail or "") or None
    element.tail = None
    parent.remove(element)
