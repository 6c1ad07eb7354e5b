"""What a process asks of the C library's memory, and how much memory it holds."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

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


def memory_bytes(device: torch.device) -> dict[str, float]:
    """This process's resident memory now; on an accelerator also the peaks of what was in use and what was held."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"resident_bytes": float(resident_pages * resource.getpagesize())}
    if device.type == "cuda":
        found["device_allocated_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
        found["device_reserved_peak_bytes"] = float(torch.cuda.max_memory_reserved(device))
    return found
