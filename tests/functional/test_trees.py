"""Random trees of documents through the real proxy: every ad right, and in pod order."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.functional.conftest import StartProxy
from tests.support.ad_server import AdServer
from tests.support.proxy import Proxy, a_config, run_vastproxy
from tests.support.trees import Tree, grow, misfits
from tests.support.vast_facts import faults, read

TREES = 500
TREES_BY_COMMAND = 60
TREES_AT_ONCE = 10
TREES_TWICE = 30
"""How many trees each way of asking gets: the first seeds."""

COMMANDS_AT_ONCE = 2


def tree_config(endpoint: str) -> dict[str, Any]:
    """Build a config that resolves whatever is below *endpoint*, with time for a busy machine."""
    return a_config(
        {"ads": {"endpoint": f"{endpoint}/{{rest}}", "timeout": "10s"}},
        [{"path": "/tree/{rest}", "upstreams": ["ads"], "deadline": "20s"}],
    )


@pytest.fixture(scope="module")
def proxy(start_module_proxy: StartProxy, ad_server: AdServer) -> Proxy:
    """Run the proxy that all trees go through."""
    return start_module_proxy(tree_config(ad_server.url()))


@pytest.fixture(scope="module")
def outer(start_module_proxy: StartProxy, ad_server: AdServer) -> Proxy:
    """Run the second one of two proxies in a row."""
    return start_module_proxy(tree_config(ad_server.url()))


def planted(seed: int, ads: AdServer, *, first_hop: str = "") -> Tree:
    """Grow the tree of *seed*, and let *ads* serve it."""
    tree = grow(seed, ads.url(), first_hop=first_hop)
    ads.replies.update(tree.pages)
    return tree


@pytest.mark.parametrize("seed", range(TREES))
def test_tree(seed: int, proxy: Proxy, ads: AdServer) -> None:
    """Every level's facts are in the answer as often as VAST says, ad by ad, in pod order."""
    tree = planted(seed, ads)
    answer = proxy.get(f"/tree{tree.entry}")

    assert 200 == answer.status
    assert [] == misfits(tree, answer.body)


@pytest.mark.parametrize("first", range(0, TREES_BY_COMMAND, TREES_AT_ONCE))
def test_trees_by_command(first: int, ads: AdServer) -> None:
    """``vastproxy resolve`` gives the same answers as the server."""
    trees = [planted(seed, ads) for seed in range(first, first + TREES_AT_ONCE)]

    def resolve(tree: Tree) -> list[str]:
        allow = ("--egress-allow", "127.0.0.0/8", "--timeout", "30s")
        done = run_vastproxy("resolve", ads.url(tree.entry), *allow)
        if not done.stdout:
            return [done.stderr.decode()]
        return misfits(tree, done.stdout)

    with ThreadPoolExecutor(COMMANDS_AT_ONCE) as pool:
        told = dict(zip([tree.seed for tree in trees], pool.map(resolve, trees), strict=True))

    assert {} == {seed: wrong for seed, wrong in told.items() if wrong}


@pytest.mark.parametrize("seed", range(TREES_TWICE))
def test_two_proxies_are_one(seed: int, outer: Proxy, proxy: Proxy, ads: AdServer) -> None:
    """A first wrapper that leads to another proxy gives what one proxy gives for the whole."""
    tree = planted(seed, ads, first_hop=f"{proxy.base}/tree")
    answer = outer.get(f"/tree{tree.entry}")

    assert [] == misfits(tree, answer.body)


@pytest.mark.parametrize("seed", range(TREES_TWICE))
def test_again_changes_nothing(seed: int, proxy: Proxy, ads: AdServer) -> None:
    """An answer that is resolved again stays as it is."""
    tree = planted(seed, ads)
    once = proxy.get(f"/tree{tree.entry}").body
    ads.replies[f"/again/{seed}"] = once
    again = proxy.get(f"/tree/again/{seed}").body

    assert [] == faults(again)
    assert read(once) == read(again)
    assert len(tree.ads) == len(read(again))
