"""How a process keeps its memory."""

import ctypes
import platform

import jax

# Names of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has malloc hand freed memory out again instead of giving it back to the system.

    For XLA's CPU backend, which takes the temporary memory of a program anew at every
    call: glibc maps what is large, so each page of it is faulted in and cleared, call
    after call. A turn of 32 rows over 1,437 slots faults 150,000 pages in.

    One arena, whose top is never trimmed, and no mappings. A thread that has allocated
    before keeps its own arena, so call it before anything is computed. No result
    changes; the process stays as large as it has ever been.

    Returns:
      Whether it was done: on glibc, where the backend is a CPU.
    """
    if jax.default_backend() != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = (ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)
    done = [mallopt(setting, value) == 1 for setting, value in wanted]
    return all(done)
