"""How the workers of a group find each other: as Ray does it, but on a machine of its own through loopback alone.

PyTorch's meeting point (TCPStore) listens on all interfaces whatever it is told, and gloo on the one that the host's name
leads to. Where all workers lie on one machine whose Ray lives on loopback they meet in a file and talk over the loopback
interface, so that nothing can be reached from outside.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def on_loopback(addresses: Sequence[str]) -> bool:
    """Are these nodes one machine that only itself can reach?"""
    return len(set(addresses)) == 1 and ipaddress.ip_address(addresses[0]).is_loopback


def loopback_interface() -> str:
    """'lo' on Linux, 'lo0' on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def meet_in_file(path: str, place: int, size: int, backend: str, timeout_s: float) -> None:
    """Join a process group of this machine; nothing of it listens outside loopback.

    Args:
        place: rank in it.
    """
    for name in INTERFACES:
        os.environ.setdefault(name, loopback_interface())
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=f"file://{path}", rank=place, world_size=size, timeout=timeout)


class _Backend(_TorchBackend):
    """Ray's, but for groups on loopback."""

    meeting: str | None = None

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if not on_loopback([worker.metadata.node_ip for worker in worker_group.get_workers()]):
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        size, self.meeting = len(worker_group), str(Path(tempfile.gettempdir()) / f"dfssd-group-{uuid.uuid4().hex}")
        own = {
            "path": self.meeting,
            "size": size,
            "backend": backend_config.backend,
            "timeout_s": backend_config.timeout_s,
        }
        joined = [worker_group.execute_single_async(rank, meet_in_file, place=rank, **own) for rank in range(size)]
        ray.get(joined, timeout=backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            if self.meeting:
                Path(self.meeting).unlink(missing_ok=True)


@dataclass
class GroupConfig(TorchConfig):
    """Ray's, with our way to meet."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
