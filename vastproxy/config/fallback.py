"""
The document that a route answers where nobody has an ad.

Rule 1: it is judged when the configuration is read, not when nothing else is left.
Rule 2: what is read from a file and what stands in config.yaml itself is judged alike.
"""

import re
from typing import Annotated, Final

from pydantic import PlainSerializer, PlainValidator

from vastproxy.config.units import shown
from vastproxy.config.values import text_schema
from vastproxy.errors import VastError, VastSyntaxError
from vastproxy.vast.parse import hardened_parser, parse

MAX_FALLBACK: Final = 256 * 1024
"""Bytes. It is parsed for each answer that it makes; a house ad has 2 to 5 KiB."""

_BLANKS: Final = "\ufeff \t\r\n"
_DECLARATION = re.compile(r"\A<\?xml\s[^>]*\?>")
# The parser's name for it, and how a file begins: the wrong one may hold a secret.
_NOT_TOLD = re.compile(r"(?: \(<string>|: it begins with ).*", re.DOTALL)


def is_inline(text: str) -> bool:
    """Tell whether *text* is a document itself, and not the path of one."""
    return text.lstrip(_BLANKS).startswith("<")


def inline(text: str) -> bytes:
    """Give the document that *text* is."""
    # Text of YAML is decoded: what it says of an encoding of its own is no longer so.
    body = _DECLARATION.sub("", text.strip(_BLANKS), count=1)
    return body.lstrip().encode("utf-8", "surrogatepass")


def checked(document: bytes) -> bytes:
    """Give *document* back if it can be answered to anybody; else raise ValueError."""
    if len(document) > MAX_FALLBACK:
        raise ValueError("the document is larger than 256KiB (write a smaller one)")
    try:
        # A reload reads off the event loop's thread, which the usual parser belongs to.
        ads = parse(document, parser=hardened_parser()).ads
    except VastSyntaxError as error:
        reason = _NOT_TOLD.sub("", str(error))
        raise ValueError(f"the document is not well-formed: {reason} (mend it there)") from None
    except VastError as error:
        raise ValueError(f"the document is no VAST: {error} (write <VAST> around it)") from None
    if any(each.is_wrapper for each in ads):
        raise ValueError(
            "the document has a Wrapper, and a fallback is what is there when nobody can be asked "
            "(write InLine ads)"
        )
    if not any(each.is_inline for each in ads):
        raise ValueError("the document has no InLine ad (write one, or null for an empty answer)")
    return document


def _document(value: object) -> bytes:
    if isinstance(value, bytes):
        return checked(value)
    if isinstance(value, str) and is_inline(value):
        return checked(inline(value))
    # Paths are gone before this is asked: load.py reads what they lead to.
    raise ValueError(f"{shown(value)} is no VAST (write the path of a VAST file, or VAST itself)")


Fallback = Annotated[
    bytes,
    PlainValidator(_document),
    text_schema(),
    PlainSerializer(lambda document: document.decode("utf-8", "replace"), when_used="json"),
]
