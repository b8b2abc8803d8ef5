"""The benchmark's decisions: documents, accounting, checks and the table. Nothing is timed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lxml import etree

from benchmarks.__main__ import busy, failed
from benchmarks.accounting import (
    Clock,
    Sample,
    Spread,
    Usage,
    paired_ratios,
    parse_stat,
    spread,
)
from benchmarks.checks import fault_of_json, fault_of_last, fault_of_merged
from benchmarks.documents import LEVELS, SMALLEST, chain, impression_prefix
from benchmarks.load import Head, Plan, Target, parse_head, plan_from_json
from benchmarks.programs import Floor, Peer, Place, Vastproxy, config, programs
from benchmarks.rig import Upstream
from benchmarks.runner import Reading, sample
from benchmarks.table import HEADINGS, Row, render
from benchmarks.upstream import Shelf, reply

HOPS = (
    "http://127.0.0.1:40001/node-shipped/first",
    "http://127.0.0.1:40002/node-shipped/second",
    "http://127.0.0.1:40003/node-shipped/third",
)
PLACE = Place(port=40000, hops=HOPS, folder=Path("out"))
SAMPLE = Sample(cpu=0.5, running=1.0, good=1000, bad=0, connections=10, rss=40 * 2**20)


def merged(levels: tuple[str, ...]) -> bytes:
    """Build an InLine ad with the impressions of *levels*."""
    impressions = "".join(
        f"<Impression><![CDATA[ {impression_prefix(level)}id=1 ]]></Impression>" for level in levels
    )
    return f"<VAST><Ad><InLine>{impressions}</InLine></Ad></VAST>".encode()


def resolved(levels: tuple[str, ...], media: list[str]) -> bytes:
    """Build what vast-client makes of a chain, with the impressions of *levels*."""
    urls = [{"id": level, "url": f"{impression_prefix(level)}id=1"} for level in levels]
    ad = {"impressionURLTemplates": urls, "creatives": [{"mediaFiles": media}]}
    return json.dumps({"ads": [ad]}).encode()


@pytest.mark.parametrize("kilobytes", [SMALLEST, 6, 15])
def test_every_document_has_the_size_asked_for(kilobytes: int) -> None:
    """All three documents have exactly the bytes that were asked for."""
    sizes = [len(each.body) for each in chain(kilobytes * 1000, HOPS)]

    assert [kilobytes * 1000] * 3 == sizes


def test_a_size_that_cannot_hold_an_ad_is_refused() -> None:
    """A document smaller than its own elements is an error, not a bigger document."""
    with pytest.raises(ValueError, match="bytes at least"):
        chain(500, HOPS)


def test_documents_chain() -> None:
    """Two wrappers name the next hop, with a macro; the third document is an InLine ad."""
    first, second, third = (etree.fromstring(each.body) for each in chain(6000, HOPS))
    tags = [root.findtext("Ad/Wrapper/VASTAdTagURI") or "" for root in (first, second)]

    assert [HOPS[1], HOPS[2]] == [tag.partition("?")[0] for tag in tags]
    assert all("cb=[CACHEBUSTING]" in tag for tag in tags)
    assert third.find("Ad/InLine/Creatives/Creative/Linear/MediaFiles/MediaFile") is not None


def test_a_larger_document_has_more_tracking() -> None:
    """A document grows by tracking events, as it does in the field."""
    small, large = (
        len(etree.fromstring(chain(size, HOPS)[0].body).findall(".//Tracking"))
        for size in (2000, 15000)
    )

    assert large > 5 * small


def test_two_hops_set_a_cookie() -> None:
    """The first two hops set one cookie each, of different names; the third sets none."""
    names = [each.cookie.partition("=")[0] for each in chain(6000, HOPS)]

    assert ["first_uid", "second_uid", ""] == names


def test_a_line_of_stat_is_read() -> None:
    """Time in user and kernel mode are added up; memory is given in bytes."""
    line = "42 (python) S 1 42 42 0 -1 4194304 9 0 1 0 250 50 0 0 20 0 1 0 157 3133440 406 18446"

    assert Usage(cpu=3.0, rss=406 * 4096) == parse_stat(line, Clock(ticks=100, page=4096))


def test_a_command_may_be_named_anything() -> None:
    """Blanks and parentheses in a command's name do not shift the fields."""
    line = "42 (a b) S (c) R 1 42 42 0 -1 41 9 0 1 0 100 0 0 0 20 0 1 0 157 3133440 2 18446"

    assert Usage(cpu=1.0, rss=8192) == parse_stat(line, Clock(ticks=100, page=4096))


def test_usage_of_a_family_adds_up() -> None:
    """Time and memory of a program are those of all its processes."""
    assert Usage(3.0, 30) == Usage(1.0, 10) + Usage(2.0, 20)


def test_a_sample_is_the_difference_of_two_readings() -> None:
    """Counters that only grow become what happened between; memory is what it is now."""
    before = Reading(Usage(cpu=1.0, rss=10), good=100, bad=1, connections=48)
    after = Reading(Usage(cpu=1.5, rss=30), good=1100, bad=3, connections=58)

    assert Sample(cpu=0.5, running=0.7, good=1000, bad=2, connections=10, rss=30) == sample(
        before, after, running=0.7
    )


def test_figures_per_request() -> None:
    """Figures are taken over good answers and over the time in which the program ran."""
    assert 500 == SAMPLE.micros
    assert 1000 == SAMPLE.rate
    assert 0.5 == SAMPLE.busy
    assert 0.01 == SAMPLE.connections_per_request


def test_a_program_that_answered_nothing_has_no_finite_cost() -> None:
    """Without a good answer, cost and connections per request are infinite."""
    nothing = replace(SAMPLE, good=0, running=0.0)

    assert float("inf") == nothing.micros
    assert float("inf") == nothing.connections_per_request
    assert 0 == nothing.rate
    assert 0 == nothing.busy


def test_spread_is_median_and_extremes() -> None:
    """One wild figure moves an extreme, and not the middle."""
    assert Spread(middle=2, least=1, most=90) == spread([2, 90, 1])


def test_ratios_are_made_within_a_round() -> None:
    """A round in which the machine was slower for all leaves the ratio as it is."""
    floor = [SAMPLE, replace(SAMPLE, cpu=1.0)]
    twice = [replace(SAMPLE, cpu=1.0), replace(SAMPLE, cpu=2.0)]

    assert Spread(2, 2, 2) == paired_ratios(twice, floor)


def test_table_has_a_line_for_each_row() -> None:
    """A row tells median and extremes, ratio, rate, connections, memory and errors."""
    rows = [
        Row("floor", 6, (SAMPLE, SAMPLE)),
        Row("proxy", 6, (replace(SAMPLE, cpu=1.0, bad=1), replace(SAMPLE, cpu=1.2))),
    ]
    lines = render(rows, "floor").splitlines()

    assert 4 == len(lines)
    assert {len(HEADINGS) + 1} == {line.count("|") for line in lines}
    assert (
        "| floor | 6 KB | 500 [500-500] | 1.00 [1.00-1.00] | 1000 | 0.0100 | 40 | 0 |" == lines[2]
    )
    assert "| proxy | 6 KB | 1100 [1000-1200] | 2.20 [2.00-2.40]" in lines[3]
    assert lines[3].endswith("| 1 |")


def test_ratios_are_to_the_floor_of_the_same_size() -> None:
    """Each document size has a floor of its own; without one there is no ratio."""
    half = replace(SAMPLE, cpu=0.25)
    rows = [Row("floor", 2, (half,)), Row("proxy", 2, (SAMPLE,)), Row("proxy", 6, (SAMPLE,))]
    lines = render(rows, "floor").splitlines()

    assert "2.00 [2.00-2.00]" in lines[3]
    assert "| proxy | 6 KB | 500 [500-500] | - |" in lines[4]


def test_a_skipped_program_says_why() -> None:
    """A program without samples keeps its row, and a reason cannot break the table."""
    line = render([Row("peer", 6, skipped="a|b")], "floor").splitlines()[2]

    assert line.startswith(r"| peer | 6 KB | a\|b |")
    assert len(HEADINGS) + 1 == line.replace(r"\|", "").count("|")


def test_a_run_fails_with_the_floor_or_the_proxy_only() -> None:
    """A broken peer, or one that is not there, is no failure of the run."""
    assert failed([Row("vastproxy", 6, skipped="did not start", broken=True)])
    assert failed([Row("floor", 6, skipped="wrong answer", broken=True)])
    assert not failed([Row(programs()[2].name, 6, skipped="wrong answer", broken=True)])
    assert not failed([Row("vastproxy", 6, (SAMPLE,))])


def test_idle_turns_are_told() -> None:
    """The share of its turns that a program worked for is told, where there is one."""
    assert "On the processor for 50% to 90% of their turns." == busy(
        [Row("floor", 6, (SAMPLE, replace(SAMPLE, cpu=0.9)))]
    )
    assert "Nothing was measured." == busy([])


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        ("", merged(LEVELS)),
        ("no InLine", b"<VAST/>"),
        ("a Wrapper is left", b"<VAST><Ad><InLine/></Ad><Ad><Wrapper/></Ad></VAST>"),
        ("the impression of the second level is missing", merged(("first", "third"))),
    ],
)
def test_a_merged_answer_is_looked_at(fault: str, body: bytes) -> None:
    """A merged answer has an InLine ad, no wrapper, and the impressions of all levels."""
    assert fault == fault_of_merged(body)


def test_an_answer_that_is_no_xml_is_a_fault() -> None:
    """A body that cannot be parsed is told as such."""
    assert fault_of_merged(b"busy").startswith("no XML")


def test_the_floor_hands_out_the_last_document() -> None:
    """The floor's answer is the InLine document as it came; a wrapper is none."""
    first, _, third = chain(6000, HOPS)

    assert "" == fault_of_last(third.body)
    assert "no InLine" == fault_of_last(first.body)


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        ("", resolved(LEVELS, ["a.mp4"])),
        ("no JSON with ads", b"[]"),
        ("no JSON with ads", b"oops"),
        ("no ad with media files", b'{"ads": []}'),
        ("no ad with media files", resolved(LEVELS, [])),
        ("the impression of the first level is missing", resolved(LEVELS[1:], ["a.mp4"])),
    ],
)
def test_an_answer_in_json_is_looked_at(fault: str, body: bytes) -> None:
    """The peer's answer has an ad with media and the impressions of all levels."""
    assert fault == fault_of_json(body)


def test_heads_are_read() -> None:
    """Status and length are found whatever the case of the header's name."""
    assert Head(200, 12) == parse_head(b"HTTP/1.1 200 OK\r\nX: 1\r\ncontent-length: 12")
    assert Head(502, 0) == parse_head(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length:0")
    assert parse_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked") is None


def test_a_plan_survives_its_journey() -> None:
    """What the load generator reads is what the runner meant."""
    plan = Plan("/vast", 16, (Target("floor", 40000, 4800),))

    assert plan == plan_from_json(plan.to_json())


def test_replies_are_whole_http_answers() -> None:
    """A document goes out with its length, and its cookie where it sets one."""
    first, _, third = chain(2000, HOPS)

    assert Head(200, 2000) == parse_head(reply(third).partition(b"\r\n\r\n")[0])
    assert b"\r\nSet-Cookie: first_uid=" in reply(first)
    assert b"Set-Cookie" not in reply(third)


def test_each_program_has_paths_of_its_own() -> None:
    """The upstream keeps one chain for each tag, whose hops stay under that tag."""
    shelf = Shelf(("floor", "vastproxy"))
    shelf.fill(2000, (40001, 40002, 40003))
    answer = shelf.answer(b"/vastproxy/first")

    assert answer is not None
    assert b"http://127.0.0.1:40002/vastproxy/second" in answer.raw
    assert shelf.counts["vastproxy"] is answer.count
    assert shelf.answer(b"/elsewhere/first") is None
    assert HOPS == Upstream((40001, 40002, 40003)).hops("node-shipped")


def test_programs_are_told_where_the_chain_is() -> None:
    """The floor is given all hops; the peer only the first, as a resolver is."""
    floor = Floor().command(PLACE)
    peer = Peer("peer", "peer", "agent").command(PLACE)

    assert all(any(part.startswith(hop) for part in floor) for hop in HOPS)
    assert ["40000", f"{HOPS[0]}?cb=1", "agent"] == peer[2:]


def test_vastproxy_is_configured_for_its_place(tmp_path: Path) -> None:
    """The config has one route that resolves, and lets hops reach loopback's ports."""
    command = Vastproxy().command(replace(PLACE, folder=tmp_path))
    written = (tmp_path / "config.yaml").read_text(encoding="utf-8")

    assert ["serve", "-c", str(tmp_path / "config.yaml")] == command[-3:]
    assert f"endpoint: {HOPS[0]}" in written
    assert {"allow": ["127.0.0.0/8"], "ports": [40001, 40002, 40003]} == config(PLACE)["egress"]
    assert {"listen": "127.0.0.1:40000", "admin": None} == config(PLACE)["server"]
