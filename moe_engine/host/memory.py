"""What the C library does with freed memory, for training on CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation; False where the C library is another.

    By default it returns every large block to the system, which hands it out again as zeroed pages: hundreds of
    megabytes of activations and gradients would be mapped and cleared anew in each step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
