"""A port of loopback for a service of this job, which no other job takes meanwhile."""

from __future__ import annotations

import errno
import socket
import sys

_claims: dict[int, socket.socket] = {}  # ports that this process has chosen


def free_port(first: int) -> int:
    """The first port of loopback, from this one on, that nobody listens on, and that no other job is about to take."""
    for port in range(first, first + 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if _claim(port):
            return port
    return first


def _claim(port: int) -> bool:
    """Is the port this job's? Ray listens on it seconds from now, and a job that starts meanwhile would choose it too.

    By a socket of Linux' own kind, whose name has no file and ends with this process; elsewhere nobody is asked.
    """
    if port in _claims or not sys.platform.startswith("linux"):
        return True
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0dfssd-dashboard-{port}")
    except OSError as error:
        name.close()
        return error.errno != errno.EADDRINUSE  # where such names are forbidden nobody is asked either
    _claims[port] = name
    return True
