"""
What an ad server is told about the device that asks: VAST 4.3 section 1.1.3.

The headers say the same as ``[DEVICEIP]`` and ``[DEVICEUA]``, as the specification demands.
"""

import re
from typing import Literal

from vastproxy.model import Device
from vastproxy.version import __version__

PROXY_USER_AGENT = f"vastproxy/{__version__}"

_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f]")


def safe(value: str) -> str:
    """Make *value* fit for a header: no control characters, no lone surrogates."""
    return _UNSAFE.sub(" ", value.encode("utf-8", "replace").decode()).strip()


def device_headers(
    device: Device,
    *,
    user_agent: Literal["device", "proxy"] = "device",
    forwarded_for: Literal["set", "append", "off"] = "set",
) -> tuple[tuple[str, str], ...]:
    """Give the headers that describe *device*, in the order they are sent."""
    agent = safe(device.user_agent)
    headers = [
        ("Accept", "application/xml, text/xml;q=0.9, */*;q=0.8"),
        ("User-Agent", agent if agent and user_agent == "device" else PROXY_USER_AGENT),
    ]
    addresses = {"set": device.ip, "append": device.forwarded_for or device.ip, "off": ""}
    optional = (
        ("X-Device-IP", device.ip),
        ("X-Device-User-Agent", agent),
        ("X-Device-Referer", safe(device.referer)),
        ("X-Device-Accept-Language", safe(device.accept_language)),
        ("X-Device-Requested-With", safe(device.requested_with)),
        ("X-Forwarded-For", safe(addresses[forwarded_for])),
    )
    headers += [(name, value) for name, value in optional if value]
    return tuple(headers)
