"""What stands around every call: a bound, a rate, a breaker, and repetitions within a budget."""

import asyncio

import pytest

from tests.support.calls import BAD, GOOD, Scripted, Told, by, failures
from vastproxy.errors import (
    UpstreamConnectError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamTimeoutError,
)
from vastproxy.upstream.guard import (
    Crowd,
    Guard,
    GuardSettings,
    RetryBudget,
    how_often,
    latencies,
)
from vastproxy.upstream.limiter import LocalRate
from vastproxy.upstream.window import BreakerSettings


async def test_breaker_opens() -> None:
    """After so many failures in a row nobody is asked any more, and the trace says so."""
    server, told = Scripted([BAD]), Told()
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=3)), telling=told)

    await failures(guard, server, 3)

    assert "breaker" == await by(lambda: guard.ask(server.call()))
    assert 3 == server.asked
    assert [("closed", "open")] == [(each.old, each.new) for each in server.trace.changes]
    assert [("main", "failed")] * 3 + [("main", "breaker")] == told.calls


async def test_replies_go_through() -> None:
    """A reply is given back, whatever its status: what it means is for others to say."""
    guard = Guard("main", GuardSettings(BreakerSettings()))

    assert BAD == await guard.ask(Scripted([BAD]).call())
    assert GOOD == await guard.ask(Scripted([GOOD]).call())


async def test_cut_off_calls() -> None:
    """Calls that are cut off are nobody's failure, and free their places."""
    server = Scripted([GOOD], go=asyncio.Event())
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1), max_in_flight=100))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(guard.ask(server.call())) for _ in range(100)]
        await asyncio.sleep(0)
        for each in tasks:
            each.cancel()

    assert 0 == guard.in_flight
    assert 100 == guard.calls["neutral"]
    assert "closed" == guard.breaker.state if guard.breaker else False


async def test_starved_calls() -> None:
    """Who had no fair time to answer has not failed."""
    server = Scripted([UpstreamTimeoutError("silent")])
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1)))

    with pytest.raises(UpstreamTimeoutError):
        await guard.ask(server.call(fair=False))

    assert 1 == guard.calls["neutral"]


async def test_bound() -> None:
    """Beyond the bound a call is refused at once, and not counted against the ad server."""
    server = Scripted([GOOD], go=asyncio.Event())
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1), max_in_flight=2))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(guard.ask(server.call())) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await by(lambda: guard.ask(server.call()))
        assert server.go is not None
        server.go.set()

    assert "busy" == refused
    assert [GOOD, GOOD] == [each.result() for each in tasks]
    assert GOOD == await guard.ask(server.call())


async def test_rate() -> None:
    """Beyond its rate an upstream is not asked, and its breaker knows nothing of it."""
    server = Scripted([GOOD])
    guard = Guard("main", GuardSettings(), rate=LocalRate(0.001, 2))

    await guard.ask(server.call())
    await guard.ask(server.call())

    assert "rate_limit" == await by(lambda: guard.ask(server.call()))
    assert 2 == server.asked


class SlowRate:
    """Counts the turns, and gives each after a while."""

    rate, burst, refused, shared = 1.0, 1, 0, True

    def __init__(self) -> None:
        self.taken = 0
        self.go = asyncio.Event()

    async def take(self) -> bool:
        """Wait, as for a server far away."""
        self.taken += 1
        await self.go.wait()
        return True


async def test_bound_while_waiting_for_turns() -> None:
    """Who waits for a turn is under way: a crowd does not pass the bound meanwhile."""
    rate = SlowRate()
    guard = Guard("main", GuardSettings(max_in_flight=3), rate=rate)
    server = Scripted([GOOD])

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(by_or_reply(guard, server)) for _ in range(50)]
        await asyncio.sleep(0)
        rate.go.set()

    assert (3, 47) == (server.asked, sum(each.result() == "busy" for each in tasks))
    assert 0 == guard.in_flight


async def by_or_reply(guard: Guard, server: Scripted) -> str:
    """Ask, and say what came, or by what it was refused."""
    try:
        return str((await guard.ask(server.call())).status)
    except UpstreamRefusedError as error:
        return error.by


async def test_open_breaker_takes_no_turns() -> None:
    """While the breaker is open, no turn of the rate is taken for calls that are not made."""
    rate = SlowRate()
    rate.go.set()
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1)), rate=rate)
    server = Scripted([BAD])
    await failures(guard, server, 100)

    assert (1, 1) == (rate.taken, server.asked)


async def test_refusal_names_its_guard() -> None:
    """Who refuses is named: a redirect's target may be another than the upstream."""
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1)))
    await failures(guard, server := Scripted([BAD]), 1)

    with pytest.raises(UpstreamRefusedError) as caught:
        await guard.ask(server.call())

    assert "main" == caught.value.of


async def test_names_that_are_made_up() -> None:
    """A name that does not exist is no failure where a stranger named it."""
    server = Scripted([UpstreamConnectError("no such name", unknown=True)])
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1)))

    with pytest.raises(UpstreamConnectError):
        await guard.ask(server.call(made_up=True))
    assert 1 == guard.calls["neutral"]
    with pytest.raises(UpstreamConnectError):
        await guard.ask(server.call())
    assert 1 == guard.calls["failed"]


async def test_late_time_out() -> None:
    """A time-out that was noticed late says nothing: the answer may have been there."""
    server = Scripted([UpstreamTimeoutError("silent", late=True)])
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1)))

    with pytest.raises(UpstreamTimeoutError):
        await guard.ask(server.call())

    assert 1 == guard.calls["neutral"]


async def test_one_failure_of_a_site_for_a_request() -> None:
    """A pod that names a site often is one failure of it, so nobody opens another's breaker."""
    guard = Guard("victim.com", GuardSettings(BreakerSettings(fail_max=2)), hops=Crowd())
    server = Scripted([BAD])
    for _ in range(20):
        await guard.ask(server.call())

    assert (20, 1, 19) == (server.asked, guard.calls["failed"], guard.calls["neutral"])


# --- Repetitions ----------------------------------------------------------------------------------


async def test_again() -> None:
    """Where nothing was sent, a call goes out once more."""
    server, told = Scripted([UpstreamConnectError("refused"), GOOD]), Told()
    guard = Guard("main", GuardSettings(attempts=1), telling=told)

    assert GOOD == await guard.ask(server.call())
    assert ["main"] == told.again


@pytest.mark.parametrize("kind", [UpstreamError, UpstreamTimeoutError])
async def test_not_again(kind: type[UpstreamError]) -> None:
    """What may have been sent is not sent again."""
    server = Scripted([kind("why"), GOOD])
    guard = Guard("main", GuardSettings(attempts=3))

    with pytest.raises(kind):
        await guard.ask(server.call())

    assert 1 == server.asked


async def test_not_again_here() -> None:
    """What failed for want of something here would fail again."""
    server = Scripted([UpstreamConnectError("no sockets", local=True), GOOD])
    guard = Guard("main", GuardSettings(attempts=3))

    with pytest.raises(UpstreamConnectError):
        await guard.ask(server.call())

    assert 1 == server.asked


async def test_not_again_late() -> None:
    """Without a fair time left nothing goes out again."""
    server = Scripted([UpstreamConnectError("refused"), GOOD])
    guard = Guard("main", GuardSettings(attempts=3))

    with pytest.raises(UpstreamConnectError):
        await guard.ask(server.call(fair=False))

    assert 1 == server.asked


async def test_outage_is_not_doubled() -> None:
    """In an outage the repetitions are a share of the calls, and no more."""
    server = Scripted([UpstreamConnectError("refused")])
    guard = Guard("main", GuardSettings(attempts=1, retry_share=0.1))

    await failures(guard, server, 1000)

    assert 1000 + 101 >= server.asked >= 1000 + 99


def test_retry_budget() -> None:
    """Quiet times save up a few repetitions, not any number of them."""
    budget = RetryBudget(0.5)
    for _ in range(1000):
        budget.save()

    assert [True] * 10 + [False] == [budget.spend() for _ in range(11)]


def test_no_retry_budget() -> None:
    """With a share of nothing there is no repetition."""
    assert not RetryBudget(0.0).spend()


async def test_refused_calls_save_nothing() -> None:
    """Calls that are not made allow no repetitions."""
    server = Scripted([UpstreamConnectError("refused")])
    guard = Guard("main", GuardSettings(attempts=1), rate=LocalRate(0.001, 10))

    await failures(guard, server, 1000)

    assert (10, 1) == (server.asked, guard.calls["retried"])


async def test_refused_repetition() -> None:
    """Where a repetition is refused, the failure is told, and not the refusal."""
    server = Scripted([UpstreamConnectError("refused")])
    guard = Guard("main", GuardSettings(attempts=1), rate=LocalRate(0.001, 1))

    with pytest.raises(UpstreamConnectError):
        await guard.ask(server.call())


async def test_shadow_repeats_as_usual() -> None:
    """A breaker that only watches keeps no repetition from being made."""
    server = Scripted([UpstreamConnectError("refused")])
    breaker = BreakerSettings(mode="shadow", fail_max=1)
    guard = Guard("main", GuardSettings(breaker, attempts=1, retry_share=1.0))

    await failures(guard, server, 20)

    assert (40, 20) == (server.asked, guard.calls["retried"])


async def test_again_ends_at_the_breaker() -> None:
    """Where the failure opened the breaker, it is the failure that is told."""
    server = Scripted([UpstreamConnectError("refused")])
    guard = Guard("main", GuardSettings(BreakerSettings(fail_max=1), attempts=1))

    with pytest.raises(UpstreamConnectError):
        await guard.ask(server.call())

    assert 1 == server.asked


def test_latencies() -> None:
    """Times are told as percentiles, in milliseconds; of no call nothing is told."""
    assert None is latencies([])
    assert {"p50": 20.0, "p90": 20.0, "p99": 20.0, "calls": 1} == latencies([0.02])
    hundred = latencies([each / 1000 for each in range(101)])
    assert {"p50": 50.0, "p90": 90.0, "p99": 99.0, "calls": 101} == hundred


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("100 times a second", 100.0),
        ("1.5 times a second", 1.5),
        ("1000000 times a second", 1e6),
        ("once a second", 1.0),
        ("once in 1.02 s", 59 / 60),
        ("once in 60 s", 1 / 60),
        ("once in 14400 s", 1 / 14400),
    ],
)
def test_rates_are_told_in_words(words: str, rate: float) -> None:
    """How often somebody may be asked is said as a person would."""
    assert words == how_often(rate)
