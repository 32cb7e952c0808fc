"""Memory that a step frees is kept for the next one.

A training step on a CPU takes and frees hundreds of megabytes for every micro-batch. The C library gives them back to
the system and asks again, and each page is cleared when it is first touched: 50,000 to 120,000 page faults a step of
the benchmark, three per cent of its time.
"""

from __future__ import annotations

import ctypes
import platform

# The numbers of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {
    _MMAP_THRESHOLD: 2**30,  # below this, memory comes from the heap and not from the system; setting one of
    # these ends glibc's own adaptation of it, so it has to be set too
    _TRIM_THRESHOLD: 2**31 - 1,  # free memory at the heap's end that is kept
    _TOP_PAD: 2**26,  # taken at once when the heap grows
}


def keep_freed_memory() -> bool:
    """Has this process keep what it frees, up to 2 GiB; its peak stays what it is.

    Returns:
        Whether it does: glibc only. With another C library (musl, macOS) nothing is changed, and steps are as right.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(name, value) == 1 for name, value in _SETTINGS.items()])
