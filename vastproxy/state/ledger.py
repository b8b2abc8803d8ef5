"""
The arithmetic of counters: which confirmations count now, and what one more changes.

Rule 1: everything here is told the time, in Unix milliseconds, and does no I/O.
Rule 2: memory and SQL count with these functions; ``scripts/*.lua`` say the same to Redis, and one
set of tests holds all of them.

A rolling window is kept in pieces of a thousandth of its length. A piece counts until the last
moment at which one of its confirmations could count, so the error is never towards too many ads.
"""

from dataclasses import dataclass, field

from vastproxy.state.base import PIECES, Claim, Hold, Level, Verdict, Window

FOR_EVER = 2**53 - 1
"""The end of what never ends, in Unix milliseconds."""


@dataclass(slots=True)
class Counter:
    """What stands on one counter."""

    count: int = 0
    """Confirmed, but for rolling windows."""
    began: int = 0
    """Of fixed windows and calendars: when the period of *count* began."""
    pieces: dict[int, int] = field(default_factory=dict)
    """Of rolling windows: what was confirmed in each piece, by the number of the piece."""
    held: int = 0
    """Reserved, and not confirmed yet."""
    until: int = 0
    """When the last of what was confirmed counts no more, for whoever cleans up."""

    def live(self, window: Window, now: int) -> int:
        """Give what was confirmed and still counts at *now*."""
        match window.kind:
            case "rolling":
                first = _first_piece(window, now)
                return sum(count for piece, count in self.pieces.items() if piece >= first)
            case "fixed":
                return self.count if now < self.began + window.ms else 0
            case "calendar":
                return self.count if self.began == period(window, now) else 0
            case "lifetime":
                return self.count

    def add(self, window: Window, amount: int, now: int) -> None:
        """Count *amount* at *now*."""
        if window.kind == "rolling":
            first, piece = _first_piece(window, now), now // _width(window)
            self.pieces = {at: count for at, count in self.pieces.items() if at >= first}
            self.pieces[piece] = self.pieces.get(piece, 0) + amount
            return
        if window.kind == "fixed" and now >= self.began + window.ms:
            self.began, self.count = now, 0
        elif window.kind == "calendar" and self.began != (begins := period(window, now)):
            self.began, self.count = begins, 0
        self.count += amount

    def ends(self, window: Window, now: int) -> int:
        """Give the time from which nothing that was confirmed counts any more."""
        match window.kind:
            case "rolling":
                last = max(self.pieces, default=0)
                return (last + 1) * _width(window) + window.ms
            case "fixed":
                return self.began + window.ms
            case "calendar":
                later = [each for each in window.bounds if each > now]
                return later[0] if later else now
            case "lifetime":
                return FOR_EVER


def _width(window: Window) -> int:
    return max(1, window.ms // PIECES)


def _first_piece(window: Window, now: int) -> int:
    """Give the oldest piece that counts: piece p does while ``(p + 1) * width + ms > now``."""
    return (now - window.ms) // _width(window)


def period(window: Window, now: int) -> int:
    """Give when the calendar's period of *now* began; the nearest one where *now* is beyond all."""
    earlier = [each for each in window.bounds if each <= now]
    return earlier[-1] if earlier else window.bounds[0]


def judged(hold: Hold, counters: dict[str, Counter], now: int) -> Verdict:
    """
    Say whether there is room for *hold*, where *counters* stand so at *now*.

    Lapsed reservations must have been taken off before.
    """
    over: list[int] = []
    for at, claim in enumerate(hold.claims):
        if _has_room(claim, counters.get(claim.key) or Counter(), now):
            continue
        if claim.enforced:
            return Verdict(granted=False, refused=at)
        over.append(at)
    return Verdict(granted=True, over=tuple(over))


def _has_room(claim: Claim, counter: Counter, now: int) -> bool:
    taken = counter.live(claim.window, now) + counter.held
    return claim.limit is None or taken + claim.amount <= claim.limit


def kept(hold: Hold, verdict: Verdict) -> dict[str, int]:
    """Give the amounts that a granted *hold* reserves, by the key of the counter."""
    over = set(verdict.over)
    return {each.key: each.amount for at, each in enumerate(hold.claims) if at not in over}


def repeated(hold: Hold, amounts: dict[str, int]) -> Verdict:
    """Give the verdict of a *hold* that was granted before, and reserved *amounts*."""
    over = [at for at, each in enumerate(hold.claims) if each.key not in amounts]
    return Verdict(granted=True, over=tuple(over))


def level(counter: Counter | None, claim: Claim, now: int) -> Level:
    """Tell what stands on a counter."""
    if counter is None:
        return Level()
    return Level(counter.live(claim.window, now), counter.held)


def drawn(lease: dict[str, int], hold: Hold) -> tuple[dict[str, int], bool]:
    """
    Take the claims of *hold* out of a *lease*'s reservation, as far as they are in it.

    Gives what is taken off each counter, and whether the lease had room for all of it.
    """
    taken = {each.key: min(each.amount, lease.get(each.key, 0)) for each in hold.claims}
    return taken, all(taken[each.key] == each.amount for each in hold.claims)
