"""What a worker, trial, task or actor asks for, so that it fits on one node of the cluster as it is now. No Ray in here.

A worker lies on one node: two free CPUs on each of two nodes are room for two workers of two CPUs, for none of four. Ray does
not refuse what no node has; it waits for such a node, for ever. So everything asked for is computed here from the nodes, and
what cannot be placed is said in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dfssd.config.choices import Gpu

LEAST_CPUS = 0.1  # of a worker that shares a core with others; below it more workers do nothing but wait
SIDE_TASKS_CPUS = (
    0.5  # left on a node beside its labelling actors: a task that decodes and one that writes, a quarter each
)
CHECK_GIB = 1.0  # of a task that checks images: a process of 0.3 GiB, and one picture of 50 million px with its copies
CPUS_OF_AN_ACTOR = 8  # CPUs a labelling actor without a GPU uses well
ROUNDING = 1e-6


@dataclass(frozen=True)
class Node:
    """A node that takes tasks: what it has, and what of it is free now (by default all).

    Args:
        memory_gib: memory that Ray hands out (GiB); only trials ask for any.
    """

    cpus: float
    gpus: float = 0.0
    memory_gib: float = 1e6
    free_cpus: float = -1.0
    free_gpus: float = -1.0
    free_memory_gib: float = -1.0

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "memory_gib"):
            if getattr(self, f"free_{name}") < 0:
                object.__setattr__(self, f"free_{name}", float(getattr(self, name)))

    def emptied(self) -> Node:
        """The node as it is when nobody else uses it."""
        return Node(self.cpus, self.gpus, self.memory_gib)


@dataclass(frozen=True)
class Resources:
    """What one training worker gets."""

    cpus: float
    threads: int
    gpu: bool

    @classmethod
    def of_share(cls, cpus: float, gpu: bool) -> Resources:
        """Whole CPUs of a share, or a little less than a share below one, so that all shares always fit."""
        cpus = float(int(cpus + ROUNDING)) if cpus >= 1 else round(cpus * 0.95, 2)
        return cls(cpus=cpus, threads=max(1, int(cpus)), gpu=gpu)

    def describe(self, workers: str | int) -> str:
        """What each of so many workers (2, or 1:4) has, in words."""
        return f"{str(workers).replace(':', ' to ')} worker(s) with {self.each()}"

    def each(self) -> str:
        """What one worker or task has, in words."""
        return f"{self.cpus:g} CPUs{' and a GPU' if self.gpu else ''}"

    def bundle(self) -> dict[str, float]:
        """As Ray wants it."""
        return {"CPU": self.cpus, **({"GPU": 1.0} if self.gpu else {})}


@dataclass(frozen=True)
class Actors:
    """What the labelling actors get; `gpus` of each is a whole GPU, a part of one, or 0."""

    count: int
    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True)
class Ask:
    """What is to be placed.

    Args:
        low, high: fewest and most workers.
        cpus: of each; 0: as many as there are, shared evenly.
        gpu: of each.
        what: one of them, in words.
    """

    low: int = 1
    high: int = 0
    cpus: int = 0
    gpu: Gpu = "auto"
    what: str = "worker"

    def named(self, count: int) -> str:
        return f"{count} {self.what}{'s' if count != 1 else ''}"


class CannotPlace(Exception):
    """Something fits nowhere.

    Args:
        taken: would it fit if nobody else used the cluster? Then it is worth to wait a moment.
    """

    def __init__(self, lacks: str, taken: bool = False) -> None:
        super().__init__(lacks)
        self.lacks, self.taken = lacks, taken


def room(nodes: Sequence[Node], cpus: float, gpus: float = 0.0, memory_gib: float = 0.0) -> int:
    """How many with so many CPUs, GPUs and so much memory each find a node."""
    total = 0
    for node in nodes:
        fits = [
            int(free / each + ROUNDING)
            for free, each in ((node.free_cpus, cpus), (node.free_gpus, gpus), (node.free_memory_gib, memory_gib))
            if each > 0
        ]
        total += min(fits) if fits else 0
    return total


def largest_share(nodes: Sequence[Node], count: int, gpu: bool = False) -> float:
    """Most CPUs that each of `count` workers can have, each on one node (and with one GPU of it); 0 where they do not fit."""
    shares = {node.free_cpus / k for node in nodes for k in range(1, count + 1) if node.free_cpus > 0}
    fitting = (s for s in sorted(shares, reverse=True) if room(nodes, s, float(gpu)) >= count)
    return next(fitting, 0.0)


def place_workers(nodes: Sequence[Node], ask: Ask) -> Resources:
    """What each training worker, or the one task of a stage, gets.

    With `auto`, GPUs are used where there is a free one for each of the fewest workers. Workers whose number may grow are
    no larger than the smallest of the nodes allows, so that they fit on whatever node is left, or comes.

    Raises:
        CannotPlace: says what is lacking.
    """
    usable = [n for n in nodes if n.cpus > 0]
    with_gpu = [n for n in usable if n.gpus >= 1]
    gpu = ask.gpu != "never" and largest_share(with_gpu, ask.low, gpu=True) > 0
    if ask.gpu == "require" and not gpu:
        _refuse(usable, ask, needs_gpu=True)
    eligible = with_gpu if gpu else usable
    share = float(ask.cpus) or largest_share(eligible, ask.low, gpu)
    if ask.high > ask.low and not ask.cpus:
        share = min(share, *(n.cpus / (int(n.gpus) if gpu else 1) for n in eligible), largest_share(eligible, 1, gpu))
    if share < LEAST_CPUS or room(eligible, share, float(gpu)) < ask.low:
        if gpu and ask.gpu == "auto" and ask.cpus:  # enough CPUs are on the nodes without a GPU, perhaps
            return place_workers(nodes, Ask(ask.low, ask.high, ask.cpus, "never", ask.what))
        _refuse(usable, ask, needs_gpu=gpu)
    return Resources.of_share(share, gpu)


def _refuse(usable: Sequence[Node], ask: Ask, needs_gpu: bool) -> None:
    """
    Raises:
        CannotPlace: always.
    """
    lacks = _lacks(usable, ask, needs_gpu)
    whole = _lacks([n.emptied() for n in usable], ask, needs_gpu)
    raise CannotPlace(whole or f"{lacks} (the rest is taken by others)", taken=not whole)


def _lacks(nodes: Sequence[Node], ask: Ask, needs_gpu: bool) -> str:
    """What is missing, in words; '' where nothing is."""
    each, low, named = float(ask.cpus), ask.low, ask.named(ask.low)
    cpus, gpus = sum(n.free_cpus for n in nodes), sum(int(n.free_gpus + ROUNDING) for n in nodes)
    if not nodes:
        return "the cluster has no CPU for tasks"
    if each * low > cpus + ROUNDING:
        return f"{named} with {each:g} CPUs each need {each * low:g} CPUs, the cluster has {cpus:g}"
    if each and (places := room(nodes, each)) < low:
        largest = max(n.free_cpus for n in nodes)
        found = f"there is room for {places}, the largest node has {largest:g} CPUs"
        return f"{named} with {each:g} CPUs each do not fit: {found}"
    if needs_gpu and gpus < low:
        return f"{named} with a GPU each need {low} GPUs, the cluster has {gpus:g}"
    if needs_gpu and (places := room(nodes, each or LEAST_CPUS, 1.0)) < low:
        wants = f"{each:g} CPUs and a GPU" if each else "a CPU and a GPU"
        return f"{named} with {wants} each do not fit: there is room for {places}, a node must have both"
    if room(nodes, each or LEAST_CPUS) < low:
        return f"{named} need at least {LEAST_CPUS * low:g} CPUs, the cluster has {cpus:g}"
    return ""


def auto_workers(nodes: Sequence[Node], gpu: Gpu, most: int) -> int:
    """`--num-workers auto`: one a free GPU; without GPUs one a node that has a free CPU."""
    usable = [n for n in nodes if n.cpus > 0]
    gpus = sum(int(n.free_gpus + ROUNDING) for n in usable) if gpu != "never" else 0
    free = sum(n.free_cpus >= 1 for n in usable)
    return max(1, min(gpus or free, most))


def place_trials(
    nodes: Sequence[Node], ask: Ask, trials: int, most: int = 0, memory_gib: float = 0.0
) -> tuple[int, Resources]:
    """How many trials of `ask.low` workers run at a time, and what a worker of each gets; so that all of them always fit.

    Args:
        trials: how many there are; most: of them at a time; 0: no limit.
        memory_gib: that a worker needs (GiB); a bound on their number, not a reservation.

    Raises:
        CannotPlace: not even one fits.
    """
    one = place_workers(nodes, ask)
    eligible = [n for n in nodes if n.cpus > 0 and (n.gpus >= 1 or not one.gpu)]
    fits = room(eligible, max(1.0, float(ask.cpus)), float(one.gpu), memory_gib) // ask.low
    count = max(1, min(trials, fits, most or trials))
    share = float(ask.cpus) or largest_share(eligible, count * ask.low, one.gpu)
    return count, Resources.of_share(share, one.gpu)


def place_actors(nodes: Sequence[Node], asked: int, gpu: Gpu) -> Actors:
    """What the labelling actors get: whole GPUs, equal parts of them where there are more actors, or CPUs.

    Actors start first and keep what they hold; on each node something is left for the tasks that decode and write, or nothing
    would ever run. An actor without a GPU reserves its node's CPUs but for that, and computes with as many threads.

    Args:
        asked: actors; 0: one a GPU, or one for 8 CPUs.

    Raises:
        CannotPlace: says what is lacking.
    """
    usable = [n for n in nodes if n.cpus > 0]
    with_gpu = [n for n in usable if int(n.free_gpus + ROUNDING) >= 1 and n.free_cpus > SIDE_TASKS_CPUS]
    gpus = sum(int(n.free_gpus + ROUNDING) for n in with_gpu)
    ask = Ask(low=1, gpu=gpu, what="labelling actor")
    if gpu == "require" and not gpus:
        _refuse(usable, ask, needs_gpu=True)
    if gpu != "never" and gpus:
        count = asked or gpus
        a_gpu = -(-count // gpus)  # actors on one
        part = int(1e4 / a_gpu) / 1e4
        spare = [(n.free_cpus - SIDE_TASKS_CPUS) / (int(n.free_gpus + ROUNDING) * a_gpu) for n in with_gpu]
        return Actors(count, _floor(min(1.0, *spare)), part, threads=max(1, int(min(spare))))
    count = asked or sum(max(1, int(n.free_cpus // CPUS_OF_AN_ACTOR)) for n in usable if n.free_cpus >= 1) or 1
    left = [Node(n.cpus, 0, free_cpus=max(0.0, n.free_cpus - SIDE_TASKS_CPUS)) for n in usable]
    share = largest_share(left, count)
    if share < LEAST_CPUS:
        _refuse(usable, Ask(low=max(1, count), cpus=1, gpu="never", what="labelling actor"), needs_gpu=False)
    share = _floor(share)
    return Actors(count, share, 0.0, threads=max(1, round(share + SIDE_TASKS_CPUS / max(1, _beside(left, share)))))


def _beside(nodes: Sequence[Node], share: float) -> int:
    """Most actors of this share on one node."""
    return max(int(n.free_cpus / share + ROUNDING) for n in nodes)


def _floor(cpus: float) -> float:
    """Two digits, rounded down: Ray counts in ten-thousandths, and a sum of shares must not pass a whole."""
    return int(cpus * 100 + ROUNDING) / 100


def task_room(nodes: Sequence[Node], cpus: float = 1.0) -> int:
    """How many tasks with so many CPUs run side by side on the cluster as it is now."""
    return room([n for n in nodes if n.cpus > 0], cpus)


@dataclass(frozen=True)
class Checks:
    """What the tasks that check images get: how many run side by side, and what each asks for."""

    count: int
    cpus: float
    memory_gib: float

    def fits(self, nodes: Sequence[Node]) -> int:
        """How many find a place on these nodes, whoever uses them now."""
        return room([n.emptied() for n in nodes if n.cpus > 0], self.cpus, memory_gib=self.memory_gib)

    def describe(self) -> str:
        return f"{self.count} task(s) at a time with {self.cpus:g} CPUs and {self.memory_gib:g} GiB each"


def place_checks(nodes: Sequence[Node]) -> Checks:
    """What the tasks that check images get: a CPU and `CHECK_GIB` each, less where no node has so much.

    Raises:
        CannotPlace: says what is lacking.
    """
    usable = [n for n in nodes if n.cpus > 0]
    for cpus, memory in ((1.0, CHECK_GIB), (1.0, CHECK_GIB / 2), (0.5, CHECK_GIB / 2)):
        if count := room(usable, cpus, memory_gib=memory):
            return Checks(count, cpus, memory)
    empty = Checks(0, 0.5, CHECK_GIB / 2).fits(usable)
    least = f"0.5 CPUs and {CHECK_GIB / 2:g} GiB"
    raise CannotPlace(f"no node has {least}{' free' if empty else ''} for a task that checks images", taken=bool(empty))
