"""
A reverse proxy in front of video ad servers.

Start reading at :mod:`vastproxy.flow.ad_server`; the map is in ``docs/design.md``.
"""

__version__ = "0.1.0"
