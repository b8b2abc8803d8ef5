"""The tree of errors is the one that its module draws, and each knows its VAST code."""

import re

import pytest

from vastproxy import errors
from vastproxy.errors import (
    ConfigError,
    UpstreamError,
    UpstreamStatusError,
    UpstreamTimeoutError,
    VastError,
    VastproxyError,
)

CLASSES = {
    name: each
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, Exception)
}
_DRAWN = re.compile(r"^ {4}([│ ]*[├└]── )?(\w+Error)\b(?: +(\d{3}):)?", re.MULTILINE)


def drawn() -> list[tuple[int, str, str]]:
    """Read depth, name and code of each line of the picture in the module's docstring."""
    found = _DRAWN.finditer(errors.__doc__ or "")
    return [(len(each[1] or "") // 4, each[2], each[3] or "") for each in found]


def parents() -> dict[str, str]:
    """Name the parent that the picture gives to each class but the root."""
    path: list[str] = []
    above = {}
    for depth, name, _ in drawn():
        path[depth:] = [name]
        if depth:
            above[name] = path[depth - 1]
    return above


def test_picture_is_whole() -> None:
    """Every class of the module stands in the picture, below the class it derives from."""
    real = {name: each.__bases__[0].__name__ for name, each in CLASSES.items()}

    assert "Exception" == real.pop("VastproxyError")
    assert parents() == real


@pytest.mark.parametrize(("name", "code"), [(name, code) for _, name, code in drawn() if code])
def test_code_is_as_drawn(name: str, code: str) -> None:
    """The VAST code of a class is the one in the picture."""
    assert int(code) == CLASSES[name].vast_code


def test_codes_are_where_documents_and_servers_fail() -> None:
    """Documents and ad servers have VAST codes; a wrong configuration has none."""
    assert all(
        hasattr(each, "vast_code") == issubclass(each, VastError | UpstreamError)
        for each in CLASSES.values()
    )


def test_config_error_lists_all_problems() -> None:
    """A configuration error counts the mistakes and gives each a line of its own."""
    one, two = ConfigError("c.yaml", ("a: b",)), ConfigError("c.yaml", ("a: b", "c: d"))

    assert "c.yaml: 1 error\n  a: b" == str(one)
    assert "c.yaml: 2 errors\n  a: b\n  c: d" == str(two)


def test_upstream_errors_tell_their_reason() -> None:
    """An upstream's error has a reason, a status error its number, a timeout whose it was."""
    late = UpstreamTimeoutError("late", starved=True)

    assert ("late", True) == (late.reason, late.starved)
    assert not UpstreamTimeoutError("late").starved
    assert (503, "HTTP status 503") == (
        UpstreamStatusError(503).status,
        UpstreamStatusError(503).reason,
    )
    assert isinstance(late, VastproxyError)
