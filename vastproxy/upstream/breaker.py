"""
A circuit breaker: an ad server that fails is left alone for a while.

pybreaker keeps the states and tells of their changes. Its own admission and counting are made for
threads that wait, and fail under asyncio without a word, so those, and the clock, are ours.

Rule 1: nothing here waits, and nothing is held while a call is under way. A caller gets a ticket
and settles it, also when the call is cut off.
Rule 2: each state has a number. A ticket of an older one is dropped, so those who began before the
breaker opened neither open it again nor keep it open.
Rule 3: one probe at a time. A neutral one gives its place back, and decides nothing.
Rule 4: time is the monotonic clock; pybreaker's dates are not looked at.
Rule 5: who listens is told when a change is complete. In pybreaker's own listeners it is not: its
storage still has the old state, and whoever asks for the state there turns the change back.
"""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn, cast

from pybreaker import (
    CircuitBreaker,
    CircuitBreakerListener,
    CircuitBreakerState,
)

from vastproxy.errors import UpstreamRefusedError
from vastproxy.observe.trace import BreakerChange
from vastproxy.upstream.window import BreakerSettings, Facts, Outcome, State

Listener = Callable[[BreakerChange], None]
"""Hears of a change. It neither waits nor raises: it is called in the middle of an ad request."""

STEADY_WINDOWS: Final = 3
"""Times in a row that the breaker stays open no longer than it is told: servers restart in
seconds, and only who is still down after that is left alone for longer."""
MAX_DOUBLINGS: Final = 32
"""Far beyond every longest time, and far below what a float can hold."""
JITTER: Final = 0.1
"""Share of the time by which it is longer or shorter, so that instances do not probe together."""
MAX_REASON: Final = 200
"""Characters of a failure's reason that are kept; an ad server may have written a part of it."""

WHOLE_SECONDS: Final = 10
"""From when on tenths of a second say nothing to a person."""
NOBODY: Final = -1
"""The number of no state."""


class Ticket:
    """
    Admission to one call, to be settled when it is over.

    *epoch* is the number of the state that gave it. *probe* says that it decides over that state.
    """

    __slots__ = ("changes", "epoch", "probe", "reason", "refused", "settled")

    def __init__(
        self,
        epoch: int,
        *,
        probe: bool = False,
        refused: str = "",
        changes: tuple[BreakerChange, ...] = (),
    ) -> None:
        self.epoch = epoch
        self.probe = probe
        self.refused = refused != ""
        """Whether the call would not have been made if the breaker did more than watch."""
        self.reason = refused
        """Why it would not, in words."""
        self.changes = changes
        """What the admission changed."""
        self.settled = False

    def __repr__(self) -> str:
        kind = "probe" if self.probe else "refused" if self.refused else "call"
        return f"<Ticket {kind}, epoch {self.epoch}{', settled' if self.settled else ''}>"


class _Notes(CircuitBreakerListener):
    """Takes down what pybreaker does, to be told when it is done."""

    def __init__(self) -> None:
        self.taken: list[tuple[State, State]] = []

    def state_change(
        self,
        cb: CircuitBreaker,  # noqa: ARG002 - the name is pybreaker's, and there is one breaker
        old_state: CircuitBreakerState | None,
        new_state: CircuitBreakerState,
    ) -> None:
        """Take down a change."""
        old = "closed" if old_state is None else old_state.name
        self.taken.append((cast("State", old), cast("State", new_state.name)))


class _FailedError(Exception):
    """What pybreaker is shown of a failed call."""


def _succeed() -> None:
    """Be a good call."""


def _fail() -> NoReturn:
    """Be a failed call."""
    raise _FailedError


# --- The breaker ---------------------------------------------------------------------------------


class UpstreamBreaker:
    """
    The breaker of the ad server, or site, called *name*.

    *clock* gives seconds that only ever grow, *random* numbers from 0 to 1. *listener* hears of
    changes, as do those added later.
    """

    def __init__(
        self,
        name: str,
        settings: BreakerSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        listener: Listener | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.held = False
        """Whether it was opened by hand, until somebody closes it."""
        self.may_probe: Callable[[], bool] = lambda: True
        """Asked at the end of the time that it is open: whether a probe may go out from here."""
        self._clock = clock
        self._random = random
        self._listeners: list[Listener] = [] if listener is None else [listener]
        self._longest = max(settings.max_reset_timeout, settings.reset_timeout)
        self._since = clock()
        self._reason = ""
        self._last_failure = ""
        self._until = self._since
        """When a probe may go out, while it is open."""
        self._openings = 0
        """Times in a row that it opened by its own rules."""
        self._left_alone_until = self._since
        """As the ad server itself asked for, since the breaker was last closed."""
        self._probe_of = NOBODY
        """The number of the state in which a probe is under way."""
        self._facts = Facts(settings, self._since)
        self._notes = _Notes()
        self._circuit = CircuitBreaker(
            fail_max=settings.fail_max,
            success_threshold=settings.success_threshold,
            state_storage=self._facts,
            listeners=[self._notes],
            name=name,
            throw_new_error_on_trip=False,
        )

    @property
    def state(self) -> State:
        """The state: open until a probe goes out, however long nobody asks."""
        return self._facts.current

    @property
    def reset_timeout(self) -> float:
        """Seconds that it stays open this time, or the next if it is not open, without jitter."""
        doublings = min(max(0, self._openings - STEADY_WINDOWS), MAX_DOUBLINGS)
        return min(self._longest, self.settings.reset_timeout * float(1 << doublings))

    def add_listener(self, listener: Listener) -> None:
        """Tell *listener* of changes from now on."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Tell *listener* no more; nothing happens if it was not told."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    # --- A call ---------------------------------------------------------------------------------

    def admit(self) -> Ticket:
        """
        Let a call through: to be settled when it is over.

        Raises UpstreamRefusedError where it may not be made.
        """
        facts = self._facts
        if facts.current == "closed":
            return Ticket(facts.epoch)
        now = self._clock()
        refused = self._refusal(now)
        if not refused:
            return self._probe(now)
        if self.settings.mode == "shadow":
            return Ticket(facts.epoch, refused=refused)
        raise UpstreamRefusedError(refused, by="breaker", of=self.name)

    def leaves_alone(self) -> bool:
        """Whether a call would certainly be refused now; nothing changes by asking."""
        if self._facts.current != "open" or self.settings.mode == "shadow":
            return False
        return self.held or self._clock() < self._until

    def _refusal(self, now: float) -> str:
        """Say why no call may be made now; empty if one may."""
        if self.state == "half-open":
            why = "a probe is under way" if self._is_probing() else ""
        elif self.held:
            why = "it stays so until somebody closes it"
        elif now < self._until:
            why = f"the next probe is in {_in_words(self._until - now)}"
        else:
            why = "" if self.may_probe() else "the next probe is another instance's"
        return f"the breaker is {self._standing(now)}; {why}" if why else ""

    def _probe(self, now: float) -> Ticket:
        if self.state == "open":
            self._circuit.half_open()
        # Before anybody is told: who listens may turn the breaker, and the probe is of this state.
        epoch = self._probe_of = self._facts.epoch
        changes = self._changed(f"after {_in_words(now - self._since)} a probe goes out", now)
        return Ticket(epoch, probe=True, changes=changes)

    def _is_probing(self) -> bool:
        return self._probe_of == self._facts.epoch

    def settle(
        self,
        ticket: Ticket,
        outcome: Outcome,
        *,
        seconds: float = 0.0,
        reason: str = "",
        retry_after: float | None = None,
    ) -> tuple[BreakerChange, ...]:
        """
        Say what came of the call that *ticket* let through; give what that changed.

        It took *seconds*. *reason* is why it failed, *retry_after* the seconds for which the ad
        server then asked to be left alone. Only the first settlement of a ticket counts.
        """
        if ticket.settled:
            return ()
        ticket.settled = True
        if ticket.refused or ticket.epoch != self._facts.epoch:
            return ()
        if ticket.probe:
            self._probe_of = NOBODY
        slow_call = self.settings.slow_call
        slow = slow_call is not None and seconds >= slow_call
        if outcome == "neutral" and not slow:
            return ()
        now = self._clock()
        if outcome == "failed":
            self._note_failure(reason, retry_after, now)
        if ticket.probe:
            if outcome == "ok" and not slow:
                return self._probe_was_good(now)
            slowly = f"took {_in_words(seconds)}"
            return self._probe_was_bad(self._failure() if outcome == "failed" else slowly, now)
        return self._counted(outcome, now, slow=slow)

    def _note_failure(self, reason: str, retry_after: float | None, now: float) -> None:
        self._last_failure = reason[:MAX_REASON]
        if retry_after is not None and retry_after > 0:
            self._left_alone_until = max(self._left_alone_until, now + retry_after)

    def _probe_was_good(self, now: float) -> tuple[BreakerChange, ...]:
        self._circuit.call(_succeed)
        good = self.settings.success_threshold
        return self._changed("a good probe" if good == 1 else f"{good} good probes", now)

    def _probe_was_bad(self, how: str, now: float) -> tuple[BreakerChange, ...]:
        """Open it again after a probe that failed, or was slow."""
        self._call_failed()
        self._leave_alone(now)
        return self._changed(f"the probe {how}", now)

    def _failure(self) -> str:
        return f"failed: {self._last_failure}" if self._last_failure else "failed"

    def _counted(self, outcome: Outcome, now: float, *, slow: bool) -> tuple[BreakerChange, ...]:
        """Take the outcome of a call that a closed breaker let through."""
        facts = self._facts
        facts.window.add(now, outcome, slow=slow)
        if outcome == "failed":
            self._call_failed()
        else:
            if outcome == "ok":
                facts.in_a_row = 0
            troubled = facts.window.total.failures or facts.window.total.slow
            if troubled and facts.broken_rule():
                # pybreaker looks at its counter after failures only.
                self._circuit.open()
        if not self._notes.taken:
            return ()
        self._leave_alone(now)
        return self._changed(self._why_opened(), now)

    def _call_failed(self) -> None:
        with suppress(_FailedError):
            self._circuit.call(_fail)

    def _leave_alone(self, now: float) -> None:
        """Set when the next probe may go out."""
        self._openings += 1
        usual = self.reset_timeout * (1 + JITTER * (2 * self._random() - 1))
        self._until = now + max(usual, min(self._longest, self._left_alone_until - now))

    def _why_opened(self) -> str:
        settings, total = self.settings, self._facts.window.total
        within = f"within {_in_words(settings.window)}"
        last = f", the last: {self._last_failure}" if self._last_failure else ""
        match self._facts.broken_rule():
            case "in_a_row":
                return f"{_failures(self._facts.in_a_row)} in a row{last}"
            case "failures":
                return f"{total.failures} of {total.calls} calls failed {within}{last}"
            case _:
                limit = _in_words(settings.slow_call or 0.0)
                timed = total.calls + total.cut_off
                return f"{total.slow} of {timed} calls took {limit} or longer {within}"

    # --- By hand, or by another instance --------------------------------------------------------

    def open(self, reason: str, seconds: float | None = None) -> tuple[BreakerChange, ...]:
        """
        Open it for *seconds*; None: until it is closed or reset, whatever time passes.

        What is held open so is not changed by an opening for some seconds.
        """
        if self.held and seconds is not None:
            return ()
        now = self._clock()
        self.held = seconds is None
        if seconds is not None:
            self._until = now + seconds
        if self.state == "open":
            self._reason = reason
        else:
            self._circuit.open()
        return self._changed(reason, now)

    def close(self, reason: str) -> tuple[BreakerChange, ...]:
        """Close it. One that is closed stays as it is."""
        if self.state != "closed":
            self._circuit.close()
        return self._changed(reason, self._clock())

    def reset(self) -> tuple[BreakerChange, ...]:
        """Close it and forget everything: also the calls that are under way."""
        if self.state != "closed":
            return self.close("reset by hand")
        self._facts.reset_counter()
        self._facts.epoch += 1
        self._forget()
        return ()

    def _changed(self, reason: str, now: float) -> tuple[BreakerChange, ...]:
        """Take over what pybreaker has done, if anything, and tell of it."""
        if not self._notes.taken:
            return ()
        old, new = self._notes.taken.pop()
        self._since, self._reason = now, reason
        if new == "closed":
            self._forget()
        change = BreakerChange(self.name, old, new, reason)
        for listener in tuple(self._listeners):
            listener(change)
        return (change,)

    def _forget(self) -> None:
        """Begin anew, as far as pybreaker does not see to that."""
        self.held = False
        self._openings = 0
        self._left_alone_until = self._clock()

    # --- For people -----------------------------------------------------------------------------

    def told(self) -> dict[str, object]:
        """Say all there is to say, in values that JSON knows."""
        now = self._clock()
        window = self._facts.window
        window.turn(now)
        total, waiting = window.total, self.state == "open" and not self.held
        return {
            "state": self.state,
            "since_seconds": round(now - self._since, 3),
            "reason": self._reason,
            "held": self.held,
            "mode": self.settings.mode,
            "failures_in_a_row": self._facts.in_a_row,
            "window": {
                "seconds": self.settings.window,
                "calls": total.calls,
                "failures": total.failures,
                "slow": total.slow,
                "cut_off": total.cut_off,
            },
            "retry_in_seconds": round(max(0.0, self._until - now), 3) if waiting else None,
            "reset_timeout": self.reset_timeout,
            "probing": self._is_probing(),
        }

    def _standing(self, now: float) -> str:
        because = f": {self._reason}" if self._reason else ""
        return f"{self.state} since {_in_words(now - self._since)}{because}"

    def __repr__(self) -> str:
        shadow = ", shadow" if self.settings.mode == "shadow" else ""
        if self.state == "closed":
            return f"<Breaker {self.name} closed, {_failures(self._facts.in_a_row)}{shadow}>"
        how = ", held" if self.held else ", probing" if self._is_probing() else ""
        return f"<Breaker {self.name} {self._standing(self._clock())}{how}{shadow}>"


def _failures(number: int) -> str:
    return "1 failure" if number == 1 else f"{number} failures"


def _in_words(seconds: float) -> str:
    """Give *seconds* as a person would say them."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.0f} s" if seconds >= WHOLE_SECONDS else f"{round(seconds, 1):g} s"
