"""Reading config.yaml: what is wrong is told at once, with its line."""

from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vastproxy.config.load import MAX_ALIASES, MAX_FILE, load, loads
from vastproxy.config.schema import Config, json_schema
from vastproxy.errors import ConfigError

GOOD = """\
upstreams:
  main: {endpoint: https://ads.example.com/vast}
routes:
  - {path: /vast, upstreams: main}
"""


def read(text: str, environ: Mapping[str, str] | None = None) -> Config:
    """Read *text* as the file ``c.yaml``."""
    return loads(text, source="c.yaml", environ=environ or {})


def problems(text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """List what is wrong with *text*."""
    with pytest.raises(ConfigError) as caught:
        read(text, environ)
    return list(caught.value.problems)


def upstream(line: str) -> str:
    """Write the smallest config with *line* on line 3, among the settings of its upstream."""
    endpoint = "endpoint: https://ads.example.com/vast"
    return GOOD.replace(f"{{{endpoint}}}", f"\n    {line}\n    {endpoint}")


def route(line: str) -> str:
    """Write the smallest config with *line* on line 6, among the settings of its route."""
    return GOOD.replace(
        "{path: /vast, upstreams: main}", f"path: /vast\n    upstreams: main\n    {line}"
    )


FIVE_MISTAKES = """\
server:
  admin: 0.0.0.0:8081
upstreams:
  main:
    endpoint: https://ads.example.com/vast
    timeout: fast
    tiemout: 2s
routes:
  - path: /vast
    upstreams:
      - main
      - mian
    deadline: 5
"""


def test_all_mistakes_are_told_at_once() -> None:
    """Five mistakes of five kinds give five lines, in the order of the file."""
    with pytest.raises(ConfigError) as caught:
        loads(FIVE_MISTAKES, source="config.yaml", environ={})

    assert (
        "config.yaml: 5 errors\n"
        "  line 2: server.admin: '0.0.0.0:8081' can be reached from other machines, and this "
        "version has no password for it (write 127.0.0.1:8081, unix:/run/admin.sock or null)\n"
        "  line 6: upstreams.main.timeout: 'fast' is no duration (write 800ms, 2s or 1h)\n"
        "  line 7: upstreams.main.tiemout: unknown setting 'tiemout' (did you mean 'timeout'?)\n"
        "  line 12: routes.0.upstreams.1: no upstream is called 'mian' (did you mean 'main'?)\n"
        "  line 13: routes.0.deadline: '5' has no unit (write 5ms, 5s or 5m)"
    ) == str(caught.value)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        ("it is empty (write at least `upstreams` and `routes`)", ""),
        ("it is empty (write at least `upstreams` and `routes`)", "# nothing\n"),
        ("line 1: the file is one text or list (write sections such as `upstreams:`)", "- a"),
        ("line 2: the file is one text or list (write sections such as `upstreams:`)", "\nnull"),
        ("line 1, column 5: the YAML cannot be read: mapping values are not allowed", "a: b: c"),
        ("line 2, column 1: the YAML cannot be read: found character '\\t'", "a:\n\tb: 1"),
        ("line 2, column 1: the YAML cannot be read: expected '<document start>'", "%X y\na"),
        ("line 2: the character U+0000 may not be in YAML (remove it)", "a: 1\nb: \0"),
        ("a number or an escape of YAML is out of range (write the character", r'"\UFFFFFFFF"'),
        (
            "line 1, column 4: an alias stands inside of what it repeats (write it out)",
            "a: &a [*a]",
        ),
        ("line 1, column 51: nested deeper than 50 levels (look at the brackets)", "[" * 90000),
        ("the file is longer than 1MiB (write fewer or shorter settings)", "#" * (MAX_FILE + 1)),
        ("line 5: a key is a list or a mapping (write plain text)", GOOD + "? [a]\n: b"),
        ("line 4: routes.0.path: it is missing (add it)", GOOD.replace("path: /vast, ", "")),
    ],
)
def test_file_that_is_no_config_is_explained(problem: str, text: str) -> None:
    """What is wrong with the file as a whole is told, with line and column where there are any."""
    assert problem in [each[: len(problem)] for each in problems(text)]


# Each mistake is two lines: what is written, and what is answered.
MISTAKES_OF_A_ROUTE = """
mode: rewrite
mode: 'rewrite': this version has two modes only (write resolve or passthrough)
mode: fast
mode: 'fast' is no choice here (write 'resolve' or 'passthrough')
max_hops: 21
max_hops: '21' is too much (write 20 or less)
max_hops: x
max_hops: 'x' is no whole number (write one such as 5)
max_hops:
max_hops: nothing is written here (write a value, or remove this line)
max_fetches: 0
max_fetches: '0' is too little (write 1 or more)
strict: maybe
strict: 'maybe' is neither true nor false (write true or false)
viewer: query:uid
viewer: 'query:uid' is no list (write one such as [first, second])
viewer: [uid]
viewer.0: 'uid' names no part of a request (write query:uid, header:X-Uid or cookie:uid)
deadline:
deadline: nothing is written here (write a value, or remove this line)
deadline: 10ms
deadline: 10ms is too short for any ad server (write 50ms or more)
forward_query: slot
forward_query: 'slot' is no choice here (write all, none or a list: [slot, uid])
forward_cookies: [a b]
forward_cookies.0: 'a b' is no name of a cookie (write a name such as uid)
correlator: cookie:c
correlator: 'cookie:c' is a cookie (write query:c or header:c)
correlator_params: [a, '']
correlator_params.1: the text is empty (write a name, or remove this line)
correlator_params: [[a]]
correlator_params.0: ['a'] is no text (put text with braces or brackets in quotes)
macros: IFA
macros: 'IFA' is no section (write indented lines of `name: value`)
macros: {IFB: x}
macros.IFB: 'IFB' is no registered macro (did you mean IFA?)
macros: {CORRELATOR: x}
macros.CORRELATOR: CORRELATOR is filled by the proxy and cannot be set (remove this line)
upstream: main
upstream: unknown setting 'upstream' (did you mean 'upstreams'?)
path: /other
path: it is there twice, first on line 4 (keep one)
reservation_ttl: 500ms
reservation_ttl: 0.5s is too short (write 1s or more)
reservation_ttl: 25h
reservation_ttl: 90000s is too long (write 24h or less)
frequency_caps: {limit: 3}
frequency_caps: {'limit': '3'} is no list (write one such as [first, second])
budget: spring
budget: 'spring' is no section (write indented lines of `name: value`)
fallback: <VAST
fallback: the document is not well-formed: Couldn't find end of Start Tag VAST line 1, line 1, \
column 6 (mend it there)
fallback: <html/>
fallback: the document is no VAST: the root element is <html>, not <VAST> (write <VAST> around it)
fallback: <VAST/>
fallback: the document has no InLine ad (write one, or null for an empty answer)
fallback: <VAST><Ad/></VAST>
fallback: the document has no InLine ad (write one, or null for an empty answer)
fallback: <VAST><Ad><InLine/></Ad><Ad><Wrapper/></Ad></VAST>
fallback: the document has a Wrapper, and a fallback is what is there when nobody can be asked \
(write InLine ads)
fallback: [house.xml]
fallback: ['house.xml'] is no VAST (write the path of a VAST file, or VAST itself)
"""
# These stand in a cap of a route that has `viewer`.
MISTAKES_OF_A_CAP = """
window: 1h
limit: it is missing (add it)
limit: -1, window: 1h
limit: '-1' is too little (write 0 or more)
limit: 3.5, window: 1h
limit: '3.5' is no whole number (write one such as 5)
limit: 1000000001, window: 1h
limit: '1000000001' is too much (write 1000000000 or less)
limit: 3
window: kind rolling needs a window (write window: 1h)
limit: 3, kind: fixed
window: kind fixed needs a window (write window: 1h)
limit: 3, kind: calendar
window: kind calendar needs a stretch of the calendar (write hour, day, week or month)
limit: 3, kind: calendar, window: 24h
window: kind calendar needs a stretch of the calendar (write hour, day, week or month)
limit: 3, window: day
window: 'day' is a stretch of the calendar (write kind: calendar, or a duration: 24h)
limit: 3, window: 60
window: '60' has no unit (write 60ms, 60s or 60m)
limit: 3, window: 999ms
window: 0.999s is too short (write 1s or more)
limit: 3, window: 401d
window: 3.46464e+07s is too long (write 400d or less)
limit: 3, window: 1h, kind: lifetime
window: kind lifetime has no window (remove this line, or write kind: rolling)
limit: 3, window: 1h, kind: pod
window: kind pod has no window (remove this line, or write kind: rolling)
limit: 3, window: 1h, kind: sliding
kind: 'sliding' is no choice here (write 'rolling', 'fixed', 'calendar', 'lifetime' or 'pod')
limit: 3, window: day, kind: calendar, time_zone: Berlin
time_zone: 'Berlin' is no time zone (write UTC, or a name such as Europe/Berlin)
limit: 3, window: 1h, time_zone: Europe/Berlin
time_zone: a time zone means nothing for kind rolling (write kind: calendar, or remove this line)
limit: 3, window: 1h, by: user
by: 'user' is nothing to count by (write viewer, campaign, advertiser, creative or ad; the last \
four mean: for one viewer)
limit: 3, window: 1h, count_at: click
count_at: 'click' is no choice here (write 'impression' or 'decision')
limit: 3, window: 1h, when_unknown: deny
when_unknown: 'deny' is no choice here (write 'serve' or 'skip')
limit: 3, window: x, mode: off
window: 'x' is no duration (write 800ms, 2s or 1h)
limit: 3, window: 1h, mode: on
mode: 'on' is no choice here (write 'enforce', 'shadow' or 'off')
limit: 3, window: 1h, reservation_ttl: 2d
reservation_ttl: 172800s is too long (write 24h or less)
limit: 3, window: 1h, upstreams: [main, mian]
upstreams.1: the route asks no upstream 'mian' (did you mean 'main'?)
limit: 3, window: 1h, upstreams: house
upstreams: the route asks no upstream 'house' (there are: main)
limit: 3, window: 1h, upstreams: []
upstreams: it is empty (write at least one)
limit: 3, window: 1h, name: a b
name: 'a b' is no name (write 1 to 100 letters, digits, _ . : and -)
limit: 3, window: 1h, bye: viewer
bye: unknown setting 'bye' (did you mean 'by'?)
"""
MISTAKES_OF_A_BUDGET = """
limit: 10
campaign: it is missing (add it)
campaign: a
limit: it is missing (add it)
campaign: a/b, limit: 10
campaign: 'a/b' is no name (write 1 to 100 letters, digits, _ . : and -)
campaign: a, limit: ten
limit: 'ten' is no amount of money (write one such as 1000 or 2.50)
campaign: a, limit: 1e3
limit: '1e3' is no amount of money (write one such as 1000 or 2.50)
campaign: a, limit: 0.00
limit: '0.00' is no money at all (write more than 0, such as 2.50)
campaign: a, limit: 1.0000001
limit: '1.0000001' has more than 6 decimals (write one such as 0.0025)
campaign: a, limit: 9000000000.01
limit: '9000000000.01' is too much (write 9000000000 or less)
campaign: a, limit: 90000000000
limit: '90000000000' is too much (write 9000000000 or less)
campaign: a, limit: 10, currency: usd
currency: 'usd' is no currency of ISO 4217 (write USD)
campaign: a, limit: 10, currency: Euro
currency: 'Euro' is no currency of ISO 4217 (write USD)
campaign: a, limit: 10, cpm: 0.0009
cpm: 0.0009 for a thousand ads is nothing for one (write 0.001 or more)
campaign: a, limit: 10, cpm: 1, amount: 1
amount: `cpm` says already what an ad costs (keep one of the two)
campaign: a, limit: 10, on_state_loss: retry
on_state_loss: 'retry' is no choice here (write 'serve', 'lease' or 'deny')
campaign: a, limit: 10, upstreams: [house]
upstreams.0: the route asks no upstream 'house' (there are: main)
campaign: a, limit: 10, mode: off, amuont: 2
amuont: unknown setting 'amuont' (did you mean 'amount'?)
"""
MISTAKES_OF_AN_UPSTREAM = """
timeout: 2
timeout: '2' has no unit (write 2ms, 2s or 2m)
cookies: player
cookies: 'player' is no choice here (write 'chain', 'viewer' or 'off')
cookie_ttl: 401d
cookie_ttl: 3.46464e+07s is too long (write 400d or less)
max_body: 3MiB
max_body: 3145728 bytes are more than one answer may have (write 2MiB or less)
max_body: ''
max_body: '' is no size (write 1000B, 512KiB or 2MiB)
hosts: [https://a.tv]
hosts.0: 'https://a.tv' is no host (write ads.example.com or ads.example.com:8443)
params: {slot: {query.slot}}
params.slot: {'query.slot': None} is no text (put text with braces or brackets in quotes)
params: {'': a}
params.: the text is empty (write a name, or remove this line)
headers: {Host: a}
headers.Host: the header Host belongs to the connection (remove this line)
headers: {a b: c}
headers.a b: 'a b' is no name of a header (write a name such as X-Api-Key)
session_params: [uid]
session_params.0: 'uid' is no choice here (write 'correlator' or 'timestamp')
macros: {timestamp: iso}
macros.timestamp: 'iso' is no choice here (write 'unix_ms' or 'iso8601')
macros: {aliases: {'[x]': XXXX}}
macros.aliases.[x]: 'XXXX' is no registered macro (write a name such as IFA, without brackets)
colour: red
colour: unknown setting 'colour' (there are: endpoint, hosts, params, headers, timeout,
soft_timeout: 1s
soft_timeout: 1s is not shorter than the timeout, 1s, after which the next one is asked anyway \
(write less, or null)
soft_timeout: 0.5ms
soft_timeout: 0.0005s is too short (write 1ms or more)
max_requests_in_flight: 0
max_requests_in_flight: '0' is too little (write 1 or more)
circuit_breaker: off
circuit_breaker: 'off' does not switch it (write {mode: off})
circuit_breaker:
circuit_breaker: null does not switch it (write {mode: off})
circuit_breaker: on
circuit_breaker: 'on' does not switch it (write {mode: enforce})
circuit_breaker: fast
circuit_breaker: 'fast' is no section (write indented lines of `name: value`)
circuit_breaker: {mode: on}
circuit_breaker.mode: 'on' is no choice here (write 'enforce', 'shadow' or 'off')
circuit_breaker: {fail_max: 0}
circuit_breaker.fail_max: '0' is too little (write 1 or more)
circuit_breaker: {fail_max: 10001, mode: off}
circuit_breaker.fail_max: '10001' is too much (write 10000 or less)
circuit_breaker: {failure_rate: 50}
circuit_breaker.failure_rate: '50' is more than the whole (write 50%)
circuit_breaker: {slow_call_rate: 0%}
circuit_breaker.slow_call_rate: '0%' is no share at all (write more than 0%, such as 10%)
circuit_breaker: {min_calls: 100001}
circuit_breaker.min_calls: '100001' is too much (write 100000 or less)
circuit_breaker: {window: 11m}
circuit_breaker.window: 660s is too long (write 10m or less)
circuit_breaker: {window: 0.9s}
circuit_breaker.window: 0.9s is too short (write 1s or more)
circuit_breaker: {slow_call: 2m}
circuit_breaker.slow_call: 120s is too long (write 1m or less)
circuit_breaker: {reset_timeout: 2h}
circuit_breaker.reset_timeout: 7200s is too long (write 1h or less)
circuit_breaker: {reset_timeout: x}
circuit_breaker.reset_timeout: 'x' is no duration (write 800ms, 2s or 1h)
circuit_breaker: {reset_timeout: 10m, max_reset_timeout: 9m}
circuit_breaker.max_reset_timeout: 540s is shorter than reset_timeout, 600s (write 600s or more, \
or remove this line)
circuit_breaker: {max_reset_timeout: 2d}
circuit_breaker.max_reset_timeout: 172800s is too long (write 24h or less)
circuit_breaker: {success_threshold: 101}
circuit_breaker.success_threshold: '101' is too much (write 100 or less)
circuit_breaker: {quorum: 1001}
circuit_breaker.quorum: '1001' is too much (write 1000 or less)
circuit_breaker: {share: true}
circuit_breaker.share: this goes over Redis, and the state is memory (write state: \
redis://127.0.0.1:6379, or share: false)
circuit_breaker: {fail_maximum: 3}
circuit_breaker.fail_maximum: unknown setting 'fail_maximum' (did you mean 'fail_max'?)
rate_limit: 100
rate_limit: '100' has no unit (write 100/s, 100/m or 100/h)
rate_limit: 100/d
rate_limit: '100/d' is no rate (write 100/s, 6000/m or 360000/h)
rate_limit: off
rate_limit: 'off' does not switch it (write null)
rate_limit: on
rate_limit: 'on' does not switch it (write a rate such as 100/s)
rate_limit: [100/s]
rate_limit: ['100/s'] is no section (write indented lines of `name: value`)
rate_limit: {burst: 3}
rate_limit.rate: it is missing (add it)
rate_limit: {rate: fast}
rate_limit.rate: 'fast' is no rate (write 100/s, 6000/m or 360000/h)
rate_limit: {rate: 1/s, burst: 0}
rate_limit.burst: '0' is too little (write 1 or more)
rate_limit: {rate: 1/s, share: Yes}
rate_limit.share: this goes over Redis, and the state is memory (write state: \
redis://127.0.0.1:6379, or share: false)
rate_limit: {rate: 1/s, bursts: 2}
rate_limit.bursts: unknown setting 'bursts' (did you mean 'burst'?)
retry: off
retry: 'off' does not switch it (write {attempts: 0})
retry: {attempts: 6}
retry.attempts: '6' is too much (write 5 or less)
retry: {budget: 10}
retry.budget: '10' is more than the whole (write 10%)
cache: on
cache: 'on' does not switch it (write {}, which has its defaults)
cache: off
cache: 'off' does not switch it (write null)
cache: {}
cache: answers are kept for each viewer, and no route that asks this upstream says where a request \
names one (add viewer: ["query:uid"] to routes.0, or write scope: shared)
cache: {scope: everybody}
cache.scope: 'everybody' is no choice here (write 'viewer' or 'shared')
cache: {scope: shared, ttl: 500ms}
cache.ttl: 0.5s is too short (write 1s or more)
cache: {scope: shared, ttl: 8d}
cache.ttl: 691200s is too long (write 7d or less)
cache: {scope: shared, paid: maybe}
cache.paid: 'maybe' is neither true nor false (write true or false)
cache: {scope: shared, vary: [slot]}
cache.vary.0: 'slot' names no part of a request (write query:uid, header:X-Uid or cookie:uid)
cache: {scope: shared, ignore: [cb, a=b]}
cache.ignore.1: 'a=b' is no name of a query parameter (write one such as cb)
cache: {scope: shared, no_fill_ttl: 0s}
cache.no_fill_ttl: '0s' is no time at all (write off, or a time such as 5s)
cache: {scope: shared, no_fill_ttl: 2h}
cache.no_fill_ttl: 7200s is too long (write 1h or less)
cache: {scope: shared, stale_if_error: 10}
cache.stale_if_error: '10' has no unit (write 10ms, 10s or 10m)
cache: {scope: shared, stale_while_revalidate: never}
cache.stale_while_revalidate: 'never' is no duration (write 800ms, 2s or 1h)
cache: {scope: shared, max_size: 63KiB}
cache.max_size: 64512 bytes are too few (write 64KiB or more)
cache: {scope: shared, max_size: 5GiB}
cache.max_size: 5368709120 bytes are too many (write 4GiB or less)
cache: {scope: shared, redis: true}
cache.redis: this goes over Redis, and the state is memory (write state: \
redis://127.0.0.1:6379, or redis: false)
cache: {scope: shared, tll: 5s}
cache.tll: unknown setting 'tll' (there are: ttl, scope, paid, vary, ignore,
"""
OTHER_MISTAKES = """
server: {workers: 0}
server.workers: '0' is too little (write 1 or more)
server: {workers: 257}
server.workers: '257' is too much (write 256 or less)
server: {workers: 4}
server.workers: 4 workers cannot share memory:// (write workers: 1, or a state that they can \
share: redis://127.0.0.1:6379, postgresql://user@host/db or sqlite:///vastproxy.db)
server: {secret: hunter2}
server.secret: a secret of 7 characters can be guessed (write 8 or more, best 32 random ones)
server: {secret: '**********'}
server.secret: a secret of one character repeated can be guessed (write a random one)
server: {secret: [correct-horse, correct-horse]}
server.secret: a secret is there twice (keep one)
server: {secret: {correct: horse}}
server.secret: it is neither a text nor a list of texts (write a text in quotes)
server: {beacon_ttl: 30s}
server.beacon_ttl: 30s is too short (write 1m or more)
server: {beacon_ttl: 8d}
server.beacon_ttl: 691200s is too long (write 7d or less)
server: {beacon_ttl: 5m}
server.beacon_ttl: '5m' is shorter than the reservation_ttl of routes.0, 10m (write 10m or more \
here, or less there)
server: {admin: 127.0.0.1:8080}
server.admin: '127.0.0.1:8080' is taken by `listen` (write admin: null, or another port)
server: {listen: ['unix:/a', 'unix:/a']}
server.listen: 'unix:/a' is taken by 'unix:/a' (write another port or path)
server: {listen: 'unix:a'}
server.listen: 'unix:a' names no absolute path (write unix:/run/vastproxy.sock)
server: {public_url: 'https://a.tv/?b'}
server.public_url: 'https://a.tv/?b' has more than a path (write it without ? and #)
state: redis://r:70000
state: the port is none from 1 to 65535 (write redis://127.0.0.1:6379/0)
state: [redis://r]
state: it is no text (write one such as redis://127.0.0.1:6379)
state_timeout: 6s
state_timeout: 6s is too long (write 5s or less)
state_timeout: 0.5ms
state_timeout: 0.0005s is too short (write 1ms or more)
journal: ''
journal: '' is no directory (write /var/lib/vastproxy or null)
state: ${STATE}
state: the environment variable STATE is not set (set it; for the text, write $${)
state: ${a b}
state: '${a b' begins no variable (write ${NAME}; for the text, write $${)
state: !secret x
state: the tag '!secret' means nothing here (remove it)
egress: {allow: [10.1.1.1/8]}
egress.allow.0: '10.1.1.1/8' names one address of a network (write 10.0.0.0/8)
egress: {allow: [private]}
egress.allow.0: 'private' is no network (write 10.0.0.0/8 or 192.0.2.7)
egress: {ports: []}
egress.ports: it is empty (write at least one)
egress: {ports: [70000]}
egress.ports.0: '70000' is too much (write 65535 or less)
egress: {circuit_breaker: off}
egress.circuit_breaker: 'off' does not switch it (write {mode: off})
egress: {circuit_breaker: {share: true}}
egress.circuit_breaker.share: unknown setting 'share' (there are: mode, fail_max, failure_rate, \
min_calls, window, slow_call, slow_call_rate, reset_timeout, max_reset_timeout, success_threshold)
egress: {circuit_breaker: {failure_rate: 101%}}
egress.circuit_breaker.failure_rate: '101%' is more than the whole (write 100% or less)
egress: {max_requests_in_flight: 0}
egress.max_requests_in_flight: '0' is too little (write 1 or more)
log: info
log: 'info' is no section (write indented lines of `name: value`)
log: {colour: red}
log.colour: unknown setting 'colour' (there are: level, format)
logs: {}
logs: unknown setting 'logs' (did you mean 'log'?)
upstreams: {}
upstreams: it is there twice, first on line 1 (keep one)
"""
MISTAKES_BETWEEN_SECTIONS = """
- {path: /vast, upstreams: main}
path: routes.0 has the path '/vast' already (write another)
- {path: /a, upstreams: [main, mian]}
upstreams.1: no upstream is called 'mian' (did you mean 'main'?)
- {path: /a, upstreams: other}
upstreams: no upstream is called 'other' (there are: main, deep, sticky)
- {path: /a, upstreams: [main, deep]}
upstreams.1: 'deep' uses {rest}, but the path has none (end it in /{rest})
- {path: /a, upstreams: main, frequency_caps: [{limit: 1, window: 1h}]}
frequency_caps.0: it counts for each viewer, and the route does not say where a request names one \
(add viewer: ["query:uid"] to the route)
- {path: /a, upstreams: main, frequency_caps: [{limit: 1, kind: lifetime, mode: off}]}
frequency_caps.0: it counts for each viewer, and the route does not say where a request names one \
(add viewer: ["query:uid"] to the route)
- {path: /a, upstreams: main, mode: passthrough, frequency_caps: [{limit: 1, kind: pod}]}
frequency_caps.0: kind pod needs to know the ads, and mode passthrough does not look at them \
(write by: viewer with another kind, or mode: resolve)
- {path: /a, upstreams: main, mode: passthrough, viewer: ['query:u'], frequency_caps: [{limit: 1, \
window: 1h}, {limit: 1, window: 1h, by: ad}]}
frequency_caps.1: by: ad needs to know the ads, and mode passthrough does not look at them (write \
by: viewer with another kind, or mode: resolve)
- {path: /a, upstreams: main, viewer: ['query:u'], frequency_caps: [{limit: 1, window: 60m}, \
{limit: 2, window: 1h, upstreams: main}]}
frequency_caps: 1 counts the same as 0 (remove one of them, or write other upstreams)
- {path: /a, upstreams: main, viewer: ['query:u'], frequency_caps: [{limit: 1, window: 1h, name: \
a}, {limit: 2, window: 2h, name: a}]}
frequency_caps: 1 has the name of 0, 'a' (write another)
- {path: /a, upstreams: sticky}
viewer: the upstream 'sticky' keeps cookies for each viewer, and the route does not say where a \
request names one (add viewer: ["query:uid"])
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """Take a table of mistakes apart."""
    lines = table.strip("\n").split("\n")
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_OF_A_ROUTE))
def test_mistake_of_a_route_is_explained(written: str, answered: str) -> None:
    """A wrong setting of a route is one line: where, what is wrong, what to write instead."""
    assert [f"line 6: routes.0.{answered}"] == problems(route(written))


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_OF_AN_UPSTREAM))
def test_mistake_of_an_upstream_is_explained(written: str, answered: str) -> None:
    """A wrong setting of an upstream is one line: where, what is wrong, what to write instead."""
    expected = f"line 3: upstreams.main.{answered}"

    assert [expected] == [each[: len(expected)] for each in problems(upstream(written))]


@pytest.mark.parametrize(("written", "answered"), pairs(OTHER_MISTAKES))
def test_mistake_of_a_section_is_explained(written: str, answered: str) -> None:
    """A wrong setting of any other section is one line, too."""
    assert [f"line 5: {answered}"] == problems(GOOD + written)


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_BETWEEN_SECTIONS))
def test_mistake_between_sections_is_explained(written: str, answered: str) -> None:
    """A route that does not fit the other routes or the upstreams is told so."""
    more = (
        "  deep: {endpoint: 'https://a.tv/{rest}'}\n"
        "  sticky: {endpoint: https://a.tv/, cookies: viewer}\n"
    )
    text = GOOD.replace("routes:", f"{more}routes:") + f"  {written}\n"

    assert [f"line 7: routes.1.{answered}"] == problems(text)


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_OF_A_CAP))
def test_mistake_of_a_cap_is_explained(written: str, answered: str) -> None:
    """A wrong setting of a frequency cap is one line: where, what is wrong, what instead."""
    text = route(f"viewer: ['query:uid']\n    frequency_caps: [{{{written}}}]")
    expected = f"line 7: routes.0.frequency_caps.0.{answered}"

    assert [expected] == problems(text)


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_OF_A_BUDGET))
def test_mistake_of_a_budget_is_explained(written: str, answered: str) -> None:
    """A wrong setting of a budget is one line: where, what is wrong, what instead."""
    assert [f"line 6: routes.0.budget.{answered}"] == problems(route(f"budget: {{{written}}}"))


def two_budgets(first: str, second: str) -> str:
    """Write a config of two routes with these settings beside their campaign, on lines 4 and 5."""
    budget = "  - {{path: /{}, upstreams: main, budget: {{campaign: spring, {}}}}}\n"
    routes = budget.format("a", first) + budget.format("b", second)
    return GOOD.partition("  - {path")[0] + routes


@pytest.mark.parametrize(
    ("name", "one", "other", "first", "second"),
    [
        ("limit", "10", "10.5", "limit: 10", "limit: 10.50"),
        ("currency", "USD", "EUR", "limit: 10", "limit: 10, currency: EUR"),
        ("mode", "shadow", "enforce", "limit: 10, mode: shadow", "limit: 10"),
        ("on_state_loss", "serve", "deny", "limit: 10", "limit: 10, on_state_loss: deny"),
    ],
)
def test_routes_of_one_campaign_agree(
    name: str, one: str, other: str, first: str, second: str
) -> None:
    """Two routes that spend from one account differently are both named."""
    expected = (
        f"line 5: routes.1.budget.{name}: the campaign 'spring' has {name}: {one} in routes.0, and "
        f"{name}: {other} in routes.1 (write the same in both)"
    )

    assert [expected] == problems(two_budgets(first, second))


def test_routes_of_one_campaign_may_differ_in_price() -> None:
    """One account can have several prices, and its limit may be written in several ways."""
    config = read(two_budgets("limit: 10, cpm: 2", "limit: '10.00', cpm: 3, currency: USD"))

    assert ["2", "3"] == [str(each.budget.cpm) for each in config.routes if each.budget]
    assert 1 == len({each.budget.limit for each in config.routes if each.budget})


def test_money_is_the_decimal_that_is_written() -> None:
    """An amount is exactly what stands in the file, however small or large."""
    config = read(route("budget: {campaign: a, limit: 9000000000, amount: 0.100001}"))
    budget = config.routes[0].budget

    assert budget is not None
    assert Decimal("0.100001") == budget.amount
    assert Decimal(9_000_000_000) == budget.limit


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("routes.0", "reservation_ttl: 2h"),
        ("routes.0.budget", "budget: {campaign: a, limit: 1, reservation_ttl: 2h}"),
        (
            "routes.0.frequency_caps.1",
            "frequency_caps: [{limit: 1, kind: pod}, {limit: 1, window: 1h, reservation_ttl: 2h}]",
        ),
    ],
)
def test_beacons_are_taken_as_long_as_reservations_wait(where: str, line: str) -> None:
    """A beacon may not expire before a reservation that it could confirm; as long is enough."""
    expected = (
        f"line 8: server.beacon_ttl: '1h' is shorter than the reservation_ttl of {where}, 2h "
        "(write 2h or more here, or less there)"
    )

    text = route(line).replace("path: /vast", "path: /vast\n    viewer: ['query:uid']")

    assert [expected] == problems(text + "server: {beacon_ttl: 1h}")
    assert 7200.0 == read(text + "server: {beacon_ttl: 120m}").server.beacon_ttl


@pytest.mark.parametrize(
    "state",
    [
        "redis://127.0.0.1:6379",
        "rediss+cluster://r",
        "postgresql://user@host/db",
        "sqlite:///vastproxy.db",
    ],
)
def test_workers_may_share_any_other_state(state: str) -> None:
    """Several processes count together in every state but the memory of one of them."""
    config = read(GOOD + f"server: {{workers: 4}}\nstate: {state}")

    assert 4 == config.server.workers
    assert config.state.is_shared


def test_cookies_of_viewers_need_viewers() -> None:
    """A route that knows its viewers can ask an upstream that keeps their cookies."""
    text = upstream("cookies: viewer").replace(": main}", ": main, viewer: ['query:uid']}")
    config = read(text)

    assert "viewer" == config.upstreams["main"].cookies
    assert 30 * 86400.0 == config.upstreams["main"].cookie_ttl


@pytest.mark.parametrize(
    "line",
    [
        "server: {secret: hun-ter}",
        "server: {secret: [hun-ter]}",
        "server: {secret: [hun-ter-secret, hun-ter-secret]}",
        "server: {secret: {hun: hun-ter-secret}}",
        "server: [{secret: hun-ter-secret}]",
        "server: {secret: {a: [hun-ter-secret]}}",
        "log: {level: [{secret: hun-ter-secret}]}",
        "state: redis://:hun-ter@",
        "state: redis://:hun-ter@host:0",
        "state: redis://:hun-ter@more@host",
        "state: redis://:hun-ter/more@host/0",
        "state: redis://hun-ter@host",
        "state: mysql://:hun-ter@host/db",
        "state: [redis://:hun-ter@host]",
        "server: [redis://:hun-ter@host]",
        "state: {url: redis://:hun-ter@host}",
    ],
)
def test_secret_of_the_file_is_in_no_message(line: str) -> None:
    """A secret or a password that stands in the file itself is repeated by no message."""
    assert [] == [each for each in problems(GOOD + line) if "hun-ter" in each]


@pytest.mark.parametrize("name", ["a b", "", "x" * 65, "\u00e4"])
def test_name_of_an_upstream_is_short_and_plain(name: str) -> None:
    """An upstream's name is 1 to 64 letters, digits, hyphens and underscores."""
    text = (
        f"upstreams: {{'{name}': {{endpoint: https://a.tv/}}}}\nroutes: [{{path: /, upstreams: m}}]"
    )

    assert any(
        "is no name for an upstream (write 1 to 64 letters" in each for each in problems(text)
    )


def test_first_upstream_is_needed() -> None:
    """There is at least one upstream and one route, and a route has at least one upstream."""
    assert [
        "line 1: upstreams: it is empty (write at least one)",
        "line 2: routes: it is empty (write at least one)",
    ] == problems("upstreams: {}\nroutes: []")
    assert ["line 4: routes.0.upstreams: it is empty (write at least one)"] == problems(
        GOOD.replace("upstreams: main", "upstreams: []")
    )


def test_mistake_hides_no_other() -> None:
    """What needs two sections is checked although both have other mistakes."""
    text = (
        upstream("timeout: x").replace("path: /vast", "path: vast").replace(": main}", ": [mian]}")
    )

    assert [
        "line 3: upstreams.main.timeout: 'x' is no duration (write 800ms, 2s or 1h)",
        "line 6: routes.0.path: 'vast' is no path (begin it with /)",
        "line 6: routes.0.upstreams.0: no upstream is called 'mian' (did you mean 'main'?)",
    ] == problems(text)


def test_mistake_is_told_once() -> None:
    """What only follows from a mistake that is told already is not told too."""
    assert 1 == len(problems(GOOD + "server: {listen: ${LISTEN}}"))
    assert 1 == len(problems(GOOD + "server: !x {listen: a}"))
    assert 1 == len(problems(GOOD + "egress: {ports: [x]}"))


def test_words_of_yaml_stay_words() -> None:
    """``off``, ``no`` and numbers are taken as they stand, where text is wanted."""
    config = read(upstream("cookies: off"))
    params = read(upstream("params: {on: no, n: 0x10, t: 1:30, d: 2020-01-01, e: ''}"))

    assert "off" == config.upstreams["main"].cookies
    assert {"on": "no", "n": "0x10", "t": "1:30", "d": "2020-01-01", "e": ""} == {
        name: str(value) for name, value in params.upstreams["main"].params.items()
    }


def test_number_and_boolean_are_read_where_they_are_wanted() -> None:
    """The setting's type decides on what a word means."""
    config = read(route("strict: yes\n    max_hops: 0"))

    assert config.routes[0].strict is True
    assert 0 == config.routes[0].max_hops


def test_variable_is_put_in() -> None:
    """``${NAME}`` takes a variable, in part of a text too; ``$${`` is the text ``${``."""
    text = upstream('params: {a: "${A}-${B}", b: "$${CB}", c: $5, d: "$$${CB}"}')
    params = read(text, {"A": "1", "B": ""}).upstreams["main"].params

    assert {"a": "1-", "b": "${CB}", "c": "$5", "d": "$${CB}"} == {
        name: str(value) for name, value in params.items()
    }


def test_variable_may_be_a_number() -> None:
    """A variable stands for whatever the setting wants."""
    assert 3 == read(route("max_hops: ${HOPS}"), {"HOPS": "3"}).routes[0].max_hops


@pytest.mark.parametrize("value", ["s3cret-value", "s3cret'\n\\value", "s3cret" * 50])
def test_value_of_a_variable_is_in_no_message(value: str) -> None:
    """A variable may be a secret: messages have its name."""
    for line in (
        "max_body: ${KEY}",
        "hosts: ['${KEY}/']",
        "headers: {Host: '${KEY}'}",
        "cookies: ${KEY}",
    ):
        text = upstream(line)
        for problem in problems(text, {"KEY": value}):
            assert "s3cret" not in problem


@pytest.mark.parametrize(
    ("message", "key", "text"),
    [
        (
            "the campaign 'a' has limit: ${KEY} in routes.0, and limit: 8 in routes.1",
            "720000",
            two_budgets("limit: '${KEY}'", "limit: 8").replace("spring", "a"),
        ),
        (
            "the campaign '${KEY}' has limit: 7 in routes.0, and limit: 8 in routes.1",
            "autumn",
            two_budgets("limit: 7", "limit: 8").replace("spring", "'${KEY}'"),
        ),
        (
            "the reservation_ttl of routes.0, ${KEY} (write ${KEY} or more here",
            "7200s",
            route("reservation_ttl: ${KEY}") + "server: {beacon_ttl: 1h}",
        ),
    ],
)
def test_value_of_a_variable_elsewhere_is_in_no_message(message: str, key: str, text: str) -> None:
    """A message that compares two places has the value of a variable of neither."""
    (problem,) = problems(text, {"KEY": key})

    assert message in problem
    assert key not in problem


def test_long_text_is_searched_for_passwords_once() -> None:
    """A text that looks like many URLs takes no longer to read than any other."""
    text = "://a:" * 150_000

    assert [True] == [
        "is no choice here" in each for each in problems(f"{GOOD}log: {{level: '{text}'}}")
    ]
    assert 1 == len(problems(f"{GOOD}state: 'redis:{text}'"))


def test_key_takes_no_variable() -> None:
    """Only values take variables; the names of settings do not."""
    assert "line 5: ${X}: unknown setting" in problems(GOOD + "${X}: a", {"X": "log"})[0]


def test_alias_and_merge_are_followed() -> None:
    """YAML's anchors repeat a section; what stands beside ``<<`` wins over it."""
    config = read(
        "upstreams:\n"
        "  a: &a {endpoint: https://a.tv/, timeout: 2s}\n"
        "  b: {<<: *a, timeout: 3s}\n"
        "  c: {<<: [*a, {cookies: off}]}\n"
        "routes: [{path: /a, upstreams: [a, b, c]}]\n"
    )

    assert [2.0, 3.0, 2.0] == [each.timeout for each in config.upstreams.values()]
    assert "off" == config.upstreams["c"].cookies


def test_many_aliases_are_refused() -> None:
    """A file that grows by its aliases is refused before it has grown."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [[*a{n - 1}]]\n" for n in range(1, 60))

    assert [
        "line 5, column 5: more than 100000 values, with what aliases repeat (write fewer)"
    ] == (problems(bomb))
    assert "nested deeper than 50 levels, with what aliases repeat" in problems(chain)[0]
    many = "a: &a x\nb: [" + "*a," * (MAX_ALIASES + 1) + "]"
    assert f"more than {MAX_ALIASES} aliases" in problems(many)[0]


def test_file_is_read(tmp_path: Path) -> None:
    """A file is read as UTF-8, with or without a byte order mark."""
    (tmp_path / "a.yaml").write_bytes(GOOD.encode())
    (tmp_path / "b.yaml").write_bytes(GOOD.encode("utf-8-sig"))

    assert read(GOOD) == load(tmp_path / "a.yaml", {}) == load(tmp_path / "b.yaml", {})


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A file that is not there, no file, too long, or not UTF-8 is an error that names it."""
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe4\n")
    (tmp_path / "long.yaml").write_bytes(b"#" * (MAX_FILE + 1))
    expected = {
        "none.yaml": "there is no such file (give its path with -c)",
        "": "the file cannot be read: Is a directory (give the path of a readable file with -c)",
        "latin.yaml": "line 2: a byte here is no UTF-8 (save the file as UTF-8)",
        "long.yaml": "the file is longer than 1MiB (write fewer or shorter settings)",
        "\0": (
            "the file cannot be read: embedded null byte (give the path of a readable file with -c)"
        ),
    }

    for name, problem in expected.items():
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name, {})
        assert (problem,) == caught.value.problems
        assert str(tmp_path / name) == caught.value.source


def test_mistake_in_a_file_has_the_path_of_the_file(tmp_path: Path) -> None:
    """The first line of the message is the path as it was given."""
    path = tmp_path / "c.yaml"
    path.write_text("a: 1")

    with pytest.raises(ConfigError, match=r"c\.yaml: 3 errors"):
        load(path, {})


def _names() -> list[str]:
    """List the names of all settings."""
    whole = json_schema()
    sections = (whole, *whole["$defs"].values())
    return sorted({name for each in sections for name in each["properties"]})


def _structures() -> st.SearchStrategy[object]:
    """Make nested lists and mappings over the names of the settings."""
    words = ["/vast", "/a/{rest}", "main", "{query.a}", "https://a.tv/{rest}", "2s", "off", "${A}"]
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(words), st.text()
    )
    keys = st.one_of(
        st.sampled_from(_names()), st.sampled_from(["main", "X-A", "<<", "IFA", "[key]"])
    )
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(keys, inner)),
        max_leaves=30,
    )


@given(st.text())
@settings(deadline=None)
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    """Any text gives a config or a ConfigError, and no other exception."""
    with pytest.raises(ConfigError):
        read(text)


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>%@'\"#?,<= \n\t$\\U0x~")))
@settings(deadline=None)
def test_any_yaml_is_a_config_or_a_config_error(text: str) -> None:
    """Any text of YAML's own characters gives a ConfigError, alone and behind a good config."""
    for each in (text, GOOD + text, GOOD + "server: " + text):
        with suppress(ConfigError):
            read(each)


@given(_structures(), _structures(), _structures())
@settings(deadline=None)
def test_any_structure_is_a_config_or_a_config_error(
    first: object, second: object, third: object
) -> None:
    """Any YAML over the names of the settings gives a config or a ConfigError."""
    sections = {"upstreams": first, "routes": second, "server": third}
    entries = {"upstreams": {"main": first}, "routes": [second], "log": third}
    for data in (first, sections, entries):
        with suppress(ConfigError):
            read(yaml.safe_dump(data, allow_unicode=True), {"A": "1234"})


@pytest.mark.parametrize(
    "line",
    [
        "circuit_breaker: {share: true, quorum: 3}",
        "rate_limit: {rate: 100/s, share: true}",
        "cache: {scope: shared, redis: true}",
    ],
)
def test_instances_share_over_redis_only(line: str) -> None:
    """What instances have together needs a state that is Redis, whichever its URL."""
    for state in ("redis://h", "rediss://h", "redis+cluster://h", "rediss+cluster://h"):
        assert read(f"{upstream(line)}state: {state}\n").upstreams
    for state, kind in (("sqlite:///a.db", "sqlite"), ("postgresql://u:pw-pw@h/db", "postgresql")):
        (told,) = problems(f"{upstream(line)}state: {state}\n")

        assert f"this goes over Redis, and the state is {kind} (write state: redis://" in told


def test_wrong_state_is_one_mistake() -> None:
    """Where the state is no state, nobody says that it is not Redis."""
    text = f"{upstream('circuit_breaker: {share: true}')}state: reddis://h\n"

    assert ["line 7: state: this is the URL of no state"] == [
        each[: len("line 7: state: this is the URL of no state")] for each in problems(text)
    ]


def test_answers_to_cookies_are_not_for_everybody() -> None:
    """An upstream that knows viewers by their cookies has no answers that are the same for all."""
    one = "cookies: viewer\n    cache: {ttl: 60s, scope: shared}"
    text = upstream(one).replace("upstreams: main", "upstreams: main, viewer: ['query:uid']")

    (told,) = problems(text)

    assert (
        "line 4: upstreams.main.cache.scope: with cookies: viewer each viewer sends his own, and "
        "what they are answered is for him alone (write scope: viewer, or cookies: chain)"
    ) == told
    assert read(text.replace("cookies: viewer", "cookies: chain")).upstreams
    assert read(text.replace("scope: shared", "scope: viewer")).upstreams


def test_answers_for_viewers_need_viewers() -> None:
    """One route that knows viewers is enough; an upstream that no route asks needs none."""
    unknown = upstream("cache: {ttl: 60s}")
    known = "  - {path: /known, upstreams: [other, main], viewer: ['query:uid']}\n"
    other = unknown.replace("routes:", "  other: {endpoint: https://a.tv/}\nroutes:")

    (told,) = problems(unknown)

    assert (
        "line 3: upstreams.main.cache: answers are kept for each viewer, and no route that asks "
        'this upstream says where a request names one (add viewer: ["query:uid"] to routes.0, or '
        "write scope: shared)"
    ) == told
    assert read(other + known).upstreams
    assert read(other.replace("upstreams: main", "upstreams: other")).upstreams


PAID_BY_BUDGET = """\
upstreams:
  main: {endpoint: "https://a.example/", cache: {scope: shared, paid: no}}
  house: {endpoint: "https://b.example/"}
routes:
  - path: /x
    upstreams: [main, house]
    budget: {campaign: c, limit: 10, currency: USD, cpm: 2}
"""


def test_paid_and_said_not_to_be() -> None:
    """Whose ads a budget pays for cannot be said not to be paid."""
    with pytest.raises(ConfigError) as caught:
        loads(PAID_BY_BUDGET, source="config.yaml", environ={})

    assert caught.value.problems[0].startswith(
        "line 2: upstreams.main.cache.paid: the budget of routes.0 pays for each of its ads"
    )


@pytest.mark.parametrize("more", ["upstreams: [house]", "mode: off"])
def test_not_paid_by_that_budget(more: str) -> None:
    """A budget for other upstreams, and one that is off, pays for nothing here."""
    text = PAID_BY_BUDGET.replace("cpm: 2", f"cpm: 2, {more}")

    assert loads(text, source="config.yaml", environ={}).upstreams["main"].cache is not None


SOFT_AND_LATE = """\
upstreams:
  main: {endpoint: "https://a.example/", timeout: 10s, soft_timeout: 3s}
  house: {endpoint: "https://b.example/"}
routes:
  - {path: /quick, upstreams: [main, house], deadline: 3s}
  - {path: /usual, upstreams: [main, house]}
"""


def test_soft_timeout_that_never_passes() -> None:
    """A soft_timeout has to be shorter than the deadline of a route that asks the upstream."""
    (told,) = problems(SOFT_AND_LATE)

    assert (
        "line 2: upstreams.main.soft_timeout: '3s' is not shorter than the deadline of any route "
        "that asks this upstream, so that no other is ever started (write less than 3s, or null)"
    ) == told
    assert read(SOFT_AND_LATE.replace("deadline: 3s", "deadline: 3001ms")).upstreams
    assert read(SOFT_AND_LATE.replace("[main, house]", "house")).upstreams
    assert ["line 5: routes.0.deadline: 'soon' is no duration (write 800ms, 2s or 1h)"] == (
        problems(SOFT_AND_LATE.replace("deadline: 3s", "deadline: soon"))
    )


def test_slow_call_that_never_comes() -> None:
    """A call cannot be slower than its timeout, whether that is written or not."""
    line = "circuit_breaker: {slow_call: 1001ms, mode: off}"
    (told,) = problems(upstream(line))

    assert (
        "line 3: upstreams.main.circuit_breaker.slow_call: '1001ms' is longer than the timeout, "
        "1s, so that no call is ever slow (write less than the timeout, or null)"
    ) == told
    assert read(upstream(line.replace("1001ms", "1s"))).upstreams
    assert read(upstream(f"timeout: 2s\n    {line}")).upstreams
    assert ["line 3: upstreams.main.timeout: 'fast' is no duration (write 800ms, 2s or 1h)"] == (
        problems(upstream(f"timeout: fast\n    {line}"))
    )


FORWARDED = """\
upstreams:
  main: {endpoint: "https://a.example/", cache: {scope: shared, vary: ["query:x", "cookie:x"]}}
  house: {endpoint: "https://b.example/"}
routes:
  - {path: /own, upstreams: main}
  - {path: /told, upstreams: [house, main], forward_cookies: [uid, x]}
"""


def test_what_is_answered_to_a_cookie_is_never_shared() -> None:
    """A shared cache cannot vary by a cookie that a route forwards to the ad server."""
    (told,) = problems(FORWARDED)

    assert (
        "line 2: upstreams.main.cache.vary.1: routes.1 forwards the cookie 'x', and what is "
        "answered to a cookie is never shared (write scope: viewer, or take x out of the "
        "forward_cookies of routes.1)"
    ) == told


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[uid, x]", "[uid, X]"),
        ("[house, main]", "[house]"),
        ("cache:", "cookies: off, cache:"),
        ('"cookie:x"', '"cookie:y"'),
        ('"cookie:x"', '"header:x"'),
    ],
)
def test_what_is_shared_in_spite_of_cookies(old: str, new: str) -> None:
    """By a cookie that is not forwarded, or not sent, answers may be kept apart."""
    assert read(FORWARDED.replace(old, new)).upstreams
