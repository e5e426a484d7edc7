"""The limit of a collective, in two processes of a real group without Ray."""

import os
import signal
import socket
import time

import pytest
import torch
import torch.multiprocessing as multiprocessing

from dfssd.runtime.worker_group import WorkerGroup


def _rank(rank, port, answers):
    from datetime import timedelta

    from dfssd.train import worker

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=300))
    worker.TIMEOUT_S = 2
    workers = WorkerGroup(rank, 2)
    torch.distributed.all_reduce(torch.ones(1))  # a step
    worker._shorten_timeout(workers)
    torch.distributed.all_reduce(torch.ones(1))
    answers.put((rank, os.getpid()))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    begun = time.monotonic()
    try:
        torch.distributed.all_reduce(torch.ones(1))
    except RuntimeError as error:
        answers.put((str(error), time.monotonic() - begun))


@pytest.mark.slow  # two processes that import Ray
@pytest.mark.faults
def test_after_the_first_step_a_stopped_rank_is_waited_for_shortly():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, port, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert {answers.get()[0] for _ in processes} == {0, 1}
        deadline = time.monotonic() + 60
        while answers.empty():
            assert time.monotonic() < deadline, "300 s of the first step still hold"
            time.sleep(0.05)
        said, waited = answers.get()
        assert "imed out" in said and waited == pytest.approx(2, abs=8)
    finally:
        for process in processes:
            process.kill()
            process.join()
