"""Writing answers: what stays as it was read, and what is put together."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from tests.support.script import ENTRY, chained, inline, unwrapped, wrapper, written
from tests.support.trees import grow
from tests.support.vast_facts import IAB
from vastproxy.vast.macros import Macros, spelling
from vastproxy.vast.parse import parse
from vastproxy.vast.serialise import DECLARATION, empty, fill_media, fill_spans, to_bytes

MACROS = Macros({"CACHEBUSTING": "12345678", "TIMESTAMP": "a b", "DEVICEIP": "::1"})
HOW = spelling()

RICH = f"""<!-- before --><?keep it?>
<VAST xmlns="{IAB}" xmlns:v="urn:v" version="4.2" v:odd="1" Unknown="2">
  <Ad id="a" sequence="1" odd="x &amp; &quot;y&quot;">
    <InLine><!-- inside --><AdSystem>  S&#233; </AdSystem>
      <Error><![CDATA[https://e.example/?a=1&b=[ERRORCODE]]]></Error>
      <Impression>https://i.example/?a=1&amp;b=2</Impression>
      <v:Foreign v:a="b"><Inner xmlns="">t</Inner></v:Foreign>
      <Creatives><Creative><Linear><AdParameters><![CDATA[ {{"a": "<b>"}} ]]></AdParameters>
      </Linear></Creative></Creatives>
      <Extensions><Extension type="x">
        <v:Data><![CDATA[a]]]]><![CDATA[>b]]></v:Data>
      </Extension></Extensions>
    </InLine>
  </Ad>
</VAST>
<!-- after -->"""


def resolved(text: str) -> bytes:
    """Resolve a document that needs no hop."""
    return written(unwrapped(text.encode(), ENTRY, lambda _: None))


def pages_of(*ads: str, version: str = "3.0", root: str = "") -> bytes:
    """Write a document of *ads*."""
    return f'<VAST version="{version}"{root}>{"".join(ads)}</VAST>'.encode()


# --- Identity -----------------------------------------------------------------------------------


def test_identity() -> None:
    """An InLine that was answered at once comes out as it came in."""
    answer = resolved(RICH)

    assert etree.canonicalize(RICH, with_comments=True) == etree.canonicalize(
        answer.decode(), with_comments=True
    )
    assert answer.startswith(DECLARATION)


def test_identity_of_letters() -> None:
    """CDATA sections, comments, instructions and blanks stay where they were."""
    answer = resolved(RICH).decode()

    assert "<![CDATA[https://e.example/?a=1&b=[ERRORCODE]]]>" in answer
    assert '<![CDATA[ {"a": "<b>"} ]]>' in answer
    assert "<![CDATA[a]]]]><![CDATA[>b]]>" in answer
    assert "https://i.example/?a=1&amp;b=2" in answer
    assert "<!-- before --><?keep it?>" in answer.replace("\n", "")
    assert answer.rstrip().endswith("<!-- after -->")


def test_writing_twice() -> None:
    """What was written is read and written again as the same bytes."""
    once = resolved(RICH)

    assert once == to_bytes(parse(once))


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_identity_of_any_document(seed: int) -> None:
    """Any document that is read is written with the same meaning, CDATA sections included."""
    for page in grow(seed, "http://x").pages.values():
        if page.body.rstrip().endswith(b"VAST>"):
            document = parse(page.body)
            body = page.body.removeprefix(b"\xef\xbb\xbf").strip()

            assert etree.canonicalize(body.decode()) == etree.canonicalize(
                to_bytes(document).decode()
            )
            assert page.body.count(b"<![CDATA[") == to_bytes(document).count(b"<![CDATA[")


@pytest.mark.parametrize("encoding", ["utf-16", "iso-8859-1", "utf-8"])
def test_encoding(encoding: str) -> None:
    """The answer is UTF-8 without a mark, and says so, whatever came in."""
    text = f'<?xml version="1.0" encoding="{encoding}"?><VAST>é</VAST>'

    assert DECLARATION + "<VAST>é</VAST>".encode() == to_bytes(parse(text.encode(encoding)))


def test_root_errors_at_depth_none() -> None:
    """The root's errors of an entry document that is answered as it is stay at the root."""
    answer = resolved(f"<VAST><Error>e</Error>{inline('a')}</VAST>")

    assert ["e"] == [each.text for each in etree.fromstring(answer).iterfind("Error")]


# --- Putting together ---------------------------------------------------------------------------


def test_wrapper_answer() -> None:
    """The answer's root is the InLine's: version, attributes, what stands beside the ads."""
    inner = (
        '<VAST version="2.0" x="y"><!-- c --><Ad id="a"><InLine><Creatives/></InLine></Ad></VAST>'
    )
    answer = chained(pages_of(wrapper("w", "u:1"), version="4.2"), inner)

    assert DECLARATION + inner.replace("<InLine>", "<InLine><Error>e:w</Error>").encode() == answer


def test_other_ads_are_left_out() -> None:
    """Ads that were not chosen are not in the answer; comments between them stay."""
    answer = resolved(f"<VAST><!-- 1 -->{inline('a')}<!-- 2 -->{inline('b')}<!-- 3 --></VAST>")
    root = etree.fromstring(answer)

    assert ["a"] == [each.get("id") for each in root.iter("Ad")]
    assert [" 1 ", " 2 ", " 3 "] == [each.text for each in root.iter(etree.Comment)]


def test_order_and_numbers() -> None:
    """Ads stand in playing order, with the numbers they have now."""
    answer = resolved(f"<VAST>{inline('b', seq=7)}{inline('s')}{inline('a', seq=' 3 ')}</VAST>")
    ads = list(etree.fromstring(answer).iter("Ad"))

    assert [("a", " 3 "), ("b", "7")] == [(each.get("id"), each.get("sequence")) for each in ads]


def test_number_of_a_stand_alone_ad() -> None:
    """A sequence that is no number makes a stand-alone ad, and is not answered."""
    answer = resolved(f"<VAST>{inline('a', seq='first')}</VAST>")

    assert [None] == [each.get("sequence") for each in etree.fromstring(answer).iter("Ad")]


def test_mixed_pod() -> None:
    """A pod of several documents has the newest one's root, and its namespace."""
    documents = {
        "u:1": pages_of(inline("a", body="<Impression>1</Impression>"), version="2.0"),
        "u:2": pages_of(
            inline("b", body='<v:X xmlns:v="urn:v"/>'), version="4.2", root=f' xmlns="{IAB}"'
        ),
        "u:3": pages_of(inline("c"), version="4.1", root=f' xmlns="{IAB}"'),
    }
    ads = [wrapper(f"w{n}", f"u:{n}", seq=n) for n in (1, 2, 3)]
    entry = pages_of(*ads, inline("d", seq=4))
    result = unwrapped(entry, ENTRY, lambda url: (documents[url], url))
    root = etree.fromstring(written(result))
    spaces = {etree.QName(each).namespace for each in root.iter(etree.Element)}

    assert "4.2" == root.get("version")
    assert {IAB, "urn:v"} == spaces
    assert [(n, i) for n, i in zip("1234", "abcd", strict=True)] == [
        (each.get("sequence"), each.get("id")) for each in root
    ]


def test_prefix_declared_at_another_root() -> None:
    """An ad that moves into another document takes the prefixes it needs with it."""
    documents = {
        "u:1": pages_of(inline("a", body="<v:X/>"), root=' xmlns:v="urn:one"'),
        "u:2": pages_of(inline("b", body="<v:X/>"), version="4.2", root=' xmlns:v="urn:two"'),
    }
    entry = pages_of(*(wrapper(f"w{n}", f"u:{n}", seq=n) for n in (1, 2)))
    answer = written(unwrapped(entry, ENTRY, lambda url: (documents[url], url)))
    found = [str(each.tag) for each in etree.fromstring(answer).iter("{*}X")]

    assert ["{urn:one}X", "{urn:two}X"] == found


# --- Empty --------------------------------------------------------------------------------------


def test_empty() -> None:
    """An answer without ads is a VAST document all the same, of a version that all players take."""
    assert DECLARATION + b'<VAST version="3.0"/>' == empty()
    assert [] == parse(empty("4.2")).ads
    assert (4, 2) == parse(empty("4.2")).version


@given(st.text(alphabet=st.characters(exclude_categories=["C"])), st.text(alphabet="4.<>&\"' a"))
def test_empty_with_errors(uri: str, version: str) -> None:
    """It names whom to tell, to the letter, whatever stands in a URI or in a version."""
    root = parse(empty(version, [uri, "http://e/?a=1&b=]]>"])).root

    assert [uri, "http://e/?a=1&b=]]>"] == [each.text or "" for each in root]
    assert version == root.get("version")


# --- Media files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filled", "inside"),
    [
        ("<![CDATA[http://m/?12345678]]>", "http://m/?[CACHEBUSTING]"),
        ("<![CDATA[http://m/?a=1&b=a%20b]]>", " http://m/?a=1&amp;b=[TIMESTAMP] "),
        ("<![CDATA[http://m/12345678]]>", "<!-- c --><![CDATA[http://m/[CACHEBUSTING]]]>"),
        ("http://m/?[ADPLAYHEAD][X]&amp;", "http://m/?[ADPLAYHEAD][X]&amp;"),
        ("http://m/[PAGEURL]", "http://m/[PAGEURL]"),
        ("http://m/?[DEVICEIP]", "http://m/?[DEVICEIP]"),
        ("<![CDATA[http://m/?12345678&a%20b]]>", "http://m/?%5BCACHEBUSTING%5D&amp;[timestamp]"),
        ("<![CDATA[ http://m/ ]]>", "<![CDATA[ http://m/ ]]>"),
    ],
)
def test_fill_media(filled: str, inside: str) -> None:
    """A media file's URL is filled with what no player fills there, and keeps all the rest."""
    document = parse(f"<VAST><MediaFile a='b'>{inside}</MediaFile></VAST>".encode())
    fill_media(document, MACROS, HOW)

    assert f'<VAST><MediaFile a="b">{filled}</MediaFile></VAST>' == etree.tostring(
        document.root, encoding="unicode"
    )


def test_fill_media_elsewhere() -> None:
    """Macros elsewhere are the player's; namespaces make no difference."""
    text = (
        f'<VAST xmlns="{IAB}"><Tracking>[CACHEBUSTING]</Tracking><MediaFile>{{}}</MediaFile></VAST>'
    )
    document = parse(text.format("[CACHEBUSTING]").encode())
    fill_media(document, MACROS, HOW)

    assert text.format("<![CDATA[12345678]]>") == etree.tostring(document.root, encoding="unicode")


@pytest.mark.parametrize(
    ("filled", "body"),
    [
        ("<MediaFile>12345678</MediaFile>", "<MediaFile>[CACHEBUSTING]</MediaFile>"),
        (
            "<v:MediaFile a='b'\n>1a%20b</v:MediaFile >",
            "<v:MediaFile a='b'\n>1[TIMESTAMP]</v:MediaFile >",
        ),
        ("<MediaFile>1a%20b2a%20b</MediaFile>", "<MediaFile>1[TIMESTAMP]2[TIMESTAMP]</MediaFile>"),
        ("<MediaFile a='b>c'>a%20b</MediaFile>", "<MediaFile a='b>c'>[TIMESTAMP]</MediaFile>"),
        (
            "<MediaFile><![CDATA[a%20b&é]]></MediaFile>",
            "<MediaFile><![CDATA[[TIMESTAMP]&é]]></MediaFile>",
        ),
        ("<VASTAdTagURI>%3A%3A1</VASTAdTagURI>", "<VASTAdTagURI>[DEVICEIP]</VASTAdTagURI>"),
        ("<VASTAdTagURI>a%20b</VASTAdTagURI>", "<VASTAdTagURI>[TIMESTAMP]</VASTAdTagURI>"),
        *(
            (same, same)
            for same in (
                "<MediaFile>[DEVICEIP]</MediaFile>",
                "<MediaFile>[X]&amp;</MediaFile>",
                "<MediaFiles>[TIMESTAMP]</MediaFiles>",
                "<Tracking>[TIMESTAMP]</Tracking>",
                "<MediaFile/><Error>[TIMESTAMP]</Error>",
                "<MediaFile /><Error>[TIMESTAMP]</Error>",
                "<MediaFile a='b'/><Error>[TIMESTAMP]</Error>",
                "<H><![CDATA[<MediaFile>[TIMESTAMP]</MediaFile>]]></H>",
                "<!-- <MediaFile>[TIMESTAMP]</MediaFile> -->",
            )
        ),
    ],
)
def test_fill_spans(filled: str, body: str) -> None:
    """In a body that is passed on, media files and next addresses are filled, and nothing else."""
    around = "<VAST\tversion = '4.2'>\r\n{}<Error>[TIMESTAMP]</Error><!-- [TIMESTAMP] --></VAST>\n"

    assert around.format(filled).encode() == fill_spans(around.format(body).encode(), MACROS, HOW)


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_fill_spans_changes_only_spans(seed: int) -> None:
    """With nothing to fill in, any body is passed on to the byte."""
    for page in grow(seed, "http://x").pages.values():
        if page.body.rstrip().endswith(b"VAST>"):
            assert page.body == fill_spans(page.body, Macros({}), HOW)


@pytest.mark.parametrize(
    "unit", [b"<MediaFile>", b"<MediaFile />", b"<MediaFile ", b"<", b"<a:", b"<MediaFile></", b"x"]
)
def test_time_is_linear(unit: bytes) -> None:
    """256 KiB of anything are looked through in well under a second of work."""
    body = b"<VAST>" + unit * (256 * 1024 // len(unit)) + b"</VAST>"
    began = time.process_time()
    fill_spans(body, MACROS, HOW)

    assert 1.0 > time.process_time() - began
