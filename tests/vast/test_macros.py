"""Filling macros: which, where, in which spellings, and only once."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.vast.macros import (
    DEFAULT_SPELLINGS,
    MACROS,
    MAX_ADDED,
    MAX_FILLED,
    MAX_URL,
    SPELLINGS,
    Context,
    Macros,
    encode,
    encode_list,
    fill_everywhere,
    replace_few,
    spelling,
)

REGISTRY = Path(__file__).parents[2].parent / "shared" / "corpus" / "iab-xsd" / "macros-data.json"
OWN = {"BREAKMINDURATION", "CORRELATOR"}
"""Known here without being registered (docs/vast.md, section 7)."""

CONTEXTS = {
    "All tracking pixels": Context.TRACKING,
    "VAST request URIs": Context.REQUEST,
}

VALUES = Macros(
    {
        "TIMESTAMP": "1700000000000",
        "CACHEBUSTING": lambda: "12345678",
        "CORRELATOR": "42",
        "PAGEURL": "https://p.example/?a=b&c=[CORRELATOR]",
        "DEVICEIP": "2001:db8::1",
        "DEVICEUA": "UA/1 (é)",
        "APPBUNDLE": "com.example",
        "IFA": "an-id",
        "GDPRCONSENT": "CO",
        "ADSERVINGID": "never asked for",
    }
)


def registered() -> list[dict[str, str]]:
    """Read the IAB's list."""
    if not REGISTRY.is_file():
        pytest.skip("the IAB's macro list is not beside the project")
    found: list[dict[str, str]] = json.loads(REGISTRY.read_text())["macros"]
    return found


# --- Which --------------------------------------------------------------------------------------


def test_names() -> None:
    """All registered macros are known, and two more."""
    assert {each["name"] for each in registered()} | OWN == set(MACROS)
    assert 59 == len(registered())


def test_contexts() -> None:
    """Each has a meaning where the list says so."""
    wrong = {}
    for each in registered():
        said = [part.strip() for part in each["contexts"].split(",")]
        expected = Context(0)
        for part in said:
            expected |= CONTEXTS.get(part, Context(0))
        found = MACROS[each["name"]].context & (Context.REQUEST | Context.TRACKING)
        if found != expected:
            wrong[each["name"]] = (said, found)

    assert {} == wrong


@pytest.mark.parametrize(
    ("context", "name"),
    [
        (Context.ERROR, "ERRORCODE"),
        (Context.CLICK, "CLICKPOS"),
        (Context.VERIFICATION, "REASON"),
    ],
)
def test_narrow_contexts(context: Context, name: str) -> None:
    """Three macros have a meaning in one place only."""
    assert context == MACROS[name].context


@pytest.mark.parametrize("name", sorted(MACROS))
def test_missing_values(name: str) -> None:
    """In a request an unknown value is -1, one that is not shared is -2; others are untouched."""
    url = f"http://x/?a=[{name}]"
    filled = Macros({}).fill_request(url)
    asked = bool(MACROS[name].context & Context.REQUEST)

    assert (f"http://x/?a={-2 if name in {'IFA', 'LATLONG'} else -1}" if asked else url) == filled
    assert url == Macros({}).fill_known(url)


@pytest.mark.parametrize("name", sorted(MACROS))
def test_known_values(name: str) -> None:
    """A value is filled in where its macro has a meaning, and nowhere else."""
    macros = Macros({name: "a b"})
    url = f"http://x/?a=[{name}]"
    context = MACROS[name].context
    in_request = bool(context & Context.REQUEST)
    in_both = bool(context & (Context.REQUEST | Context.TRACKING))
    in_error = bool(context & (Context.TRACKING | Context.ERROR))

    assert ("http://x/?a=a%20b" if in_request else url) == macros.fill_request(url)
    assert ("http://x/?a=a%20b" if in_both else url) == macros.fill_known(url)
    assert (url != macros.fill_error(url, 303)) is in_error


# --- Where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://x/?filter[brand]=x&ids[]=1",
        "http://[2001:db8::1]:80/",
        "http://x/?[UNKNOWN]&[UID]&[ERROR_CODE]&[CLICK]&[session.id]",
        "http://x/?a=[timestamps]&b=[Time]&c=[TIMESTAMP",
        "http://x/?a=%5BUNKNOWN%5D&b=%5BTIMESTAMP&c=%255BTIMESTAMP%255D",
        "http://x/?100%&%%%&%5b%5d&[[]]",
        "",
    ],
)
def test_left_alone(url: str) -> None:
    """Brackets and percent signs that are no known macro are left alone."""
    assert url == VALUES.fill_request(url)
    assert url == VALUES.fill_known(url)
    assert url == VALUES.fill_error(url, 301)


@pytest.mark.parametrize(
    ("filled", "url"),
    [
        (
            "http://42/42?42=42#42",
            "http://[CORRELATOR]/[CORRELATOR]?[CORRELATOR]=[CORRELATOR]#[CORRELATOR]",
        ),
        ("4242", "[CORRELATOR][CORRELATOR]"),
        ("[42]", "[[CORRELATOR]]"),
        ("http://x/?a=42&b=42", "http://x/?a=%5BCORRELATOR%5D&b=%5bCORRELATOR%5d"),
        ("http://x/?t=1700000000000", "http://x/?t=[timestamp]"),
        ("http://x/?t=1700000000000", "http://x/?t=[TimeStamp]"),
        ("http://x/?t=12345678", "http://x/?t=[random]"),
        ("http://x/?t=12345678", "http://x/?t=[CACHE_BREAKER]"),
    ],
)
def test_filled_by_default(filled: str, url: str) -> None:
    """Anywhere in a URL, also in percent-encoded brackets, and a few names in any case."""
    assert filled == VALUES.fill_request(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://x/?u=https%3A%2F%2Fy%2F%3Ft%3D%5BTIMESTAMP%5D",
        "http://x/?a=1&u=https://y/?t=%5BTIMESTAMP%5D",
        "http://x/?u=HTTP%3a%2f%2fy%2f%5BTIMESTAMP%5D",
        "http://x/?u=//y&v=https://y/%5BTIMESTAMP%5D",
    ],
)
def test_nested_urls(url: str) -> None:
    """An encoded macro inside a parameter that is a URL is that URL's server's."""
    assert url == VALUES.fill_request(url)


def test_beside_nested_urls() -> None:
    """One in the next parameter is not, nor is a plain macro anywhere."""
    url = "http://x/?u=https://y/&t=%5BCORRELATOR%5D;u=http://z/[CORRELATOR]"

    assert "http://x/?u=https://y/&t=42;u=http://z/42" == VALUES.fill_request(url)


# --- Spellings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "text", "name"),
    [(group, text, name) for group, table in SPELLINGS.items() for text, name in table.items()],
)
def test_spelling(group: str, text: str, name: str) -> None:
    """Each spelling is read where its group is switched on, and stays as it is where not."""
    url = f"http://x/?a={text}&b=1"

    assert f"http://x/?a={VALUES.get(name)}&b=1" == VALUES.fill_request(url, spelling((group,)))
    for other in {*SPELLINGS, "encoded"} - {group}:
        how = spelling((other,))
        if not how.pattern.search(text):
            assert url == VALUES.fill_request(url, how)


def test_spellings_switched_off() -> None:
    """Without any, only the standard's brackets are read."""
    texts = [text for table in SPELLINGS.values() for text in table]
    url = "http://x/?" + "&".join([*texts, "%5BTIMESTAMP%5D"])

    assert url == VALUES.fill_request(url, spelling(()))
    assert "42" == VALUES.fill_request("[CORRELATOR]", spelling(()))


def test_groups() -> None:
    """The groups are those of the field; two of them are on unless a route says otherwise."""
    groups = {"lowercase", "percent", "braces", "brace", "dollar", "underscore"}

    assert groups == set(SPELLINGS)
    assert ("encoded", "lowercase") == DEFAULT_SPELLINGS
    assert {name for table in SPELLINGS.values() for name in table.values()} <= set(MACROS)


@pytest.mark.parametrize("text", ["__cb__", "$CB", "[CACHE-BUSTER]", "(.*)", "[TIMESTAMP]", "CB"])
def test_aliases(text: str) -> None:
    """An operator's own spelling is read to the letter, and before all others."""
    how = spelling(("percent",), ((text, "CORRELATOR"),))

    assert "http://x/?42&12345678" == VALUES.fill_request(f"http://x/?{text}&%%CACHEBUSTER%%", how)


# --- Once ---------------------------------------------------------------------------------------


def test_one_pass() -> None:
    """A value that looks like a macro is not filled again."""
    page = "https%3A%2F%2Fp.example%2F%3Fa%3Db%26c%3D%5BCORRELATOR%5D"

    assert f"http://x/?a={page}&b=42" == VALUES.fill_request("http://x/?a=[PAGEURL]&b=[CORRELATOR]")
    raw = Macros({"CORRELATOR": "42"}, {"PAGEURL": "[CORRELATOR]%5BCORRELATOR%5D"})
    assert "[CORRELATOR]%5BCORRELATOR%5D" == raw.fill_request("[PAGEURL]")


def test_encoded_once() -> None:
    """A value is encoded when it is first needed, and is the same from then on."""
    drawn = iter(["a b", "c d"])
    macros = Macros({"CACHEBUSTING": lambda: next(drawn)})

    assert "a%20b" == macros.get("CACHEBUSTING")
    assert "a%20b&a%20b" == macros.fill_request("[CACHEBUSTING]&[CACHEBUSTING]")
    assert "a%20b" == macros.having({"ADCOUNT": "1"}).get("CACHEBUSTING")
    assert macros.get("ADCOUNT") is None


def test_encoded_values() -> None:
    """Values that are encoded already stay so; a list has bare commas between its parts."""
    macros = Macros({}).having({"ADCATEGORIES": encode_list(["a/b", "c,d", "é"])})

    assert "a%2Fb,c%2Cd,%C3%A9" == macros.fill_request("[ADCATEGORIES]")


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("a%20b", "a b"),
        ("%2F%3F%26%3D%2B%25", "/?&=+%"),
        ("-_.!~*'()", "-_.!~*'()"),
        ("%C3%A9", "é"),
    ],
)
def test_encode(encoded: str, value: str) -> None:
    """Values are encoded as encodeURIComponent does it."""
    assert encoded == encode(value)


def test_error_code() -> None:
    """An error's code is filled in error URIs: alone, or with all the others."""
    url = "http://x/?[ERRORCODE]&%5BERRORCODE%5D&[CORRELATOR]&[ADPLAYHEAD]&[REASON]&[CLICKPOS]"

    assert "http://x/?303&303&42&-1&[REASON]&[CLICKPOS]" == VALUES.fill_error(url, 303)
    assert "http://x/?303&303&[CORRELATOR]&[ADPLAYHEAD]&[REASON]&[CLICKPOS]" == VALUES.fill_code(
        url, 303
    )
    assert url == VALUES.fill_known(url).replace("42", "[CORRELATOR]")


# --- Documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filled", "document"),
    [
        (b"<a>1</a>", b"<a>[CORRELATOR]</a>"),
        (b"<a>1[CORRELATOR</a>", b"<a>[CORRELATOR][CORRELATOR</a>"),
        (b"<![CDATA[1]]>", b"<![CDATA[[CORRELATOR]]]>"),
        (b"[CORRELATOR]", b"[TRANSACTIONID]"),
        (b"[OTHER]", b"[OTHER]"),
        (b"<a/>", b"<a/>"),
    ],
)
def test_fill_everywhere(filled: bytes, document: bytes) -> None:
    """A whole document is filled in one pass; what is not given stays."""
    values = {b"CORRELATOR": b"1", b"TRANSACTIONID": b"[CORRELATOR]"}

    assert filled == fill_everywhere(document, values)


def test_filling_is_bounded() -> None:
    """A document that could grow by more than the bound is left as it is, and no other one."""
    value = b"v" * 1024
    most = b"[DEVICEUA]" * (MAX_ADDED // len(value))

    assert MAX_ADDED == len(fill_everywhere(most, {b"DEVICEUA": value}))
    assert most + b"[" == fill_everywhere(most + b"[", {b"DEVICEUA": value})


def test_long_urls_are_left_alone() -> None:
    """A URL that is longer than any server takes is not looked into."""
    macro = "[TIMESTAMP]"
    longest = "http://x/?t=".ljust(MAX_URL - len(macro), "a") + macro

    assert longest.replace(macro, "1700000000000") == VALUES.fill_request(longest)
    assert f"{longest}a" == VALUES.fill_request(f"{longest}a")
    assert f"{longest}a" == VALUES.fill_known(f"{longest}a")
    assert 8190 == MAX_URL


def test_filled_urls_do_not_explode() -> None:
    """A URL that its values would make enormous is left as it is."""
    macros = Macros({"PAGEURL": "x" * 2048})
    few, many = "http://x/?" + "[PAGEURL]" * 31, "http://x/?" + "[PAGEURL]" * 33

    assert 31 * 2048 < len(macros.fill_request(few)) <= MAX_FILLED
    assert many == macros.fill_request(many)


def test_replace_few() -> None:
    """A few macros are replaced by search."""
    values = [(b"[CORRELATOR]", b"1"), (b"[TRANSACTIONID]", b"2")]

    assert b"<a>1 2 [X] 1</a>" == replace_few(
        b"<a>[CORRELATOR] [TRANSACTIONID] [X] [CORRELATOR]</a>", values
    )


# --- Properties ---------------------------------------------------------------------------------

PIECES = st.sampled_from(
    (
        *("[CORRELATOR]", "%5BCORRELATOR%5D", "[timestamp]", "[PAGEURL]", "[IFA]", "[ADCOUNT]"),
        *("[", "]", "%5B", "%5D", "%", "?", "&", ";", "=", "http://", "%3A%2F%2F", "a", "[X]", "é"),
        *("%%CACHEBUSTER%%", "{{IP}}", "${TIMESTAMP}", "__timestamp__", "\n", "CORRELATOR"),
    )
)
ALL = spelling(("encoded", *SPELLINGS))


@given(st.lists(PIECES, max_size=12).map("".join))
def test_no_value_is_filled_again(url: str) -> None:
    """Values full of macros end up in the URL as they are, however they come together."""
    marked = Macros({}, {name: f"<{name}[TIMESTAMP]%5BIFA%5D%%CACHEBUSTER%%>" for name in MACROS})
    filled = marked.fill_request(url, ALL)
    value = re.compile(r"<(\w+)\[TIMESTAMP\]%5BIFA%5D%%CACHEBUSTER%%>")

    assert "<" not in value.sub("", filled)
    assert filled.count("<") == filled.count(">") == len(value.findall(filled))


@given(st.text(alphabet=st.characters(exclude_characters="[%{_$")), st.text())
def test_text_without_macros(plain: str, any_text: str) -> None:
    """A text without a known macro is unchanged, to the byte."""
    safe = any_text.replace("[", "(").replace("%", "(").replace("{", "(").replace("_", "(")
    for url in (plain, safe.replace("$", "(")):
        assert url == VALUES.fill_request(url, ALL)
        assert url == VALUES.fill_known(url, ALL)
        assert url.encode("utf-8", "surrogatepass") == fill_everywhere(
            url.encode("utf-8", "surrogatepass"), {b"CORRELATOR": b"1"}
        )


@given(st.from_regex(r"\[[A-Z][A-Z0-9_]{2,31}\]", fullmatch=True))
def test_unknown_names(text: str) -> None:
    """A name that is not on the list stays, in either kind of brackets."""
    if text[1:-1] in MACROS or text.lower() in SPELLINGS["lowercase"]:
        return
    encoded = text.replace("[", "%5B").replace("]", "%5D")

    assert text + encoded == VALUES.fill_request(text + encoded)


@pytest.mark.parametrize(
    "unit",
    ["%5BTIMESTAMP%5D", "[TIMESTAMP]", "[", "%5B", "%", "[A", "[timestamp", "?%5BIFA%5D", "{{"],
)
def test_time_is_linear(unit: str) -> None:
    """A URL of 128 KiB is filled in well under a second of work."""
    url = "http://x/?a=" + unit * (128 * 1024 // len(unit))
    began = time.process_time()
    VALUES.fill_request(url, ALL)

    assert 1.0 > time.process_time() - began
