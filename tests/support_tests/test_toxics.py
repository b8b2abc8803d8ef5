"""What toxics decide, without a network or a clock."""

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.toxics import SETTINGS, Lane, Toxic, parse_toxic, through
from tests.support.hostile import End, Step


def steps(text: str, *reads: bytes, waited: float = 0.0, seed: int = 0) -> list[Step]:
    """Say what the toxic called *text* does with *reads*, until one is the last."""
    lane = Lane(parse_toxic(text), Random(seed))
    done: list[Step] = []
    for data in reads:
        done += through([lane], data, waited)
        if isinstance(done[-1], End):
            break
    return done


def sent(done: list[Step]) -> bytes:
    """Give the bytes of steps."""
    return b"".join(each for each in done if isinstance(each, bytes))


def test_default() -> None:
    """A toxic that is given nothing does nothing."""
    lane = Lane(Toxic(), Random(0))

    assert [b"data"] == list(through([lane], b"data", 0.0))
    assert [b"data"] == list(through([], b"data", 0.0))


def test_latency() -> None:
    """What has waited is delayed by the rest, and not at all when its time has come."""
    assert [0.2, b"a"] == steps("latency=200ms", b"a")
    assert [pytest.approx(0.15), b"a"] == steps("latency=200ms", b"a", waited=0.05)
    assert [b"a"] == steps("latency=200ms", b"a", waited=0.3)


def test_jitter() -> None:
    """Delays are spread to both sides of the latency, and the same ones for the same seed."""
    reads = [b"a"] * 100
    delays = [each for each in steps("latency=1s,jitter=200ms", *reads) if isinstance(each, float)]

    assert 100 == len(delays)
    assert 0.8 <= min(delays) < 0.85
    assert 1.15 < max(delays) <= 1.2
    assert steps("latency=1s,jitter=200ms", *reads) == steps("latency=1s,jitter=200ms", *reads)
    assert steps("jitter=1s", *reads, seed=1) != steps("jitter=1s", *reads, seed=2)


def test_drip() -> None:
    """A drip gives single bytes, each with its pause."""
    assert [b"a", 0.05, b"b", 0.05] == steps("drip=50ms", b"ab")


def test_bandwidth() -> None:
    """Bytes take the time that the bandwidth needs for them, in small pieces."""
    done = steps("bandwidth=1000", bytes(500))
    pauses = [each for each in done if isinstance(each, float)]

    assert pytest.approx(0.5) == sum(pauses)
    assert 50 == max(len(each) for each in done if isinstance(each, bytes))


@pytest.mark.parametrize(
    ("setting", "end"),
    [
        ("close_after", End.CLOSE),
        ("half_close_after", End.HALF_CLOSE),
        ("silent_after", End.HANG),
    ],
)
def test_bounds(setting: str, end: End) -> None:
    """A bound lets as many bytes pass, over all reads, and not one more."""
    assert [b"abc", b"d", end] == steps(f"{setting}=4", b"abc", b"def", b"ghi")
    assert [b"abc", end] == steps(f"{setting}=3", b"abc")
    assert [end] == steps(f"{setting}=0", b"abc")
    assert [b"ab"] == steps(f"{setting}=3", b"ab")


def test_reset_arrives_last() -> None:
    """A reset lets what was passed on arrive before it."""
    assert [b"ab", 0.02, End.RESET] == steps("reset_after=2", b"abc")


def test_first_bound_counts() -> None:
    """Of two bounds the smaller one is reached."""
    assert [b"a", End.HANG] == steps("close_after=2,silent_after=1", b"abc")


def test_garbage() -> None:
    """Garbage goes ahead of what is passed on, as often as its chance says."""
    always = steps("garbage=3", b"abc")
    often = steps("garbage=1,chance=20%", *[b"abc"] * 1000)

    assert (3, b"abc") == (len(sent(always[:1])), always[1])
    assert steps("garbage=3", b"abc") == always
    assert 150 < len(often) - 1000 < 250


def test_lanes_in_turn() -> None:
    """Toxics work on what the ones before them give, and an end is the end of all."""
    lanes = [Lane(parse_toxic(each), Random(0)) for each in ("close_after=2", "drip=1s")]

    assert [b"a", 1.0, b"b", 1.0, End.CLOSE] == list(through(lanes, b"abc", 0.0))


HARMLESS = (
    *("latency=1ms,jitter=5ms", "slice=3", "slice=1,pause=1s", "drip=1ms"),
    *("bandwidth=10", "bandwidth=1MB,slice=7", "cut", "slow_close=1s", "drop_replies=1"),
)


@given(
    toxics=st.lists(st.sampled_from(HARMLESS), max_size=3),
    reads=st.lists(st.binary(min_size=1, max_size=200)),
    seed=st.integers(),
)
def test_nothing_is_lost(toxics: list[str], reads: list[bytes], seed: int) -> None:
    """Toxics that only take time pass every byte on, in order."""
    lanes = [Lane(parse_toxic(each), Random(seed)) for each in toxics]

    assert b"".join(reads) == sent([step for each in reads for step in through(lanes, each, 0.0)])


def test_parse() -> None:
    """A toxic is written as its settings with units, and reads back as it is shown."""
    toxic = parse_toxic("latency=200ms,jitter=0,bandwidth=1kB/s,cut,share=25%,toward=client")

    assert toxic == Toxic(latency=0.2, bandwidth=1000, cut=True, share=0.25, toward="client")
    assert toxic == parse_toxic(str(toxic))
    assert "latency=0.2s,bandwidth=1000B,cut=true,toward=client,share=0.25" == str(toxic)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_reads_back(name: str) -> None:
    """Each setting that is shown can be written like that."""
    example = {"duration": "3s", "size": "7", "number": "2", "share": "0.5", "side": "server"}
    kind = SETTINGS[name].metadata["kind"]
    toxic = parse_toxic(f"{name}={example.get(kind, 'true')}")

    assert toxic != Toxic()
    assert toxic == parse_toxic(str(toxic))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lag=1s", "'lag' is no toxic (there are: latency, "),
        ("latency=5", "latency: '5' has no unit (write 5ms, 5s or 5m)"),
        ("reset_after=x", "reset_after: 'x' is no size"),
        ("drop_replies=-1", "drop_replies: '-1' is no number"),
        ("share=2", "share: '2' is no share (write 25% or 0.25)"),
        ("toward=both sides", "toward: 'both sides' is no side (write both, server, client)"),
        ("cut=perhaps", "cut: 'perhaps' is neither true nor false"),
        ("", "'' is no toxic"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    """What is no toxic is refused with what to write instead."""
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        parse_toxic(text)
