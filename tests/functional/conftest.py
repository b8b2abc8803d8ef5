"""What the functional tests share: an ad server of ours, and proxies as real processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.ad_server import AdServer, Reply, in_thread
from tests.support.proxy import Proxy, running_proxy

StartProxy = Callable[[dict[str, Any]], Proxy]

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
"""Loopback addresses, each of which is a host of its own to a cookie jar."""


@pytest.fixture(scope="module")
def ad_server() -> Iterator[AdServer]:
    """Run an ad server for the tests of a module, in a thread, on three hosts."""
    with in_thread(AdServer(addresses=HOSTS)) as server:
        yield server


@pytest.fixture
def ads(ad_server: AdServer) -> AdServer:
    """Give the module's ad server as if new: it knows no answer, and was asked for nothing."""
    ad_server.requests.clear()
    ad_server.replies.clear()
    ad_server.fallback = Reply(status=404)
    return ad_server


@pytest.fixture(scope="module")
def start_module_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartProxy]:
    """Start proxies that live as long as the tests of a module; all must end with exit code 0."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("proxies")
        yield lambda config: stack.enter_context(running_proxy(config, directory))


@pytest.fixture
def start_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartProxy]:
    """Start proxies that live as long as one test; all must end with exit code 0."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("proxies")
        yield lambda config: stack.enter_context(running_proxy(config, directory))
