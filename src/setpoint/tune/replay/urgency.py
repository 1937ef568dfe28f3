"""Run ahead of what else wants a CPU, so that requests leave when they are due.

A server that computes on every CPU makes a client beside it wait for its turn: milliseconds that the tripwire on send
lag would, rightly, not forgive. The client's processes use little of a CPU, so letting them in at once costs the
server next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

NICE = -15


def _real_time() -> str:
    if not hasattr(os, "sched_setscheduler"):
        raise OSError("no such call here")
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    return "real time"


def _nice() -> str:
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    return f"nice {NICE}"


WAYS: tuple[Callable[[], str], ...] = (_real_time, _nice)


def become_urgent(ways: Sequence[Callable[[], str]] = WAYS) -> str:
    """The first way that the system allows, for this thread and those it starts; "none" where it allows none."""
    for way in ways:
        try:
            return way()
        except OSError:
            continue
    return "none"
