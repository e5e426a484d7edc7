"""A storage that fails for a moment is tried again; one that fails for good ends in a sentence."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from dfssd.errors import StorageError, mask

R = TypeVar("R")
RETRY_S = 30.0  # how long a storage that fails is tried again
FIRST_WAIT_S = 0.25  # before the second try; doubled each time

_FOR_GOOD = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
_REFUSED = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN",
)
# By "is it a local path": when the first and the last failure since the last success were (monotonic seconds).
_failing: dict[bool, tuple[float, float]] = {}


def retried(call: Callable[[], R], where: str) -> R:
    """`call()`, tried again while its storage fails for a moment. A dead store is waited for once, not at every file.

    Raises:
        FileNotFoundError: as `call` raises it.
        StorageError: it fails for good, or has failed for RETRY_S.
    """
    kind, begun, wait, tries = where.startswith("/"), time.monotonic(), FIRST_WAIT_S, 0
    while True:
        tries += 1
        try:
            result = call()
        except FileNotFoundError:
            raise
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            now = time.monotonic()
            first, last = _failing.get(kind, (begun, begun))
            first = begun if now - last > 2 * RETRY_S else min(first, begun)
            _failing[kind] = first, now
            refused = error.errno in _FOR_GOOD or any(word in str(error) for word in _REFUSED)
            if refused or now + wait - first > RETRY_S:
                raise storage_error(error, where, refused) from error
            if tries == 1:
                print(f"WARNING: storage fails, will try again for {RETRY_S:.0f} s: {mask(str(error))}", flush=True)
            time.sleep(wait)
            wait *= 2
        else:
            _failing.pop(kind, None)
            return result


def storage_error(error: OSError, where: str, refused: bool) -> StorageError:
    """What the user reads of a storage that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, todo = f"the storage is full: {error}", "make room; the same command goes on from here"
    elif refused:
        what, todo = f"the storage refuses: {error}", "give the rights or credentials for it, or another --storage-path"
    else:
        what = f"the storage does not answer, after {RETRY_S:.0f} s of trying: {error}"
        todo = "nothing was marked or deleted; once it is back, the same command goes on from here"
    return StorageError(what, where=where, todo=todo)
