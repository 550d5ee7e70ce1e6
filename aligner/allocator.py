"""How the C library comes by memory, and gives it back.

XLA's CPU client allocates a program's temporaries, gigabytes, anew for every run of it, and the kernel then maps and clears each page of
4 KiB on first touch: a tenth of a training step, some of it on one thread. With pages of 2 MiB that is gone. glibc can ask for them, but
reads its settings when a program starts.
"""

import ctypes
import os
import sys
from pathlib import Path

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def restart_with_huge_pages() -> None:
    """Start this program again, as the same process, with huge pages asked for: where the kernel gives them only on demand, and once.

    To be called first, and by programs alone: everything done so far is lost. Nothing happens on other systems, or where the variable
    GLIBC_TUNABLES already says what is wanted (`glibc.malloc.hugetlb=0` turns this off).
    """
    tunables = os.environ.get(VARIABLE, "")
    if SETTING in tunables or not MODE.exists() or "[madvise]" not in MODE.read_text():
        return
    os.environ[VARIABLE] = ":".join(filter(None, [tunables, f"{SETTING}=1"]))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back() -> None:
    """Return to the system what was freed and the C library still holds: hundreds of MiB after weights were read and programs compiled.

    It takes hundredths of a second. Nothing happens where the C library is not glibc.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
