"""The error codes of VAST 4.3 section 2.3.6.3 that a resolver raises by itself."""

from enum import IntEnum


class VastCode(IntEnum):
    """What an ``[ERRORCODE]`` macro is filled with."""

    XML_PARSE = 100
    SCHEMA = 101
    VERSION = 102
    CATEGORY_BLOCKED = 205
    NOT_SERVED = 206
    """The break was cut, and the ad not served, for a reason that is not the ad's own."""
    WRAPPER = 300
    WRAPPER_TIMEOUT = 301
    WRAPPER_LIMIT = 302
    NO_AD = 303
    UNDEFINED = 900
