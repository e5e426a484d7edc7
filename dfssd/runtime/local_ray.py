"""The processes of a local Ray are watched: where one is lost, Ray ends this process from C++, and nobody reads why."""

from __future__ import annotations

import os
import threading
from typing import Any

from ray._private import worker

WATCHED = ("raylet", "gcs_server")  # the machine's own process, which holds the object store; the control service
_watched: set[int] = set()  # process ids


def watch_local_ray() -> None:
    """Watch the processes that this process's `ray.init` has started, each from a thread; those of a cluster are not ours."""
    node = worker._global_node
    for kind in WATCHED if node is not None else ():
        for info in node.all_processes.get(kind, ()):
            if info.process.pid not in _watched:
                _watched.add(info.process.pid)
                threading.Thread(
                    target=_wait_for, args=(kind, info.process.pid), daemon=True, name=f"watch-{kind}"
                ).start()


def _wait_for(kind: str, pid: int) -> None:
    """Wait for the end of a process; where nobody has asked for it, say so and end this one at once, as Ray would."""
    how = "it is gone"
    try:
        ended: Any = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # whoever started it still learns how it ended
        how = f"signal {ended.si_status}" if ended.si_code != os.CLD_EXITED else f"exit code {ended.si_status}"
    except ChildProcessError:  # somebody else has asked first
        pass
    if not hasattr(worker.global_worker, "core_worker"):  # `ray.shutdown` lets go of it before it ends processes
        return
    text = (
        f"\nerror: the local Ray has lost its {kind} ({how}), and this job with it\n"
        "  to do: the same command goes on from here; if it comes again, the machine may have run out of memory: give fewer "
        "--num-workers, --num-actors or --loader-workers\n"
    )
    os.write(2, text.encode())
    os._exit(2)  # Ray's own end is as sudden, and comes without a word
