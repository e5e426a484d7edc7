"""What is asked for always fits on one node: a table of clusters, and every combination of jobs on each of them."""

import itertools

import pytest

from dfssd.runtime.placement import (
    Actors,
    Ask,
    CannotPlace,
    Node,
    Resources,
    auto_workers,
    largest_share,
    place_actors,
    place_checks,
    place_trials,
    place_workers,
    room,
    task_room,
)

N = Node
CLUSTERS = {
    "one node": [N(8)],
    "one small node": [N(1)],
    "a laptop's two": [N(2)],
    "two small nodes": [N(2), N(2)],
    "a head without CPUs": [N(0), N(4), N(4)],
    "a head without CPUs, alone": [N(0)],
    "no node that takes tasks, and an autoscaler": [],
    "one large and one small": [N(16), N(2)],
    "unequal": [N(2), N(3), N(7)],
    "GPU nodes beside CPU nodes": [N(0), N(8, 1), N(8, 1), N(32)],
    "a GPU node with few CPUs": [N(32), N(2, 4)],
    "eight GPUs on a machine": [N(96, 8)],
    "more GPUs than CPUs": [N(2, 4)],
    "partly taken": [N(8, free_cpus=3), N(4, free_cpus=0)],
    "wholly taken": [N(8, free_cpus=0)],
    "GPUs taken": [N(8, 2, free_gpus=0), N(8, 2, free_gpus=1)],
    "half a GPU free": [N(8, 1, free_gpus=0.5)],
    "a GPU whose node has no CPU left": [N(8, 1, free_cpus=0), N(8)],
    "fractions of CPUs": [N(1.5), N(0.5)],
    "little memory": [N(8, memory_gib=3), N(8, memory_gib=9)],
    "many nodes": [N(4)] * 40,
}
ASKS = [
    Ask(low, high, cpus, gpu)
    for (low, high), cpus, gpu in itertools.product(
        [(1, 1), (2, 2), (3, 3), (1, 4), (2, 8)], [0, 1, 2, 3], ["auto", "never", "require"]
    )
]


@pytest.mark.parametrize("nodes", CLUSTERS.values(), ids=CLUSTERS)
def test_whatever_is_placed_fits_and_what_is_not_says_why(nodes):
    usable = [n for n in nodes if n.cpus > 0]
    for ask in ASKS:
        try:
            found = place_workers(nodes, ask)
        except CannotPlace as error:
            assert len(error.lacks) > 20
            continue
        assert fitted(usable, found.bundle(), ask.low), (ask, found)
        assert found.threads >= 1 and found.threads <= max(1, found.cpus)
        assert not ask.cpus or found.cpus == ask.cpus
        assert found.gpu or ask.gpu != "require"
        for trials, most in ((1, 0), (5, 0), (50, 3)):
            count, each = place_trials(nodes, ask, trials, most, memory_gib=2.0)
            assert 1 <= count <= (most or trials) and fitted(usable, each.bundle(), count * ask.low), (ask, each)
    for asked, gpu in itertools.product([0, 1, 2, 5], ["auto", "never", "require"]):
        try:
            actors = place_actors(nodes, asked, gpu)
        except CannotPlace:
            continue
        assert actors.count == asked or (not asked and actors.count >= 1)
        assert fitted(usable, {"CPU": actors.cpus, "GPU": actors.gpus}, actors.count, beside=0.5), (asked, gpu, actors)


def fitted(nodes, bundle, count, beside=0.0):
    """First fit, as Ray would place them one by one; then a task of so many CPUs must still find a node."""
    free = [{"CPU": n.free_cpus, "GPU": n.free_gpus} for n in nodes]
    for need in [bundle] * count + ([{"CPU": beside}] if beside else []):
        home = next((f for f in free if all(f[k] + 1e-9 >= v for k, v in need.items())), None)
        if home is None:
            return False
        for k, v in need.items():
            home[k] -= v
    return True


@pytest.mark.parametrize(
    ("cluster", "ask", "cpus", "gpu"),
    [
        ("one node", Ask(), 8, False),
        ("one node", Ask(2), 4, False),
        ("one node", Ask(3), 2, False),
        ("two small nodes", Ask(), 2, False),  # not 4, which no node has
        ("two small nodes", Ask(2), 2, False),
        ("two small nodes", Ask(3), 1, False),
        ("two small nodes", Ask(1, 4), 2, False),
        ("a head without CPUs", Ask(2), 4, False),
        ("one large and one small", Ask(), 16, False),
        ("one large and one small", Ask(2), 8, False),  # both on the large one
        ("one large and one small", Ask(1, 4), 2, False),  # fits on whatever node is left
        ("unequal", Ask(4), 2, False),
        ("GPU nodes beside CPU nodes", Ask(), 8, True),
        ("GPU nodes beside CPU nodes", Ask(2), 8, True),
        ("GPU nodes beside CPU nodes", Ask(3), 10, False),  # fewer GPUs than workers
        ("GPU nodes beside CPU nodes", Ask(1, gpu="never"), 32, False),
        ("GPU nodes beside CPU nodes", Ask(1, cpus=16), 16, False),
        ("a GPU node with few CPUs", Ask(1), 2, True),
        ("eight GPUs on a machine", Ask(8), 12, True),
        ("eight GPUs on a machine", Ask(1, 8), 12, True),
        ("more GPUs than CPUs", Ask(4), 0.47, True),
        ("partly taken", Ask(), 3, False),
        ("GPUs taken", Ask(), 8, True),
        ("half a GPU free", Ask(), 8, False),
        ("a GPU whose node has no CPU left", Ask(), 8, False),
        ("one small node", Ask(4), 0.24, False),
    ],
)
def test_workers(cluster, ask, cpus, gpu):
    found = place_workers(CLUSTERS[cluster], ask)
    assert (found.cpus, found.gpu) == (cpus, gpu)


@pytest.mark.parametrize(
    ("cluster", "ask", "said", "taken"),
    [
        ("no node that takes tasks, and an autoscaler", Ask(), "no CPU for tasks", False),
        ("a head without CPUs, alone", Ask(2), "no CPU for tasks", False),
        ("two small nodes", Ask(1, cpus=3), "room for 0, the largest node has 2", False),
        ("two small nodes", Ask(2, cpus=3), "need 6 CPUs, the cluster has 4", False),
        ("one node", Ask(1, gpu="require"), "1 worker with a GPU each need 1 GPUs, the cluster has 0", False),
        ("eight GPUs on a machine", Ask(9, gpu="require"), "need 9 GPUs, the cluster has 8", False),
        ("more GPUs than CPUs", Ask(4, cpus=1, gpu="require"), "need 4 CPUs, the cluster has 2", False),
        ("GPU nodes beside CPU nodes", Ask(2, cpus=9, gpu="require"), "room for 0, a node must have both", False),
        ("wholly taken", Ask(), "taken by others", True),
        ("partly taken", Ask(1, cpus=4), "the cluster has 3 (the rest is taken", True),
        ("GPUs taken", Ask(2, gpu="require"), "need 2 GPUs, the cluster has 1 (the rest is taken", True),
        ("half a GPU free", Ask(1, gpu="require"), "the cluster has 0 (the rest is taken", True),
        ("one small node", Ask(20), "20 workers need at least 2 CPUs, the cluster has 1", False),
    ],
)
def test_what_is_lacking(cluster, ask, said, taken):
    with pytest.raises(CannotPlace) as caught:
        place_workers(CLUSTERS[cluster], ask)
    assert said in caught.value.lacks and caught.value.taken == taken, caught.value.lacks


@pytest.mark.parametrize(
    ("cluster", "asked", "gpu", "found"),
    [
        ("one node", 0, "auto", Actors(1, 7.5, 0, 8)),
        ("a laptop's two", 0, "auto", Actors(1, 1.5, 0, 2)),
        ("a laptop's two", 2, "auto", Actors(2, 0.75, 0, 1)),
        ("one small node", 0, "auto", Actors(1, 0.5, 0, 1)),
        ("two small nodes", 2, "never", Actors(2, 1.5, 0, 2)),
        ("one large and one small", 0, "auto", Actors(3, 5.16, 0, 5)),
        ("GPU nodes beside CPU nodes", 0, "auto", Actors(2, 1, 1, 7)),
        ("GPU nodes beside CPU nodes", 4, "auto", Actors(4, 1, 0.5, 3)),
        ("GPU nodes beside CPU nodes", 5, "auto", Actors(5, 1, 0.3333, 2)),
        ("GPU nodes beside CPU nodes", 0, "never", Actors(6, 7.5, 0, 8)),
        ("more GPUs than CPUs", 0, "auto", Actors(4, 0.37, 1, 1)),
        ("GPUs taken", 0, "auto", Actors(1, 1, 1, 7)),
        ("half a GPU free", 0, "auto", Actors(1, 7.5, 0, 8)),
    ],
)
def test_labelling_actors(cluster, asked, gpu, found):
    assert place_actors(CLUSTERS[cluster], asked, gpu) == found


@pytest.mark.parametrize(
    "cluster", ["a head without CPUs, alone", "no node that takes tasks, and an autoscaler", "one node"]
)
def test_labelling_without_a_node_or_a_gpu_says_so(cluster):
    with pytest.raises(CannotPlace, match=r"no CPU for tasks|with a GPU each need 1 GPUs"):
        place_actors(CLUSTERS[cluster], 0, "require")


def test_trials():
    assert place_trials(CLUSTERS["one node"], Ask(), 3) == (3, Resources(2, 2, False))
    assert place_trials(CLUSTERS["two small nodes"], Ask(), 3) == (3, Resources(1, 1, False))
    assert place_trials(CLUSTERS["two small nodes"], Ask(2), 3) == (2, Resources(1, 1, False))
    assert place_trials(CLUSTERS["little memory"], Ask(), 9, memory_gib=2.0)[0] == 1 + 4
    assert place_trials(CLUSTERS["GPU nodes beside CPU nodes"], Ask(), 9) == (2, Resources(8, 8, True))
    assert place_trials(CLUSTERS["eight GPUs on a machine"], Ask(2), 9, most=3) == (3, Resources(16, 16, True))


def test_automatic_numbers():
    assert auto_workers(CLUSTERS["GPU nodes beside CPU nodes"], "auto", 16) == 2
    assert auto_workers(CLUSTERS["GPU nodes beside CPU nodes"], "never", 16) == 3
    assert auto_workers(CLUSTERS["a head without CPUs"], "auto", 16) == 2
    assert auto_workers(CLUSTERS["many nodes"], "auto", 16) == 16
    assert auto_workers([], "auto", 16) == 1
    assert task_room(CLUSTERS["partly taken"]) == 3 and task_room(CLUSTERS["a head without CPUs"], 3) == 2


def test_shares_are_the_largest_that_fit():
    for nodes in CLUSTERS.values():
        for count in range(1, 9):
            share = largest_share(nodes, count)
            assert share == 0 or room(nodes, share) >= count
            finer = [n.free_cpus / k for n in nodes for k in range(1, 20) if n.free_cpus]
            assert not [s for s in finer if s > share + 1e-9 and room(nodes, s) >= count]


@pytest.mark.parametrize("nodes", CLUSTERS.values(), ids=CLUSTERS)
def test_tasks_that_check_images_fit_or_it_is_said_why(nodes):
    try:
        found = place_checks(nodes)
    except CannotPlace as error:
        assert not room([n for n in nodes if n.cpus > 0], 0.5, memory_gib=0.5)
        assert error.taken == bool(room([n.emptied() for n in nodes if n.cpus > 0], 0.5, memory_gib=0.5))
        return
    assert 1 <= found.count == room([n for n in nodes if n.cpus > 0], found.cpus, memory_gib=found.memory_gib)
    assert found.fits(nodes) >= found.count


def test_memory_bounds_the_tasks_that_check_images():
    assert place_checks([N(8, memory_gib=3), N(8, memory_gib=9)]).count == 3 + 8
    assert place_checks([N(8, memory_gib=0.7)]).memory_gib == 0.5
