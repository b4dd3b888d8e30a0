"""What a process that makes sound asks of the system: real-time priority, and memory that is never on the disk."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path

AUDIO_PRIORITY = 20
"""Of the round-robin real-time class."""
MCL_CURRENT, MCL_FUTURE, CAP_IPC_LOCK = 1, 2, 14  # linux/mman.h, linux/capability.h


def be_urgent() -> None:
    """Ask for real-time priority, where the system grants it."""
    with contextlib.suppress(Exception):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(AUDIO_PRIORITY))


def may_lock_memory() -> bool:
    """Whether this process may lock as much memory as it likes.

    Under any limit, all that is locked counts, and memory that it asks for later would be refused.
    """
    if sys.platform != "linux":
        return False
    import resource

    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> CAP_IPC_LOCK & 1)


def lock_memory() -> bool:
    """Keep all memory of this process, and what it takes later, where the sound need not wait for the disk.

    False where the system does not grant it; nothing has changed then.
    """
    return may_lock_memory() and ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_FUTURE) == 0
