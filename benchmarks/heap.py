"""The C library's heap during a benchmark: whether freed memory stays mapped."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4
"""Parameters of mallopt, from glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Lets this process reuse what it frees, instead of unmapping it and mapping it anew at the next allocation.

    By default glibc gives a large freed tensor back to the system, and the next one of its size costs a page fault for
    every 4 KB: more than most operators. Whether that happens depends on what else has been allocated, so two runs of
    one program differ. Allocators made for such loads (jemalloc, tcmalloc) do not unmap either.

    Returns:
        whether the C library took the settings; one other than glibc has its own ways, and is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
