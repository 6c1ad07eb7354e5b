"""What a process asks of the C library's memory."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAX_KEPT_BYTES = 256 << 20
_MAX_BLOCK_BYTES = 32 << 20  # the most that glibc accepts


def keep_freed_memory() -> None:
    """Let glibc keep what one clip frees for the next, up to a bound.

    By default it hands large blocks back to the system and has them faulted in again: a tenth to a sixth of the
    time of a short sound.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAX_BLOCK_BYTES)
