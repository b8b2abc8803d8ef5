"""Reading documents: what is taken, what is mended, what is refused, and how long it takes."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from tests.support.trees import grow
from tests.support.vast_strategies import DOCUMENTS, HOSTILE, mutated
from vastproxy.errors import VastError, VastSchemaError, VastSyntaxError, VastVersionError
from vastproxy.vast.document import VastDocument
from vastproxy.vast.parse import _REPAIRS, MAX_PREFIXES, MAX_TAGS, hardened_parser, is_plain, parse

MB = 1 << 20
LAUGHS = "".join(f'<!ENTITY {chr(98 + i)} "{("&" + chr(97 + i) + ";") * 10}">' for i in range(9))


def _entity(declaration: str, root: str = "<VAST>&a;</VAST>") -> bytes:
    return f"<!DOCTYPE l [{declaration}]>{root}".encode()


REFUSED = {
    "billion laughs": _entity('<!ENTITY a "aa">' + LAUGHS, "<VAST>&j;</VAST>"),
    "laughs in an attribute": _entity('<!ENTITY a "aa">' + LAUGHS, '<VAST x="&j;"/>'),
    "quadratic blow-up": _entity(f'<!ENTITY a "{"a" * 10**5}">', f"<VAST>{'&a;' * 20000}</VAST>"),
    "blow-up in an attribute": _entity(f'<!ENTITY a "{"a" * 10**5}">', '<VAST x="&a;&a;"/>'),
    "file entity": _entity('<!ENTITY a SYSTEM "file:///etc/hostname">'),
    "network entity": _entity('<!ENTITY a SYSTEM "http://127.0.0.1:9/x">'),
    "external type": b'<!DOCTYPE VAST SYSTEM "file:///etc/hostname"><VAST/>',
    "parameter entity": _entity('<!ENTITY % p SYSTEM "file:///etc/hostname"> %p;', "<VAST/>"),
    "harmless entity": _entity('<!ENTITY a "hi">'),
    "UTF-16 with a type": _entity('<!ENTITY a "hi">').decode().encode("utf-16"),
    "type after a comment": b"<?xml version='1.0'?><!-- <!DOCTYPE --> <?a b?>\n<!DOCTYPE a><VAST/>",
    "type in lower case": b"<!doctype html><html/>",
    "UTF-7 with a type": b"+ADwAIQ-DOCTYPE a",
    "HTML": b"<!DOCTYPE html><html><body><p>x<br></body></html>",
    "depth 257": b"<VAST>" + b"<a>" * 256 + b"</a>" * 256 + b"</VAST>",
    "depth 3,000": b"<VAST>" + b"<a>" * 2999 + b"</a>" * 2999 + b"</VAST>",
    "depth a million": b"<a>" * 10**6 + b"</a>" * 10**6,
    "50 MB of text": b"<VAST>" + b"x" * (50 * MB) + b"</VAST>",
    "50 MB of elements": b"<VAST>" + b"<a/>" * (50 * MB // 4) + b"</VAST>",
    "11 MB in CDATA": b"<VAST><![CDATA[" + b"x" * (11 * MB) + b"]]></VAST>",
    "11 MB in an attribute": b'<VAST x="' + b"x" * (11 * MB) + b'"/>',
    "a name of 60 kB": b"<" + b"a" * 60000 + b"/>",
    "a reference to NUL": b"<VAST>&#0;</VAST>",
    "a reference to a surrogate": b"<VAST>&#xD800;</VAST>",
    "a reference past Unicode": b"<VAST>&#x110000;</VAST>",
    "UTF-7 declared": b'<?xml version="1.0" encoding="UTF-7"?><VAST>+ADw-</VAST>',
    "EBCDIC declared": b'<?xml version="1.0" encoding="cp037"?><VAST/>',
    "an unknown encoding": b'<?xml version="1.0" encoding="x-foo"?><VAST/>',
    "a Python codec": b'<?xml version="1.0" encoding="rot13"?><VAST/>',
    "UTF-32": "<VAST/>".encode("utf-32"),
    "UTF-32, big end first": b"\0\0\xfe\xff" + "<VAST/>".encode("utf-32-be"),
    "half a UTF-16": "<VAST/>".encode("utf-16")[:-1],
    "wrong bytes for Shift_JIS": b'<?xml version="1.0" encoding="shift_jis"?><VAST>\x81</VAST>',
    "text after a root without content": b"<VAST/>text",
    "two roots": b"<VAST/><VAST/>",
    "empty": b"",
    "blanks": b"   ",
    "a mark alone": b"\xef\xbb\xbf",
    "JSON": b'{"a":1}',
    "cut short": b"<VAST><Ad>",
    "CDATA cut short": b"<VAST><Ad><![CDATA[x</Ad></VAST>",
    "a comment before the root cut short": b"<!-- <VAST/>",
    "an instruction cut short": b"<?xml <VAST/>",
    "an end tag too few": b"<VAST><Ad></VAST>",
    "an attribute twice": b"<VAST a='1' a='2'/>",
}
"""Inputs that are no XML that may be read: code 100."""

ACCEPTED = {
    "depth 255": b"<VAST>" + b"<a>" * 254 + b"</a>" * 254 + b"</VAST>",
    "9 MB of text": b"<VAST>" + b"x" * (9 * MB) + b"</VAST>",
    "100,000 attributes": b"<VAST " + b" ".join(b'a%d="1"' % i for i in range(10**5)) + b"/>",
    "as many namespaces": b"<VAST " + b" ".join(b'xmlns:a%d="u"' % i for i in range(10**5)) + b"/>",
    "a type inside CDATA": b"<VAST><![CDATA[<!DOCTYPE html>]]></VAST>",
    "an inclusion": b'<VAST xmlns:xi="http://www.w3.org/2001/XInclude">'
    b'<xi:include href="file:///etc/hostname" parse="text"/></VAST>',
    "a stylesheet": b'<?xml-stylesheet href="file:///etc/hostname"?><VAST/>',
    "a prefix": b'<v:VAST xmlns:v="http://www.iab.com/VAST"><v:Ad/></v:VAST>',
    "a neighbour of the namespace": b'<VAST xmlns="http://www.iab.net/VAST"><Ad/></VAST>',
    "the most tags": b"<VAST>" + b"<a/>" * (MAX_TAGS - 2) + b"</VAST>",
}
"""Inputs that are read as they are, without a repair."""


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What is no XML, or XML that may do harm, has code 100."""
    with pytest.raises(VastSyntaxError) as caught:
        parse(REFUSED[name])

    assert 100 == caught.value.vast_code


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    """What is well-formed and within limits is a document, and needed no repair."""
    document = parse(ACCEPTED[name])

    assert "VAST" == etree.QName(document.root).localname
    assert () == document.repairs


@pytest.mark.parametrize(
    ("error", "code", "data"),
    [
        (VastSchemaError, 101, b"<html/>"),
        (VastSchemaError, 101, b"<vast/>"),
        (VastSchemaError, 101, b"<VMAP><VAST/></VMAP>"),
        (VastSchemaError, 101, b"<rss version='2.0'><channel/></rss>"),
        (VastSchemaError, 101, b"".join(b"<a>" for _ in range(255)) + b"</a>" * 255),
        (VastVersionError, 102, b"<VideoAdServingTemplate/>"),
        (
            VastVersionError,
            102,
            b"<VideoAdServingTemplate version='4.2'><a>&</a></VideoAdServingTemplate>",
        ),
    ],
)
def test_other_roots(error: type[VastError], code: int, data: bytes) -> None:
    """Another root has code 101; that of VAST 1 has 102."""
    with pytest.raises(error) as caught:
        parse(data)

    assert code == caught.value.vast_code


def test_inclusions_are_inert() -> None:
    """An XInclude stays an element: nothing is read from a file."""
    (included,) = parse(ACCEPTED["an inclusion"]).root

    assert "include" == etree.QName(included).localname
    assert not included.text


def test_too_many_tags() -> None:
    """One tag more than the limit is refused before anything is built."""
    with pytest.raises(VastSyntaxError, match=str(MAX_TAGS)):
        parse(b"<VAST>" + b"<a/>" * (MAX_TAGS - 1) + b"</VAST>")


@pytest.mark.parametrize(
    ("repair", "data", "text"),
    [
        ("blanks before the document", b"\n \t<?xml version='1.0'?><VAST>a</VAST>", "a"),
        ("control characters removed", b"<VAST>a\x01\x0b\x00b</VAST>", "ab"),
        ("control characters removed", b"<VAST><![CDATA[a\x08b]]></VAST>", "ab"),
        ("control characters removed", "<VAST>a\ufffe\uffffb</VAST>".encode(), "ab"),
        ("text after the end removed", b"<VAST>a</VAST>and more", "a"),
        ("text after the end removed", b"<VAST>a</VAST ><script>&</script>", "a"),
        ("text after the end removed", b"<VAST>a</VAST><VAST>b</VAST>", "a"),
        ("bare ampersands escaped", b"<VAST>a&b&amp;c&#38;d&lt;</VAST>", "a&b&c&d<"),
        ("bare ampersands escaped", b"<VAST>a&&b&=1&c;&1;</VAST>", "a&&b&=1&c;&1;"),
        ("bare ampersands escaped", b"<VAST>a&nbsp;&eacute;b</VAST>", "a\xa0éb"),
        ("bare ampersands escaped", b"<VAST>&copy=1&region=2&lt</VAST>", "&copy=1&region=2&lt"),
        ("bare ampersands escaped", b"<VAST>&LT;b&GT; &AMP; &QUOT;</VAST>", '<b> & "'),
        ("bare ampersands escaped", b"<VAST>&nvlt;</VAST>", "<\u20d2"),
        ("undeclared prefixes declared", b"<VAST xsi:a='b'>a</VAST>", "a"),
        ("no UTF-8, read as cp1252", b"<VAST>\xe9\x92</VAST>", "é\u2019"),
        ("UTF-16 without a mark", "<VAST>é</VAST>".encode("utf-16-le"), "é"),
        ("UTF-16 without a mark", "<VAST>é</VAST>".encode("utf-16-be"), "é"),
        (
            "declared as utf-16, but is not",
            b'<?xml version="1.0" encoding="UTF-16"?><VAST>x</VAST>',
            "x",
        ),
    ],
)
def test_repairs(repair: str, data: bytes, text: str) -> None:
    """What ad servers get wrong is mended; the document says so, and no text is lost."""
    document = parse(data)

    assert text == document.root.text
    assert repair in document.repairs


def test_entities_stay_text() -> None:
    """HTML's names of markup characters become characters, never markup."""
    document = parse(b'<VAST a="1&QUOT; b=&QUOT;2"><Ad>&LT;Wrapper/&GT;&bad</Ad></VAST>')

    assert {"a": '1" b="2'} == dict(document.root.attrib)
    assert ["<Wrapper/>&bad"] == [each.text for each in document.root]
    assert 0 == len(document.root[0])


def test_mark_after_blanks() -> None:
    """A byte order mark after blanks is passed over too: templates that include others do so."""
    assert "a" == parse(b"\r\n\xef\xbb\xbf<VAST>a</VAST>").root.text
    assert "a" == parse(b"\xef\xbb\xbf\n<?xml version='1.0'?><VAST>a</VAST>").root.text


def test_repairs_spare_other_text() -> None:
    """Only markup is mended: CDATA sections and comments keep their ampersands and end tags."""
    document = parse(b"<VAST>&<![CDATA[&nbsp;</VAST>&amp;]]><!-- </VAST>& --><a b='&c'/></VAST>")
    comment, element = document.root

    assert "&&nbsp;</VAST>&amp;" == document.root.text
    assert " </VAST>& " == comment.text
    assert "&c" == element.get("b")


def test_repairs_spare_inner_documents() -> None:
    """A document that holds another one is not cut at the inner one's end."""
    inner = b"<VAST><Ad><x><VAST><Ad/></VAST></x><y>a&b</y></Ad></VAST>"
    mended = parse(inner)

    assert ["x", "y"] == [str(each.tag) for each in mended.root[0]]


def test_several_repairs() -> None:
    """One document may need them all."""
    document = parse(b"\n<VAST xsi:a='b'>\xe9&\x01</VAST>\n<img>")

    assert "é&" == document.root.text
    assert 6 == len(document.repairs)


@pytest.mark.parametrize(
    ("namespace", "prefix"),
    [
        ("http://www.w3.org/2001/XMLSchema-instance", "xsi"),
        ("http://www.w3.org/1999/xlink", "xlink"),
        ("urn:undeclared:acme", "acme"),
    ],
)
def test_prefixes(namespace: str, prefix: str) -> None:
    """An undeclared prefix gets the namespace it is known for, or one of its own."""
    document = parse(f"<VAST {prefix}:a='1'><{prefix}:b/></VAST>".encode())

    assert {f"{{{namespace}}}a": "1"} == dict(document.root.attrib)
    assert namespace == etree.QName(document.root[0]).namespace


def test_too_many_prefixes() -> None:
    """Only so many undeclared prefixes are declared."""

    def using(count: int) -> bytes:
        return b"<VAST>" + b"".join(b"<p%d:a/>" % n for n in range(count)) + b"</VAST>"

    assert MAX_PREFIXES == len(parse(using(MAX_PREFIXES)).root)
    with pytest.raises(VastSyntaxError):
        parse(using(MAX_PREFIXES + 1))


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-16", "iso-8859-1", "windows-1252", "iso-8859-15", "cp1252", "windows-1254"],
)
def test_encodings(encoding: str) -> None:
    """A document is read in the encoding that it declares."""
    data = f'<?xml version="1.0" encoding="{encoding}"?><VAST>é</VAST>'.encode(encoding)

    assert "é" == parse(data).root.text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("windows-1251", "Реклама"),
        ("koi8-r", "Реклама"),
        ("shift_jis", "広告"),
        ("euc-jp", "広告"),
        ("euc-kr", "광고"),
        ("gb2312", "广告"),
        ("gb18030", "广告"),
        ("big5", "廣告"),
    ],
)
def test_far_encodings(encoding: str, text: str) -> None:
    """So are those of countries where Latin letters do not do."""
    data = f'<?xml version="1.0" encoding="{encoding}"?><VAST>{text}</VAST>'.encode(encoding)

    assert text == parse(data).root.text


def test_mark_beats_declaration() -> None:
    """A byte order mark is believed, whatever the declaration says."""
    text = '<?xml version="1.0" encoding="iso-8859-1"?><VAST>é</VAST>'

    assert "é" == parse(text.encode("utf-16")).root.text
    assert "é" == parse(b"\xef\xbb\xbf<VAST>\xc3\xa9</VAST>").root.text


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        (None, "\xcf"),
        ("windows-1251", "П"),
        ('"Windows-1251"', "П"),
        ("utf-8", "\xcf"),
        ("utf-7", "\xcf"),
        ("nonsense", "\xcf"),
    ],
)
def test_charset_of_http(charset: str | None, text: str) -> None:
    """The charset of HTTP counts where the bytes are no UTF-8 and say nothing themselves."""
    assert text == parse(b"<VAST>\xcf</VAST>", charset=charset).root.text


def test_charset_of_http_is_weak() -> None:
    """It does not count where the bytes are UTF-8."""
    assert "é" == parse("<VAST>é&</VAST>".encode(), charset="windows-1251").root.text[:1]


@pytest.mark.parametrize(
    ("plain", "data"),
    [
        (True, b"<VAST/>"),
        (True, b'<?xml version="1.0" encoding="UTF-8"?><VAST/>'),
        (True, b"<?xml version='1.0' encoding='us-ascii'?><VAST/>"),
        (False, b'<?xml version="1.0" encoding="iso-8859-1"?><VAST/>'),
        (False, b"<VAST>\xe9</VAST>"),
        (False, "<VAST/>".encode("utf-16")),
        (True, b"<?xml version='1.0' standalone='yes' ?><VAST/>"),
        (True, b'\xef\xbb\xbf<?xml version="1.1"?><VAST/>'),
        (False, b'<?xml <?xml version="1.0" encoding="UTF-8"?>\n<VAST/>'),
        (False, b"<?xml nonsense?><VAST/>"),
        (False, b"<?xml version='1.0' standalone='maybe'?><VAST/>"),
        (False, b'<?xml encoding="UTF-8"?><VAST/>'),
    ],
)
def test_is_plain(plain: bool, data: bytes) -> None:  # noqa: FBT001 - a column of the table
    """A body may be passed on as it is where it is UTF-8 and says nothing else of itself."""
    assert plain == is_plain(data)


def test_own_parser() -> None:
    """Off the event loop's thread a parser of one's own does the same."""
    assert "a" == parse(b"<VAST>a</VAST>", parser=hardened_parser()).root.text


# --- Properties ---------------------------------------------------------------------------------


def _is_document_or_error(data: bytes) -> bool:
    try:
        return isinstance(parse(data), VastDocument)
    except VastError as error:
        return error.vast_code in {100, 101, 102}


@given(st.binary(max_size=200) | st.lists(st.sampled_from(HOSTILE), max_size=12).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes) -> None:
    """Any bytes give a document or a VastError."""
    assert _is_document_or_error(data)
    assert _is_document_or_error(b"<VAST>" + data + b"</VAST>")


@given(mutated())
@settings(max_examples=500, deadline=None)
def test_any_mutation(data: bytes) -> None:
    """So does any document that was damaged on its way."""
    assert _is_document_or_error(data)


@given(mutated())
@settings(max_examples=300, deadline=None)
def test_well_formed_is_left_alone(data: bytes) -> None:
    """What the hardened parser takes, comes out as that parser reads it, whatever is in it."""
    try:
        direct = etree.fromstring(data.decode().encode(), hardened_parser())
        read = parse(data)
    except (etree.XMLSyntaxError, UnicodeDecodeError, VastError):
        return

    assert etree.tostring(direct) == etree.tostring(read.root)


@pytest.mark.parametrize("name", [name for name, _ in _REPAIRS])
@pytest.mark.parametrize("seed", range(5))
def test_repairs_leave_well_formed_alone(name: str, seed: int) -> None:
    """No repair changes a letter of a well-formed document."""
    repair = dict(_REPAIRS)[name]
    pages = [page.body.decode() for page in grow(seed, "http://x").pages.values() if page.body]
    documents = [page for page in pages if page.rstrip().endswith("VAST>")]

    assert documents == [repair(each) for each in documents]


# --- Time ---------------------------------------------------------------------------------------

UNITS = (
    *(b"<![CDATA[", b"<![CDATA[]]>", b"<!--", b"<!---->", b"]]>", b"<?", b"<!", b"<", b"</", b">"),
    *(b"&", b"&amp", b"&a;", b"&#", b"&#x", b"&nbsp;", b"&LT;", b"& <![CDATA[&]]>", b"&<!-- & -->"),
    *(b"a:b=", b" a:b='c'", b"<a:b ", b" xmlns:a", b" xmlns:a=", b" a:", b":", b"'", b'"', b"a='"),
    *(b"</VAST", b"</VAST ", b"</a:VAST ", b"<VAST ", b"<VAST>", b"</VAST>", b"x", b" ", b"\n"),
    *(b"\x01", b"\xff", b"\xc3\xa9", b"\0", b"encoding=", b"?>", b"-->", b"<?xml ", b"<a>"),
)
"""What a hostile document repeats."""

BEGINNINGS = (b"", b"<VAST>", b"<VAST ", b"<VAST>&", b"<!--", b"<?xml version='1.0' ", b"<VAST a='")


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit: bytes) -> None:
    """512 KiB of anything are read or refused in well under a second of work."""
    body = unit * (512 * 1024 // len(unit))
    for beginning in BEGINNINGS:
        for end in (b"", b"&</VAST>"):
            began = time.process_time()

            assert _is_document_or_error(beginning + body + end)
            assert 1.0 > time.process_time() - began


def test_time_is_linear_for_mixtures() -> None:
    """So are mixtures of all of them."""
    for seed in range(20):
        draw = random.Random(seed)
        few = draw.sample(UNITS, 3)
        body = b"".join(draw.choices(few, k=512 * 1024 // 8))[: 512 * 1024]
        began = time.process_time()

        assert _is_document_or_error(b"<VAST>" + body)
        assert 1.0 > time.process_time() - began


@pytest.mark.parametrize("data", DOCUMENTS)
def test_beginnings(data: bytes) -> None:
    """A document may be cut anywhere: each beginning is read or refused."""
    assert all(_is_document_or_error(data[:end]) for end in range(len(data)))
