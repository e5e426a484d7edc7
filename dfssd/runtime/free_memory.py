"""How much memory this process may still take."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_LIMITS = (  # of a container: limit, what is used, and where the part of it that files take is named; cgroup 2, then 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(proc: str = "/proc/meminfo", cgroup: str = "/sys/fs/cgroup") -> int:
    """Bytes that are free on the machine, or in the container (Docker, Kubernetes) where that has less; a very large number
    where neither is known (macOS)."""
    least = sys.maxsize
    with suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":", 1) for line in Path(proc).read_text().splitlines())
        least = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used, files in _LIMITS:
        with suppress(OSError, ValueError, KeyError):  # another version of cgroup, or "max"
            most, taken = (int((Path(cgroup) / name).read_text()) for name in (limit, used))
            stat = (Path(cgroup) / limit).with_name("memory.stat").read_text()
            # What files take the kernel gives up where others need it.
            kept = int(dict(line.split() for line in stat.splitlines())[files])
            least = min(least, max(0, most - taken + kept))
    return least
