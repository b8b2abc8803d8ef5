"""The time of backends that have no server to ask for it."""

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], int]:
    """
    Make a clock in Unix milliseconds that does not follow steps of the machine's.

    It begins at the machine's time and runs with the monotonic one, which all processes of a
    machine share: those that start together agree.
    """
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: (time.monotonic_ns() + offset) // 1_000_000
