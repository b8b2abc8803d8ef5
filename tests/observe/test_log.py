"""One event is one line, whatever it is about; nobody outside can write a line of his own."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog
from aiohttp.http_exceptions import BadHttpMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.ad_server import AdServer, in_thread
from tests.support.documents import an_inline
from tests.support.proxy import a_config, running_proxy
from vastproxy.observe.log import QuietMalformed, configure

FORGERIES = (
    'x"}\n{"event": "forged"}',
    "x\r\nforged",
    "x\x1b[2Jforged",
    "x\x00\x07\x7f",
    "x\u2028forged\u2029\x85",
    "x\udc85\ud800",
    "x\x9b31m",
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was."""
    root, server = logging.getLogger(), logging.getLogger("aiohttp.server")
    kept = (root.handlers[:], root.level, server.filters[:])
    yield
    root.handlers[:], _, server.filters[:] = kept
    root.setLevel(kept[1])
    structlog.reset_defaults()


def configured(
    level: str = "info", style: Literal["auto", "json", "console"] = "json"
) -> io.StringIO:
    """Set up logging to a stream in memory."""
    stream = io.StringIO()
    configure(level, style, stream)
    return stream


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    """Read each line of *stream* as JSON."""
    return [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]


def test_event_is_a_line_of_json() -> None:
    """An event has its name, its level, a time in UTC, and its fields."""
    stream = configured()
    structlog.get_logger("x").warning("a.b", n=1, at=["c"], flags=("d",))
    (line,) = records(stream)
    assert line.pop("timestamp").endswith("Z")
    assert {"event": "a.b", "level": "warning", "n": 1, "at": ["c"], "flags": ["d"]} == line


@pytest.mark.parametrize("text", FORGERIES)
def test_value_makes_no_line(text: str) -> None:
    """Line breaks, controls and lone surrogates in values stay inside their line."""
    stream = configured()
    structlog.get_logger("x").info("a.b", value=text, **{"k" + text: [text]})
    written = stream.getvalue()

    assert 1 == len(written.splitlines())
    assert written.isascii()
    assert written[:-1].isprintable()
    assert text == records(stream)[0]["value"]


@given(text=st.text(alphabet=st.characters(), max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_value_comes_back(text: str) -> None:
    """Whatever text is logged, it can be read from its line again."""
    stream = configured()
    structlog.get_logger("x").info("a.b", value=text)

    assert [text] == [each["value"] for each in records(stream)]


def test_traceback_is_a_field() -> None:
    """A traceback is a field of its event's line."""
    stream = configured()
    try:
        {}[FORGERIES[0] + FORGERIES[5]]
    except KeyError:
        structlog.get_logger("x").exception("a.b", request_id="r1")
    (line,) = records(stream)

    assert "Traceback (most recent call last)" in line["exception"]
    assert "KeyError" in line["exception"]
    assert ("a.b", "r1", "error") == (line["event"], line["request_id"], line["level"])


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_level(level: str, expected: list[str]) -> None:
    """What is less important than the level is not written."""
    stream = configured(level)
    log = structlog.get_logger("x")
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("event")

    assert expected == [each["level"] for each in records(stream)]


def test_standard_loggers_end_in_the_same_stream() -> None:
    """What libraries log from warnings on is JSON, too, with the logger's name."""
    stream = configured()
    logging.getLogger("aiohttp.access").info("passed over")
    logging.getLogger("asyncio").warning("late by %d\n%s", 3, FORGERIES[1])
    (line,) = records(stream)

    assert "late by 3\nx\r\nforged" == line["event"]
    assert ("asyncio", "warning") == (line["logger"], line["level"])


def test_auto_is_json_where_nobody_looks() -> None:
    """Without a terminal lines are JSON; asked for by name, they are for people."""
    stream = configured(style="auto")
    structlog.get_logger("x").info("a.b")
    assert "a.b" == records(stream)[0]["event"]
    people = configured(style="console")
    structlog.get_logger("x").info("a.b", n=1)

    assert "a.b" in people.getvalue()
    assert not people.getvalue().startswith("{")


@pytest.mark.parametrize("text", FORGERIES)
def test_value_makes_no_line_for_people(text: str) -> None:
    """In the form for people a value cannot make a line either, nor a sequence of controls."""
    stream = configured(style="console")
    structlog.get_logger("x").info("a.b", value=text)
    written = stream.getvalue()

    assert 1 == len(written.splitlines())
    assert written[:-1].isprintable()
    assert written.encode()


def a_record(problem: str = "bad") -> Any:
    """Build what aiohttp logs of a malformed request."""
    error = BadHttpMessage(problem)
    info = (type(error), error, None)
    return logging.LogRecord("aiohttp.server", logging.ERROR, "p", 1, "Error", (), info)


def test_malformed_requests_are_a_line_a_second() -> None:
    """Of many malformed requests in a second one line is written, with the number of the others."""
    now = [100.0]
    quiet = QuietMalformed(lambda: now[0])
    first, second = a_record("bad"), a_record("worse")

    assert quiet.filter(first)
    assert [False] * 3 == [quiet.filter(a_record()) for _ in range(3)]
    now[0] += 1.0
    assert quiet.filter(second)
    assert "malformed request: bad (0 more since the last line)" == first.getMessage()
    assert "malformed request: worse (3 more since the last line)" == second.getMessage()


def test_malformed_request_is_cut_short() -> None:
    """A malformed request is a warning of limited length, without a traceback."""
    record = a_record("b" * 10_000)
    quiet = QuietMalformed(lambda: 1.0)

    assert quiet.filter(record)
    assert (logging.WARNING, "WARNING", None) == (
        record.levelno,
        record.levelname,
        record.exc_info,
    )
    assert 300 > len(record.getMessage())


def test_malformed_request_may_have_percent_signs() -> None:
    """A message with percent signs can be written."""
    quiet = QuietMalformed(lambda: 1.0)
    record = a_record("100 %s of %d")

    assert quiet.filter(record)
    assert "100 %s of %d" in record.getMessage()


def test_fault_of_ours_is_told_in_full() -> None:
    """What is no malformed request keeps its level and its traceback, however often it comes."""
    quiet = QuietMalformed(lambda: 1.0)
    error = RuntimeError("ours")
    info = (RuntimeError, error, None)
    told = [
        logging.LogRecord("aiohttp.server", logging.ERROR, "p", 1, "Unhandled", (), info)
        for _ in range(3)
    ]

    assert [True] * 3 == [quiet.filter(each) for each in told]
    assert [info] * 3 == [each.exc_info for each in told]


def test_configuring_again_leaves_one_line() -> None:
    """Setting up logging twice writes nothing twice, and cuts nothing twice."""
    configured()
    stream = configured()
    logging.getLogger("aiohttp.server").error("x", exc_info=BadHttpMessage("bad"))
    (line,) = records(stream)

    assert "malformed request: bad (0 more since the last line)" == line["event"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run a proxy, ask it in every bad way, and give what it wrote."""
    with in_thread(AdServer({"/one": an_inline()})) as server:
        config = a_config(
            {"main": server.url("/one?u={query.u}")},
            [{"path": "/ad", "upstreams": ["main"], "viewer": ["header:X-Uid"]}],
            log={"format": "json"},
        )
        with running_proxy(config, Path(tmp_path_factory.mktemp("log"))) as proxy:
            for number, text in enumerate(FORGERIES):
                value = text.encode("utf-8", "surrogateescape" if number != 5 else "replace")
                header = bytes(each for each in value if each > 31 and each != 127)
                quoted = "".join(f"%{each:02x}" for each in value)
                headers = [(name, header) for name in ("User-Agent", "X-Uid", "Referer", "Origin")]
                answer = proxy.get(f"/ad?u={quoted}&v={quoted}", headers)  # type: ignore[arg-type]
                assert 200 == answer.status
            for _ in range(5):
                proxy.get("/ad", [("Content-Length", "+5"), ("Transfer-Encoding", "x")])
        return proxy.lines


def test_every_line_of_a_proxy_is_json(lines: list[str]) -> None:
    """Every line that the proxy writes is JSON with an event, a level and a time."""
    read = [json.loads(line) for line in lines]

    assert all({"event", "level", "timestamp"} <= set(each) for each in read)
    assert "forged" not in {each["event"] for each in read}


def test_every_request_is_one_line(lines: list[str]) -> None:
    """Each ad request is one line of the access log; a flood of malformed ones is one warning."""
    events = [json.loads(line)["event"] for line in lines]

    assert len(FORGERIES) == events.count("request")
    assert 1 <= len([each for each in events if each.startswith("malformed request")]) <= 2
