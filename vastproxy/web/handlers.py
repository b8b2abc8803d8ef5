"""
From aiohttp's request to ours, and from our answer to aiohttp's.

Rule 1: what a client says about somebody else (``X-Forwarded-For``, ``X-Device-*``,
``X-Request-Id``) is believed from trusted proxies only.
Rule 2: every answer, an empty one and an error too, carries the CORS headers of VAST 4.3
section 3: without them a player reports a network error instead of "no ad".
"""

import re
import socket
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy

from vastproxy.flow.beacons import SUFFIX
from vastproxy.model import AdRequest, AdResponse, Device, Query, clean

ALLOWED = "GET, HEAD, OPTIONS"
EXPOSED = "X-Request-Id, Server-Timing, Cache-Status"
PREFLIGHT_SECONDS = "86400"
CONTENT_TYPE = "application/xml; charset=utf-8"

_HOST = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")

Networks = tuple[IPv4Network | IPv6Network, ...]


def ad_request(
    request: web.BaseRequest, route: str, rest: str, *, trusted: Networks, received: float
) -> AdRequest:
    """Read what the flow needs of *request*; *received* is a time on the loop's clock."""
    peer = request.remote or ""
    # Of a connection that was reset at once, there is no address either: that is no Unix socket.
    believed = _is_trusted(peer, trusted) if peer else is_local(request)
    return AdRequest(
        route=route,
        rest=clean(rest),
        query=Query(clean(_raw_query(request))),
        headers=request.headers,
        device=_device(request.headers, peer, trusted if believed else None),
        request_id=request.headers.get("X-Request-Id", "") if believed else "",
        received=received,
    )


def raw_path(request: web.BaseRequest) -> str:
    """Give the path as it was sent, without the query; also for a request in absolute form."""
    path = request.raw_path
    if not path.startswith("/"):
        path = "/" + path.partition("?")[0].partition("://")[2].partition("/")[2]
    return path.partition("?")[0]


def _raw_query(request: web.BaseRequest) -> str:
    return request.raw_path.partition("?")[2].partition("#")[0]


def _is_trusted(peer: str, trusted: Networks) -> bool:
    """Whether *peer*, an address, is one of ours."""
    if not trusted:
        return False
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    return any(address in network for network in trusted)


def is_local(request: web.BaseRequest) -> bool:
    """Whether *request* came over a Unix socket: who may open it is trusted."""
    opened = request.transport.get_extra_info("socket") if request.transport else None
    return opened is not None and opened.family == socket.AF_UNIX


def _device(headers: CIMultiDictProxy[str], peer: str, trusted: Networks | None) -> Device:
    """Say who asks; *trusted* is None where the peer itself is not believed."""
    agent = clean(headers.get(hdrs.USER_AGENT, ""))
    referer = clean(headers.get(hdrs.REFERER, ""))
    language = clean(headers.get(hdrs.ACCEPT_LANGUAGE, ""))
    requested_with = clean(headers.get("X-Requested-With", ""))
    if trusted is None:
        return Device(peer, agent, referer, language, requested_with, peer)
    # Each proxy may add a line of its own (RFC 9110 section 5.3): one list, in their order.
    listed = ",".join(headers.getall("X-Forwarded-For", ())).split(",")
    chain = [part.strip() for part in listed if part.strip()]
    return Device(
        ip=_address(headers.get("X-Device-IP", "")) or _first_untrusted(chain, trusted) or peer,
        user_agent=clean(headers.get("X-Device-User-Agent", "")) or agent,
        referer=clean(headers.get("X-Device-Referer", "")) or referer,
        accept_language=clean(headers.get("X-Device-Accept-Language", "")) or language,
        requested_with=clean(headers.get("X-Device-Requested-With", "")) or requested_with,
        forwarded_for=", ".join([*chain, *([peer] if peer else [])]),
    )


def _first_untrusted(chain: list[str], trusted: Networks) -> str:
    """Give the last address of *chain* that is not one of ours: what is before it may be forged."""
    for each in reversed(chain):
        address = _address(each)
        if not address:
            return ""
        if not _is_trusted(address, trusted):
            return address
    return _address(chain[0]) if chain else ""


def _address(text: str) -> str:
    """Give *text* if it is an IP address, without port and brackets; else nothing."""
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        return str(ip_address(host.partition("%")[0]))
    except ValueError:
        return ""


def cors(request: web.BaseRequest) -> CIMultiDict[str]:
    """
    Give the headers that let a player read the answer (VAST 4.3 section 3).

    The origin is echoed, with credentials; where there is none, or ``null``, anybody may read,
    and credentials are not mentioned: some players break on the two together.
    """
    origin = request.headers.get(hdrs.ORIGIN, "")
    headers: CIMultiDict[str] = CIMultiDict()
    if origin and origin != "null":
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = clean(origin)
        headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"
    else:
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
    headers[hdrs.VARY] = hdrs.ORIGIN
    headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED
    headers[hdrs.SERVER] = "vastproxy"
    return headers


def answered(request: web.BaseRequest, response: AdResponse, seconds: float) -> web.Response:
    """Write an ad response that took *seconds*."""
    headers = cors(request)
    headers[hdrs.CONTENT_TYPE] = CONTENT_TYPE
    headers[hdrs.CACHE_CONTROL] = "no-store"
    headers["X-Request-Id"] = response.request_id
    steps = [*response.timings, ("total", seconds * 1000)]
    headers["Server-Timing"] = ", ".join([f"{name};dur={took:.1f}" for name, took in steps])
    if response.cache_status:
        headers["Cache-Status"] = ", ".join(response.cache_status)
    return web.Response(body=response.body, headers=headers)


def preflight(request: web.BaseRequest) -> web.Response:
    """Answer ``OPTIONS``: players that add headers ask first."""
    headers = cors(request)
    headers[hdrs.ALLOW] = ALLOWED
    headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = ALLOWED
    headers[hdrs.ACCESS_CONTROL_MAX_AGE] = PREFLIGHT_SECONDS
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
    if asked:
        headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = clean(asked)
    return web.Response(status=204, headers=headers)


PIXEL: Final = bytes.fromhex(
    "47494638396101000100800000000000ffffff21f90401000000002c000000000100010000020144003b"
)
"""A picture of one transparent point, as GIF89a has it."""


def beacon_answer(request: web.BaseRequest, token: str, status: int) -> web.Response:
    """
    Answer a beacon with *status*: nothing, or a picture where the player wants to see one.

    It does if the *token* ends in ``.gif``, or if it asks for pictures first, as ``<img>`` does.
    """
    headers = cors(request)
    headers[hdrs.CACHE_CONTROL] = "no-store"
    wanted = request.headers.get(hdrs.ACCEPT, "").startswith("image/")
    if status != web.HTTPNoContent.status_code or not (wanted or token.endswith(SUFFIX)):
        return web.Response(status=status, headers=headers)
    headers[hdrs.CONTENT_TYPE] = "image/gif"
    return web.Response(body=PIXEL, headers=headers)


def public_base(request: web.BaseRequest, trusted: Networks) -> str:
    """
    Say where the player reached the proxy: ``https://ads.example.com``.

    ``X-Forwarded-Proto`` and ``X-Forwarded-Host`` count from trusted proxies only. A Host that
    is none is passed over: then it is the address that the connection came to.
    """
    scheme, host = request.scheme, request.headers.get(hdrs.HOST, "")
    peer = request.remote or ""
    if _is_trusted(peer, trusted) if peer else is_local(request):
        scheme = _first(request.headers.get("X-Forwarded-Proto", "")).lower() or scheme
        host = _first(request.headers.get("X-Forwarded-Host", "")) or host
    if not _HOST.fullmatch(host):
        host = _own_address(request)
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def _first(listed: str) -> str:
    """Give what the outermost of several proxies said."""
    return listed.partition(",")[0].strip()


def _own_address(request: web.BaseRequest) -> str:
    place = request.transport.get_extra_info("sockname") if request.transport else None
    if not isinstance(place, tuple):
        return "localhost"
    host, port = place[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def refused(request: web.BaseRequest, status: int, text: str) -> web.Response:
    """Answer with an HTTP error *status*, and say why in plain *text*."""
    headers = cors(request)
    if status == web.HTTPMethodNotAllowed.status_code:
        headers[hdrs.ALLOW] = ALLOWED
    return web.Response(status=status, text=text + "\n", headers=headers)
