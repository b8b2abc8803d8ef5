"""
The IAB's schemas as judges, up to what the proxy does on purpose.

Rule 1: a URI is any text: macros are no URIs, and every ad has some.
Rule 2: the order of children does not count: they are put into the schema's own order first.
Rule 3: an ad may have several Errors, as VAST 3's text says, and its schema does not.
Rule 4: VAST 4 without its namespace is judged as if it had it; 4.3 is judged as 4.2.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lxml import etree

from tests.support.vast_facts import IAB

CORPUS = Path(__file__).parents[2].parent / "shared" / "corpus"
"""Where the IAB's samples and schemas are, if they are there."""

FILES = {
    "2.0": "vast_2.0.1.xsd",
    "2.0.1": "vast_2.0.1.xsd",
    "3.0": "vast3_draft.xsd",
    "4.0": "vast4.xsd",
    "4.1": "vast_4.1.xsd",
    "4.2": "vast_4.2.xsd",
    "4.3": "vast_4.2.xsd",
}

XS = "{http://www.w3.org/2001/XMLSchema}"


def violations(document: bytes) -> list[str]:
    """Say what in *document* its version's schema forbids."""
    root = etree.fromstring(document)
    name = FILES[root.get("version", "")]
    if name.startswith(("vast4", "vast_4")):
        for each in root.iter(etree.Element):
            if not str(each.tag).startswith("{"):
                each.tag = f"{{{IAB}}}{each.tag}"
    _sort(root, _declared(name))
    schema = _schema(name)
    schema.validate(root)
    # A message without the line: the order of children was changed.
    return sorted({str(each.message) for each in schema.error_log})


@lru_cache
def _source(name: str) -> etree._Element:
    text = (CORPUS / "iab-xsd" / name).read_text()
    source = etree.fromstring(text.replace("xs:anyURI", "xs:string").encode())
    for each in source.iter(f"{XS}element"):
        if each.get("name") == "Error":
            each.set("maxOccurs", "unbounded")
    return source


@lru_cache
def _schema(name: str) -> etree.XMLSchema:
    return etree.XMLSchema(_source(name))


@lru_cache
def _declared(name: str) -> dict[str, list[list[str]]]:
    """Collect, for each element's name, the orders of children that the schema declares."""
    source = _source(name)
    types = {each.get("name", ""): each for each in source.iterfind(f"{XS}complexType")}
    found: dict[str, list[list[str]]] = {}
    for element in source.iter(f"{XS}element"):
        inner = element.find(f"{XS}complexType")
        if inner is None:
            inner = types.get((element.get("type") or "").rpartition(":")[2])
        if inner is not None and element.get("name"):
            found.setdefault(element.get("name", ""), []).append(list(_children(inner, types)))
    return found


def _children(kind: etree._Element, types: dict[str, etree._Element]) -> Iterator[str]:
    """Give the names of a type's children in order; those of the type it extends come first."""
    for each in kind:
        if each.tag == f"{XS}extension":
            base = types.get((each.get("base") or "").rpartition(":")[2])
            if base is not None:
                yield from _children(base, types)
        if each.tag == f"{XS}element":
            yield each.get("name") or (each.get("ref") or "").rpartition(":")[2]
        elif isinstance(each.tag, str):
            yield from _children(each, types)


def _sort(element: etree._Element, declared: dict[str, list[list[str]]]) -> None:
    names = {etree.QName(each).localname for each in element.iterchildren(etree.Element)}
    orders = declared.get(etree.QName(element).localname, [])
    fitting = [order for order in orders if names <= set(order)]
    if fitting:
        order = fitting[0]
        element[:] = sorted(
            element.iterchildren(etree.Element),
            key=lambda each: order.index(etree.QName(each).localname),
        )
    for each in element.iterchildren(etree.Element):
        _sort(each, declared)
