"""
Follow chains of wrappers, without doing any I/O.

Rule 1: everything that decides whether a chain goes on, and what stands in for a failed one,
lives in this file. It knows no fetcher, no clock and no config.
Rule 2: loops are judged per chain, by its own ancestors. Two slots of a pod may name the same
URL, and both are asked for (docs/vast.md).
Rule 3: a failure is reported once, with one code, to every wrapper above it, its own included.
A wrapper whose ads have all failed was told by each of them, and is not told again.
Rule 4: nothing here recurses over the width of a document; depth is bounded by the wrapper limit.

The caller's loop: ask :meth:`Unwrapper.wanted` for the hops to make, answer each with
:meth:`Unwrapper.feed` or :meth:`Unwrapper.fail` in any order, and take :meth:`Unwrapper.result`
when no want is open. Whoever judges ads themselves (a frequency cap, a budget) takes those that
may not be played out of a result by :meth:`Unwrapper.refuse`, and goes on with the loop.

A document makes a *group*: its pod, or its buffet of stand-alone ads. A group has *slots*, one
for each ad that is to be played; in a slot one candidate after another is tried.
"""

import re
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from vastproxy.vast.codes import VastCode
from vastproxy.vast.document import Ad, VastDocument, child, children, text_of
from vastproxy.vast.links import joined

MAX_WRAPPERS = 5
"""VAST 4.3 section 2.3.5.1: players need to accept five wrappers before an InLine."""

MAX_FETCHES = 100
"""Documents fetched for one ad request: a pod of ten ads behind ten different chains of five,
twice. A tree that asks for more is an attack or a mistake."""

MAX_REPORTED = 200
"""
Error URIs told of failures for one ad request: a pod of ten ads, each behind five wrappers with
four. What a document may ask for beyond would make the proxy a lever against somebody else.
"""

MAX_CATEGORIES = 500
"""Category codes read from one level. The IAB's content taxonomy has some hundreds in all."""

_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a route says about chains."""

    max_wrappers: int = MAX_WRAPPERS
    max_fetches: int = MAX_FETCHES
    standalone_ads: int = 1
    """How many ads of a buffet are wanted."""
    strict: bool = False
    """Read ``allowMultipleAds="false"`` to the letter: a lone ad with a sequence is no ad."""


@dataclass(frozen=True, slots=True)
class ResolvedAd:
    """
    An InLine that can be played, and the wrappers that led to it, outermost first.

    A pod's are made anew for each result. What finds an ad of one result in the next is *inline*,
    which is equal to itself alone; *sequence* changes when an ad before it is refused.
    """

    inline: Ad
    wrappers: tuple[Ad, ...]
    sequence: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """A failure to be told to *uris*: macros as they are, each as often as it stands there."""

    code: int
    uris: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """What came of a chain, or of a tree of them."""

    entry: VastDocument
    ads: tuple[ResolvedAd, ...]
    reports: tuple[Report, ...]
    unreported: int = 0
    """At least so many URIs are not in the reports: there were more than MAX_REPORTED."""
    refused: tuple[str, ...] = ()
    """Why ads that came out were refused, one reason for each."""

    @property
    def is_entry_alone(self) -> bool:
        """Whether every ad stood in the entry document itself, behind no wrapper."""
        return all(ad.inline.document is self.entry for ad in self.ads)


@dataclass(eq=False, slots=True)
class Want:
    """A hop that somebody has to make: a wrapper's next document."""

    ad: Ad
    url: str
    """Absolute; macros and everything else as the ad server wrote it."""
    depth: int
    """How many wrappers lead here, this one included: 1 for the first."""
    group: "_Group"
    slot: "_Slot"
    blocked: tuple[tuple[str | None, str], ...]
    """The categories that wrappers so far forbid: authority and code."""

    @property
    def parent(self) -> "Want | None":
        """The wrapper above, or None where the entry document named this one."""
        return self.group.parent

    @property
    def blocked_categories(self) -> tuple[str, ...]:
        """Fill ``[BLOCKEDADCATEGORIES]`` with these."""
        return tuple(code for _, code in self.blocked)

    def __repr__(self) -> str:
        return f"<Want {self.depth} {self.url}>"


@dataclass(eq=False, slots=True)
class _Slot:
    """A place for one ad (or for the pod that a wrapper in it turns out to hold)."""

    need: int
    candidate: Ad | None = None
    resolved: "ResolvedAd | _Group | None" = None
    open: bool = True
    stands_in: int = 0
    """The number of the stand-alone ad that stands in here; 0 for the slot's own ad."""


@dataclass(eq=False, slots=True)
class _Group:
    """What one document offers, cut down to what the wrapper above it allows."""

    document: VastDocument
    parent: Want | None
    url: str
    is_pod: bool = False
    only_first: bool = False
    slots: list[_Slot] = field(default_factory=list)
    spare: deque[Ad] = field(default_factory=deque)
    taken: int = 0
    """How many of the spare ads have been tried."""
    good: int = 0
    """How many slots hold an ad of this very document: while one does, nothing above changes."""
    _errors: list[str] | None = None

    @property
    def errors(self) -> list[str]:
        """The error URIs of the document's root: read once, for thousands of ads may need them."""
        if self._errors is None:
            self._errors = self.document.errors
        return self._errors


class Unwrapper:
    """
    The state of one tree of wrappers.

    *entry* is the first document, *url* where it came from (the base of relative addresses, and
    the head of every chain), *policy* what the route allows.
    """

    def __init__(self, entry: VastDocument, url: str = "", policy: Policy | None = None) -> None:
        self._policy = policy or Policy()
        self._entry = entry
        self._entry_url = url
        self._asked: list[Want] = []
        self._open: set[Want] = set()
        self._fetches = 0
        self._reports: list[Report] = []
        self._reported = 0
        self._unreported = 0
        self._stopped = False
        self._refused: list[str] = []
        self._places: dict[Ad, tuple[_Group, _Slot]] = {}
        """Where each InLine stands that can be played."""
        self._root = self._grouped(entry, url, None, self._policy.standalone_ads)

    def wanted(self) -> tuple[Want, ...]:
        """Give the hops to make now; each is given once."""
        asked, self._asked = tuple(self._asked), []
        return asked

    @property
    def is_done(self) -> bool:
        """Whether no hop is open any more."""
        return not self._open

    def feed(self, want: Want, document: VastDocument, url: str) -> None:
        """Take the *document* that *want* led to, and the *url* it finally came from."""
        self._open.discard(want)
        need = want.slot.need
        group = self._grouped(document, url, want, need)
        if group.slots:
            want.slot.resolved = group
            self._settle(want)
            return
        self._report(VastCode.NO_AD, "no ad in the answer", want, document.errors)
        self._give_up(want)

    def fail(self, want: Want, code: int, reason: str) -> None:
        """Take it that *want* led nowhere: a VAST *code*, and a *reason* in words."""
        self._open.discard(want)
        self._report(code, reason, want)
        self._give_up(want)

    def refuse(self, ad: ResolvedAd, code: int, reason: str) -> None:
        """
        Take *ad* out of the result: a VAST *code*, and a *reason* in words.

        It is told to its own errors and to those of every wrapper above, and never comes back.
        What stands in is chosen as after any other failure, so there may be new wants. Raises
        ValueError for an ad that is not in the result now.
        """
        place = self._places.pop(ad.inline, None)
        if place is None:
            raise ValueError(f"{ad.inline!r} is not among the ads that came out")
        group, slot = place
        group.good -= 1
        self._refused.append(reason)
        self._report_ad(code, reason, group, ad.inline)
        slot.resolved, slot.open = None, True
        _substitute(group, slot, ad.inline)
        self._advance(group, slot)
        if not group.good:
            _reopen(group.parent)
            self._settle(group.parent)

    def stop(self) -> None:
        """Let nothing stand in for what fails from now on: there is no time to ask for it."""
        self._stopped = True

    def result(self) -> Unwrapped:
        """Give what has come of it. Wants that are still open count as nothing."""
        return Unwrapped(
            self._entry,
            tuple(_numbered(self._root, _ads(self._root))),
            tuple(self._reports),
            self._unreported,
            tuple(self._refused),
        )

    def release(self) -> None:
        """
        Let go of the documents, when the result has been taken.

        Slots, groups and wants refer to each other: without this, three trees of a request wait
        for the garbage collector.
        """
        groups = [self._root]
        while groups:
            group = groups.pop()
            for slot in group.slots:
                if isinstance(slot.resolved, _Group):
                    groups.append(slot.resolved)
                slot.resolved = None
            group.slots.clear()
        self._asked.clear()
        self._open.clear()
        self._places.clear()

    # --- Groups and slots -----------------------------------------------------------------------

    def _grouped(self, document: VastDocument, url: str, parent: Want | None, need: int) -> _Group:
        """Make the group of *document*, and try the first candidate of each of its slots."""
        group = _Group(document, parent, url)
        ads = document.ads
        if parent is not None and not parent.ad.follows_wrappers:
            ads = [each for each in ads if not each.is_wrapper]
        pod = sorted((each for each in ads if each.sequence), key=lambda each: each.sequence or 0)
        group.spare.extend(each for each in ads if not each.sequence)
        if parent is not None and not parent.ad.allows_multiple:
            self._first_only(group, pod)
        elif pod:
            group.is_pod = True
            group.slots = [_Slot(1, each) for each in pod]
        else:
            alone = len(group.spare) == 1
            count = min(need, len(group.spare))
            group.slots = [_Slot(need if alone else 1, group.spare.popleft()) for _ in range(count)]
        for slot in group.slots:
            self._advance(group, slot)
        return group

    def _first_only(self, group: _Group, pod: list[Ad]) -> None:
        """
        Take the first stand-alone ad, as ``allowMultipleAds="false"`` says.

        Where all ads have a sequence, the lowest is taken: most samples of the IAB put
        ``sequence="1"`` on a lone ad. A strict route takes none.
        """
        group.only_first = True
        if group.spare:
            group.slots = [_Slot(1, group.spare.popleft())]
        elif pod and not self._policy.strict:
            group.is_pod = True
            group.slots = [_Slot(1, pod[0])]

    def _advance(self, group: _Group, slot: _Slot) -> None:
        """Try candidates in *slot* until one is good, one has to be fetched, or none is left."""
        while slot.candidate is not None and not (self._stopped and slot.stands_in):
            if self._try(group, slot, slot.candidate):
                return
            _substitute(group, slot, slot.candidate)
        slot.open = False

    def _try(self, group: _Group, slot: _Slot, ad: Ad) -> bool:
        """Start on *ad*; False, and reported, if it cannot be used."""
        path = _path(group.parent)
        problem = _unusable(ad, path) if not ad.is_wrapper else None
        if problem is not None:
            self._report_ad(*problem, group, ad)
            return False
        if ad.is_wrapper:
            return self._follow(group, slot, ad)
        slot.resolved = ResolvedAd(ad, tuple(each.ad for each in path), None)
        slot.open = False
        group.good += 1
        self._places[ad] = group, slot
        return True

    def _follow(self, group: _Group, slot: _Slot, ad: Ad) -> bool:
        depth = group.parent.depth + 1 if group.parent else 1
        url = _absolute(group.url, ad.tag_uri)
        if problem := self._forbidden(group, ad, url, depth):
            self._report_ad(*problem, group, ad)
            return False
        blocked = (group.parent.blocked if group.parent else ()) + _blocked(ad)
        want = Want(ad, url, depth, group, slot, blocked)
        self._fetches += 1
        self._asked.append(want)
        self._open.add(want)
        return True

    def _forbidden(self, group: _Group, ad: Ad, url: str, depth: int) -> tuple[int, str] | None:
        if depth > self._policy.max_wrappers:
            return VastCode.WRAPPER_LIMIT, f"more than {self._policy.max_wrappers} wrappers"
        if not ad.tag_uri:
            return VastCode.SCHEMA, "a wrapper without VASTAdTagURI"
        if url == self._entry_url or any(url == each.url for each in _path(group.parent)):
            return VastCode.WRAPPER, "the chain leads back to itself"
        if self._fetches >= self._policy.max_fetches:
            return VastCode.WRAPPER, f"more than {self._policy.max_fetches} documents"
        return None

    def _give_up(self, want: Want) -> None:
        """Go on to the next candidate of the slot that *want* was in."""
        want.slot.resolved = None
        _substitute(want.group, want.slot, want.ad)
        self._advance(want.group, want.slot)
        self._settle(want.group.parent)

    def _settle(self, want: Want | None) -> None:
        """Climb while the group below is decided: close its slot, or try the next candidate."""
        while want is not None:
            group = want.slot.resolved
            if not isinstance(group, _Group) or any(each.open for each in group.slots):
                return
            if _ads(group):
                want.slot.open = False
            else:
                want.slot.resolved = None
                _substitute(want.group, want.slot, want.ad)
                self._advance(want.group, want.slot)
            want = want.group.parent

    # --- Reports --------------------------------------------------------------------------------

    def _report(self, code: int, reason: str, want: Want, further: list[str] | None = None) -> None:
        if self._reported >= MAX_REPORTED:
            # Not even read any more: thousands of ads may fail below thousands of errors.
            self._unreported += 1
            self._keep(code, [], reason)
            return
        uris = [uri for each in _path(want) for uri in (*each.group.errors, *each.ad.errors)]
        self._keep(code, [*uris, *(further or ())], reason)

    def _report_ad(self, code: int, reason: str, group: _Group, ad: Ad) -> None:
        """Report an ad that is not played for what it is itself, and not for what it led to."""
        full = self._reported >= MAX_REPORTED
        own = [] if full else [*group.errors, *ad.errors]
        if group.parent is None:
            self._unreported += int(full)
            self._keep(code, own, reason)
        else:
            self._report(code, reason, group.parent, own)

    def _keep(self, code: int, uris: list[str], reason: str) -> None:
        """Keep a report, with as many of its *uris* as there is room for."""
        told = uris[: MAX_REPORTED - self._reported]
        self._reported += len(told)
        self._unreported += len(uris) - len(told)
        self._reports.append(Report(int(code), tuple(told), reason))

    def __repr__(self) -> str:
        return f"<Unwrapper open: {len(self._open)}, fetched: {self._fetches}>"


def _path(want: Want | None) -> list[Want]:
    """Give the wrappers from the outermost to *want*."""
    path: list[Want] = []
    while want is not None:
        path.append(want)
        want = want.group.parent
    path.reverse()
    return path


def _reopen(want: Want | None) -> None:
    """Take back the decision on the slots above a group in which something is to be decided."""
    while want is not None:
        want.slot.open = True
        want = want.group.parent


def _substitute(group: _Group, slot: _Slot, failed: Ad) -> None:
    """
    Choose what stands in for a *failed* ad: a stand-alone ad of the same response, not yet used.

    VAST 4.3 section 3.19: ``fallbackOnNoAd`` true asks for it, false in a pod forbids it, the
    rest is the player's discretion: a filled break is better than an empty one.
    """
    wish = failed.fallback_on_no_ad if failed.is_wrapper else None
    forbidden = wish is not True if group.only_first else group.is_pod and wish is False
    slot.candidate = group.spare.popleft() if group.spare and not forbidden else None
    group.taken += 1
    slot.stands_in = group.taken


def _in_place(group: _Group) -> list["ResolvedAd | _Group | None"]:
    """
    Give what came of each slot, in playing order.

    Which slot a stand-alone ad was tried in depends on what failed first; so that the answer
    does not, the first one that is good takes the first place that is free.
    """
    good = [slot for slot in group.slots if slot.stands_in and _is_filled(slot)]
    good.sort(key=lambda slot: slot.stands_in)
    waiting = iter(good)
    return [
        next((each.resolved for each in waiting), None) if slot.stands_in else slot.resolved
        for slot in group.slots
    ]


def _is_filled(slot: _Slot) -> bool:
    if isinstance(slot.resolved, _Group):
        return bool(_ads(slot.resolved))
    return slot.resolved is not None


def _unusable(ad: Ad, path: list[Want]) -> tuple[int, str] | None:
    """Say why an ad that is no wrapper cannot be played, or give None."""
    if not ad.is_inline:
        return VastCode.SCHEMA, "an ad with neither InLine nor Wrapper"
    if child(ad.body, "Creatives") is None:
        return VastCode.SCHEMA, "an InLine without Creatives"
    blocked = path[-1].blocked if path else ()
    if blocked and (category := _violation(ad, blocked)):
        return VastCode.CATEGORY_BLOCKED, f"the category {category} is blocked by a wrapper"
    return None


def _categories(ad: Ad, name: str) -> list[tuple[str | None, str]]:
    """Read the categories in the elements called *name*: authority and code."""
    found = (
        (each.get("authority"), code)
        for each in children(ad.body, name)
        for code in re.split(r"[\s,]+", text_of(each))
        if code
    )
    return list(islice(found, MAX_CATEGORIES))


def _blocked(ad: Ad) -> tuple[tuple[str | None, str], ...]:
    """Read what a wrapper forbids (VAST 4.3 section 3.19.2)."""
    return tuple(_categories(ad, "BlockedAdCategories"))


def _violation(ad: Ad, blocked: tuple[tuple[str | None, str], ...]) -> str | None:
    """Find a category of *ad* that is blocked; an authority that is not said matches any."""
    authorities: dict[str, set[str | None]] = {}
    for by, code in blocked:
        authorities.setdefault(code, set()).add(by or None)
    for authority, code in _categories(ad, "Category"):
        by_whom = authorities.get(code)
        if by_whom and (not authority or None in by_whom or authority in by_whom):
            return code
    return None


def _absolute(base: str, reference: str) -> str:
    """Resolve *reference* against *base* (RFC 3986 section 5); an absolute one stays as it is."""
    if not reference or _ABSOLUTE.match(reference):
        return reference
    return joined(base, reference)


def _ads(group: _Group) -> list[tuple[ResolvedAd, bool]]:
    """Give the ads of *group* in playing order, each with whether it belongs to a pod."""
    found: list[tuple[ResolvedAd, bool]] = []
    for resolved in _in_place(group):
        if isinstance(resolved, ResolvedAd):
            found.append((resolved, group.is_pod))
        elif resolved is not None:
            found += [(ad, pod or group.is_pod) for ad, pod in _ads(resolved)]
    return found


def _numbered(root: _Group, ads: list[tuple[ResolvedAd, bool]]) -> list[ResolvedAd]:
    """
    Give each ad its place in the pod.

    Where the entry's pod came through whole, one ad a slot, its own numbers stay. Otherwise the
    ads of a pod are numbered from 1: numbers must be unique, and a gap is a lost ad.
    """
    if not any(pod for _, pod in ads):
        return [ad for ad, _ in ads]
    numbers: list[int] = list(range(1, len(ads) + 1))
    if root.is_pod and len(ads) == len(root.slots) and _one_each(root):
        own = [slot.candidate.sequence or 0 for slot in root.slots if slot.candidate]
        numbers = own if len(set(own)) == len(own) and 0 not in own else numbers
    return [
        ResolvedAd(ad.inline, ad.wrappers, number)
        for (ad, _), number in zip(ads, numbers, strict=True)
    ]


def _one_each(root: _Group) -> bool:
    """Whether every slot of *root* holds exactly one ad."""
    return all(
        isinstance(slot.resolved, ResolvedAd)
        or (slot.resolved is not None and len(_ads(slot.resolved)) == 1)
        for slot in root.slots
    )
