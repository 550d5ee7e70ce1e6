"""Who works on a file: a lock that is the system's and goes with the process, however that ends."""

import fcntl
from typing import IO


def take(file: IO) -> bool:
    """Whether this process has the lock of an open file now, until that is closed. Always where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
