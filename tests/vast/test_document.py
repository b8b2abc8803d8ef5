"""The typed face of a document: what is read from elements and attributes."""

import pytest
from lxml import etree

from vastproxy.vast.document import Ad, boolean, child, children, local_name, namespace_of, text_of
from vastproxy.vast.parse import parse

SPACED = b'<v:VAST xmlns:v="http://www.iab.com/VAST" version="4.1"><v:Ad/><!-- --><v:Ad/></v:VAST>'


def an_ad(inside: str, *, attributes: str = "", version: str = "4.2") -> Ad:
    """Build an Ad that holds *inside*."""
    text = f'<VAST version="{version}"><Ad {attributes}>{inside}</Ad></VAST>'
    return parse(text.encode()).ads[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((True, each) for each in ("true", "1", "TRUE", "True", " true\n")),
        *((False, each) for each in ("false", "0", "FALSE", "False")),
        *((None, each) for each in (None, "", "yes", "2", "truee")),
    ],
)
def test_boolean(value: bool | None, text: str | None) -> None:  # noqa: FBT001 - a column
    """Booleans are read in any case; what is none is nothing."""
    assert value is boolean(text)


@pytest.mark.parametrize(
    ("sequence", "text"),
    [
        *((1, each) for each in ("1", " 1 ", "01", "\n1")),
        (12, "12"),
        *((None, each) for each in ("", "0", "-1", "+1", "1.0", "a", "²", "٣", "9" * 10)),
    ],
)
def test_sequence(sequence: int | None, text: str) -> None:
    """A place in a pod is a number from 1; anything else makes a stand-alone ad."""
    assert sequence == an_ad("", attributes=f'sequence="{text}"').sequence


def test_no_sequence() -> None:
    """An ad without the attribute is a stand-alone ad."""
    assert an_ad("").sequence is None


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ((2, 0), "2.0"),
        ((2, 0), "2.0.1"),
        ((4, 2), " 4.2 "),
        ((3, 0), "3"),
        ((3, 0), ""),
        ((3, 0), "latest"),
        ((4, 10), "4.10"),
        ((999, 0), "9" * 2000),
    ],
)
def test_version(version: tuple[int, int], text: str) -> None:
    """A version is two numbers; without a readable one it is 3.0."""
    assert version == parse(f'<VAST version="{text}"/>'.encode()).version


def test_no_version() -> None:
    """A root without the attribute is taken for VAST 3.0."""
    assert (3, 0) == parse(b"<VAST/>").version


def test_namespaces() -> None:
    """Elements are found by local name, whatever their namespace."""
    document = parse(SPACED)

    assert 2 == len(document.ads)
    assert (4, 1) == document.version
    assert "VAST" == local_name(document.root)
    assert "http://www.iab.com/VAST" == namespace_of(document.root)
    assert "" == namespace_of(parse(b"<VAST/>").root)
    assert "" == local_name(document.root[1])


def test_children() -> None:
    """Children are given in document order, the first of them alone too."""
    root = parse(b"<VAST><Error>1</Error><a><Error>x</Error></a><Error>2</Error></VAST>").root
    first = child(root, "Error")

    assert ["1", "2"] == [each.text for each in children(root, "Error")]
    assert first is not None
    assert "1" == first.text
    assert child(root, "Ad") is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("", ""),
        ("a b", "\n a b\t"),
        ("a&b", "<![CDATA[a&b]]>"),
        ("a&b", "\n <![CDATA[ a&b ]]>\n"),
        ("ab", "a<!-- c -->b"),
        ("ab", "<!-- c --><![CDATA[a]]><?i?>b"),
    ],
)
def test_text(text: str, inside: str) -> None:
    """A text is given without blanks around it; a comment inside does not cut it."""
    assert text == text_of(etree.fromstring(f"<a>{inside}</a>"))


@pytest.mark.parametrize(
    ("uri", "inside"),
    [
        ("u", "<VASTAdTagURI> u </VASTAdTagURI>"),
        ("u", "<VASTAdTagURL><URL>u</URL></VASTAdTagURL>"),
        ("u", "<VASTAdTagURL>u</VASTAdTagURL>"),
        ("u", "<VASTAdTagURI>u</VASTAdTagURI><VASTAdTagURL>v</VASTAdTagURL>"),
        ("", "<VASTAdTagURI/>"),
        ("", ""),
    ],
)
def test_tag_uri(uri: str, inside: str) -> None:
    """A wrapper's address is read in both spellings; that of the drafts of 2.0 comes second."""
    assert uri == an_ad(f"<Wrapper>{inside}</Wrapper>").tag_uri


def test_kinds() -> None:
    """An ad is an InLine, a Wrapper, or neither; one that is both is an InLine."""
    kinds = [
        (ad.is_inline, ad.is_wrapper)
        for ad in (an_ad("<InLine/>"), an_ad("<Wrapper/>"), an_ad(""), an_ad("<Wrapper/><InLine/>"))
    ]

    assert [(True, False), (False, True), (False, False), (True, False)] == kinds


def test_facts_of_an_ad() -> None:
    """An ad tells its id, its system and its error URIs."""
    body = "<AdSystem> S </AdSystem><Error>a</Error><Error> </Error><Error>b</Error>"
    ad = an_ad(f"<InLine>{body}</InLine>", attributes='id="x"')

    assert ("x", "S", ["a", "b"]) == (ad.id, ad.system, ad.errors)
    assert ("", "", []) == (an_ad("").id, an_ad("").system, an_ad("").errors)


@pytest.mark.parametrize(
    ("allowed", "version", "attribute"),
    [
        (True, "2.0", ""),
        (False, "3.0", ""),
        (False, "4.3", ""),
        (True, "4.3", 'allowMultipleAds="1"'),
        (False, "2.0", 'allowMultipleAds="false"'),
        (False, "3.0", 'allowMultipleAds="maybe"'),
    ],
)
def test_allows_multiple(allowed: bool, version: str, attribute: str) -> None:  # noqa: FBT001
    """Several ads are forbidden since VAST 3.0 unless the wrapper allows them."""
    assert allowed == an_ad(f"<Wrapper {attribute}/>", version=version).allows_multiple


def test_wrapper_attributes() -> None:
    """Wrappers are followed unless it is forbidden; about fallbacks nothing may be said."""
    unsaid = an_ad("<Wrapper/>")
    said = an_ad('<Wrapper followAdditionalWrappers="0" fallbackOnNoAd="True"/>')

    assert (True, None) == (unsaid.follows_wrappers, unsaid.fallback_on_no_ad)
    assert (False, True) == (said.follows_wrappers, said.fallback_on_no_ad)


def test_root_errors() -> None:
    """The root's errors are its own: those of ads are not among them."""
    document = parse(
        b"<VAST><Error>a</Error><Error/><Ad><InLine><Error>b</Error></InLine></Ad></VAST>"
    )

    assert ["a"] == document.errors
    assert 2 == len(document.error_elements)


def test_repr() -> None:
    """A document tells its version and its ads."""
    document = parse(b'<VAST version="3.0"><Ad id="x"><InLine/></Ad><Ad/></VAST>')

    assert "<VastDocument 3.0, ads: [<Ad x InLine>, <Ad - empty>]>" == repr(document)
