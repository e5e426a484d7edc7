"""One driver at a time: who makes an artefact holds a lease on it, and says so beside it.

The lease is a small file `<run>/leases/<stage>.json` with host, process and since when; its holder counts a number up every
BEAT_S. A holder on this machine is asked for directly: its process lives or not. One on another machine counts as dead when
its number has not moved for WATCH_S of our own time, so that no clock is compared with another.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dfssd.errors import DfssdError
from dfssd.runtime.retry import retried
from dfssd.runtime.storage import Storage

BEAT_S = 10.0  # between two signs of life
WATCH_S = 45.0  # without one, after which a holder elsewhere is dead
GRACE_S = 8.0  # that a living one on this machine gets to end: a killed driver's workers outlive it for a moment
CONFIRM_S = 0.5  # after which a storage that knows no locks is asked whose lease it is
LOCK_S = 20.0  # that a lock is waited for
LOCK = ".lock"  # in the folder of the leases; an empty file that stays


def machine() -> str:
    """What tells machines, restarts of one and containers on one apart."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: str(Path("/proc/self/ns/pid").readlink()),
    ):
        try:
            parts.append(read())
        except OSError:  # not Linux
            parts.append("")
    return " ".join(parts)


def began(pid: int) -> str | None:
    """When a process of this machine began (ticks since boot): its number may be given to another. None: it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)  # not Linux
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    except (OSError, IndexError):
        return ""
    return None if fields[0] in "ZX" else fields[19]


class Lease:
    """Held while a stage is made; `with Lease(run, "teacher"): ...`

    Args:
        run: storage of the run.
        name: of the artefact.

    Raises:
        DfssdError: somebody else holds it and is alive.
    """

    def __init__(self, run: Storage, name: str) -> None:
        self.store, self.name, self.file = run.at("leases"), name, f"{name}.json"
        self.lost = False
        self._done = threading.Event()
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "machine": machine(),
            "began": began(os.getpid()),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }

    def __enter__(self) -> Lease:
        begun, watched, said = time.monotonic(), (b"", time.monotonic()), False
        while not self._take():
            there = self._raw()
            if there is None:
                continue
            if there != watched[0]:
                moved, watched = bool(watched[0]), (there, time.monotonic())
            else:
                moved = False
            other = _parsed(there)
            here = other.get("machine") == self._own["machine"]
            now = time.monotonic()
            if here and not self._lives(other):
                self._remove(there)
                continue
            if not here and now - watched[1] > WATCH_S:
                print(f"{self.name}: {_who(other)} gives no sign of life, going on without it", flush=True)
                self._remove(there)
                continue
            if moved or (here and now - begun > GRACE_S):
                raise self._refusal(other)
            if not said:
                print(f"{self.name}: {_who(other)} holds this stage; waiting to see whether it is alive", flush=True)
            said = True
            time.sleep(0.5)
        threading.Thread(target=self._beat, daemon=True, name=f"lease-{self.name}").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        try:
            with self._alone():
                if not self.lost and self._is_ours(self._raw()):
                    self.store.delete(self.file)
        except OSError as failed:
            print(f"WARNING: the lease {self.store.path(self.file)} is left behind: {failed}", flush=True)

    def check(self) -> None:
        """Raise a DfssdError where another driver has taken over, as one may from a process that stood still for long."""
        if self.lost or not self._is_ours(self._raw()):
            raise DfssdError(
                f"another driver has taken over '{self.name}' while this one gave no sign of life",
                where=self.store.path(self.file),
                todo="leave it to that one, or end it and type the same command again",
            )

    def _refusal(self, other: dict[str, Any]) -> DfssdError:
        return DfssdError(
            f"'{self.name}' is being made by {_who(other)}",
            where=self.store.path(self.file),
            todo="wait until that one has finished, or end it; or take another --run-name",
        )

    def _lives(self, other: dict[str, Any]) -> bool:
        """Does a holder on this machine live? One of this very process, from a thread that was given up, does not count."""
        pid = other.get("pid")
        if not isinstance(pid, int) or pid == os.getpid():
            return False
        now = began(pid)
        return now is not None and now == other.get("began")

    def _raw(self) -> bytes | None:
        try:
            return self.store.read(self.file)
        except FileNotFoundError:
            return None

    def _is_ours(self, content: bytes | None) -> bool:
        return content is not None and _parsed(content).get("token") == self._own["token"]

    def _take(self) -> bool:
        """Write the lease where there is none; false where somebody else has one, or was faster."""
        with self._alone() as alone:
            if not self._create(json.dumps(self._own).encode()):
                return False
        if not alone:
            time.sleep(CONFIRM_S)
        return self._is_ours(self._raw())

    def _create(self, data: bytes) -> bool:
        """Write the lease unless there is one: in a folder whole and by one alone, also where locks bind one machine only."""
        if self.store.exists(self.file):
            return False
        if not self.store.is_local:
            self.store.write(self.file, data)
            return True
        draft = f"{self.file}.{self._own['token']}"
        self.store.write(draft, data)
        try:
            os.link(self.store.path(draft), self.store.path(self.file))
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            self.store.write(self.file, data)
        finally:
            self.store.delete(draft)
        return True

    def _remove(self, seen: bytes) -> None:
        """Remove the lease of a dead holder; one that somebody else has taken meanwhile stays."""
        with self._alone():
            if self._raw() == seen:
                self.store.delete(self.file)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Between a look at the lease and what is done about it nobody else does anything. Gives false where that cannot be
        had (an object store, a file system without locks, a process that stands still with the lock), and a moment remains
        in which two may act."""
        if not self.store.is_local:
            yield False
            return
        file = Path(self.store.path(LOCK))

        def opened() -> IO[str]:
            file.parent.mkdir(parents=True, exist_ok=True)
            return file.open("w")

        with retried(opened, str(file)) as lock:  # the system lets go of it when its process dies
            alone = _locked(lock)
            try:
                yield alone
            finally:
                if alone:
                    fcntl.flock(lock, fcntl.LOCK_UN)  # also of a process that was forked meanwhile

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            try:
                with self._alone():
                    if self._done.is_set():
                        return
                    self.lost = not self._is_ours(self._raw())
                    if not self.lost:
                        self._own["beat"] += 1
                        self.store.write_json(self.file, self._own)
                if self.lost:
                    print(f"WARNING: another driver has taken over '{self.name}'", flush=True)
                    return
            except OSError:  # storage is tried again for long enough; the stage itself says what is wrong with it
                continue


def _locked(file: IO[str]) -> bool:
    """Lock a file; false where it cannot be, or its holder keeps it for longer than what is done under it ever takes."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        except OSError:
            return False


def _parsed(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing where it is cut, and then only watching tells whether its holder lives."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(other: dict[str, Any]) -> str:
    return (
        f"process {other.get('pid', '?')} on {other.get('host', 'an unknown host')} (since {other.get('since', '?')})"
    )
