"""Time out, but not because this process was busy itself."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

STUCK = 0.01
"""Seconds that the event loop may be late before a time-out is no proof against the backend."""
NEARLY = 0.1
"""Of a time-out: what is left over when it has passed, as there is always a little to do."""
MAX_PATIENCE = 20
"""A call takes so many times its time-out at the most, however busy the machine is."""


@asynccontextmanager
async def patient(seconds: float) -> AsyncIterator[None]:
    """
    Time out after *seconds* in which this thread had nothing to do.

    While it works, or waits for a CPU, an answer may have come long ago: that time is no proof
    against the backend. At 200 requests at once on a busy machine, it is nearly all of the time.
    In MAX_PATIENCE times *seconds* it is over in any case.
    """
    loop = asyncio.get_running_loop()
    began, busy = loop.time(), _busy_time()
    async with asyncio.timeout(None) as limit:

        def ring(due: float) -> None:
            now = loop.time()
            left = seconds - (now - began - (_busy_time() - busy))
            if now - due > STUCK:
                # It slept where it should not: the answer may be read in this very look.
                left = max(left, seconds)
            if left < seconds * NEARLY or now - began >= seconds * MAX_PATIENCE:
                limit.reschedule(now)
            else:
                timer[0] = loop.call_later(left, ring, now + left)

        timer = [loop.call_later(seconds, ring, began + seconds)]
        try:
            yield
        finally:
            timer[0].cancel()


def _busy_time() -> float:
    """Give the seconds that this thread has worked, or waited for a CPU (the latter on Linux)."""
    try:
        # Run time, run delay and time slices: Documentation/scheduler/sched-stats.rst.
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return time.thread_time()
    try:
        ran, waited, *_ = os.read(file, 100).split()
    finally:
        os.close(file)
    return (int(ran) + int(waited)) / 1e9
