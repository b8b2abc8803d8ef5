"""
Logging: one line of JSON for an event, or one for people at a terminal.

What comes from requests is written by a JSON encoder, never pasted into text, so that nobody can
forge a line. The standard library's loggers (aiohttp's, asyncio's) end in the same stream.
"""

import logging
import sys
import time
from collections.abc import Callable
from typing import Literal, TextIO

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from structlog.typing import EventDict, Processor

MALFORMED_EVERY = 1.0
"""Seconds between two lines about malformed requests: anybody can send a million of them."""


def configure(
    level: str = "info",
    style: Literal["auto", "json", "console"] = "auto",
    stream: TextIO | None = None,
) -> None:
    """Set up logging for this process, to *stream* (standard error if None)."""
    target = stream or sys.stderr
    number = logging.getLevelNamesMapping()[level.upper()]
    as_json = style == "json" or (style == "auto" and not target.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    end: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        else [_printable, structlog.dev.ConsoleRenderer(colors=target.isatty())]
    )
    structlog.configure(
        processors=[*shared, *end],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(target),
        cache_logger_on_first_use=True,
    )
    _adopt_standard_logging(target, number, [*shared, *end])


def _adopt_standard_logging(stream: TextIO, level: int, processors: list[Processor]) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *processors[:-1]],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                processors[-1],
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    server = logging.getLogger("aiohttp.server")
    for each in [each for each in server.filters if isinstance(each, QuietMalformed)]:
        server.removeFilter(each)
    server.addFilter(QuietMalformed(time.monotonic))


def _printable(_: object, __: str, event: EventDict) -> EventDict:
    """Write texts with controls or line breaks as Python does, so that none makes a line."""
    return {
        key: repr(value)
        if isinstance(value, str) and key != "exception" and not value.isprintable()
        else value
        for key, value in event.items()
    }


class QuietMalformed(logging.Filter):
    """
    Cut aiohttp's tracebacks about malformed requests to a line, now and then.

    *clock* gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._next = 0.0
        self._suppressed = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """
        Let one line through each second, with the number of those that were not.

        What is no malformed request, a fault of ours for one, passes as it is.
        """
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        now = self._clock()
        if now < self._next:
            self._suppressed += 1
            return False
        self._next = now + MALFORMED_EVERY
        problem = " ".join(error.message.split())[:200]
        record.msg = "malformed request: %s (%d more since the last line)"
        record.args = (problem, self._suppressed)
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        self._suppressed = 0
        return True
