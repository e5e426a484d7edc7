"""The cache of pixels: shared, bounded, and never a reason to fail."""

import multiprocessing
import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from dfssd.data import decoded as module
from dfssd.data.decoded import DecodedCache
from dfssd.data.manifest import Row


@pytest.fixture(autouse=True)
def _disk_with_room(monkeypatch):
    """The disk of the machine that tests may be as full as it likes."""
    roomy = SimpleNamespace(total=10**12, used=0, free=10**12)
    monkeypatch.setattr(module, "shutil", SimpleNamespace(rmtree=shutil.rmtree, disk_usage=lambda _: roomy))
    return roomy


def _image(k, side=32, grey=False):
    return np.random.default_rng(k).integers(0, 255, (side, side) if grey else (side, side, 3), np.uint8)


def _kept(cache):
    return sum(size for _, size, _ in cache._files())


@pytest.mark.parametrize("grey", [False, True])
def test_what_goes_in_comes_out_for_any_process(tmp_path, grey):
    DecodedCache(str(tmp_path), 1).keep("ab12", 32, _image(1, grey=grey))
    other = DecodedCache(str(tmp_path), 1)
    assert np.array_equal(other.read("ab12", 32), _image(1, grey=grey))
    assert other.read("ab12", 64) is None and other.read("cd34", 32) is None
    assert not other.read("ab12", 32).flags.writeable


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 4000])
def test_a_file_that_is_not_whole_is_a_miss_and_is_written_again(tmp_path, damage):
    cache = DecodedCache(str(tmp_path), 1)
    cache.keep("ab12", 32, _image(1))
    place = cache._place("ab12", 32)
    for data in (damage, place.read_bytes()[:-1], place.read_bytes() + b"y"):
        place.write_bytes(data)
        assert cache.read("ab12", 32) is None
    cache.keep("ab12", 32, _image(1))
    assert np.array_equal(cache.read("ab12", 32), _image(1))


def test_it_never_holds_more_than_it_may_and_what_is_in_stays(tmp_path):
    cache = DecodedCache(str(tmp_path), 20 * 3100 / 2**30)
    for k in range(100):
        cache.keep(f"{k:04x}", 32, _image(k))
    assert 15 * 3000 < _kept(cache) <= 20 * 3100
    assert cache.read("0003", 32) is not None and cache.read("0063", 32) is None


def test_several_writers_stay_near_the_limit(tmp_path):
    limit = 200 * 3100
    caches = [DecodedCache(str(tmp_path), limit / 2**30) for _ in range(4)]

    def write(cache, first):
        for k in range(first, first + 200):
            cache.keep(f"{k:04x}", 32, _image(k))

    threads = [threading.Thread(target=write, args=(c, 100 * k)) for k, c in enumerate(caches)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert _kept(caches[0]) <= limit * (1 + 4 * module.SLACK)
    for k in range(500):
        found = caches[1].read(f"{k:04x}", 32)
        assert found is None or np.array_equal(found, _image(k))


def _die_while_writing(folder):
    real = module.Path.replace
    module.Path.replace = lambda self, target: os._exit(9)
    try:
        DecodedCache(folder, 1).keep("ab12", 32, _image(1))
    finally:
        module.Path.replace = real


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    victim = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(str(tmp_path),))
    victim.start()
    victim.join()
    cache = DecodedCache(str(tmp_path), 1)
    assert victim.exitcode == 9 and cache.read("ab12", 32) is None
    assert _kept(cache) > 3000  # its part counts towards the limit, and goes first where room is made
    cache.limit = 3200
    cache.make_room([Row("cd34", "", 32, 32, "train", True, 0, None)], 32)
    assert _kept(cache) == 0


def test_room_is_made_for_the_images_of_this_run(tmp_path):
    cache = DecodedCache(str(tmp_path), 20 * 3100 / 2**30)
    for k in range(20):
        cache.keep(f"{k:04x}", 32, _image(k))
        os.utime(cache._place(f"{k:04x}", 32), (k, k))
    rows = [Row(f"{k:04x}", "", 32, 32, "train", True, k, None) for k in range(15, 25)]
    cache.make_room(rows, 32)
    assert [k for k in range(20) if cache.read(f"{k:04x}", 32) is not None] == list(range(5, 20))
    for k in range(20, 25):
        cache.keep(f"{k:04x}", 32, _image(k))
    assert all(cache.read(r.image_id, 32) is not None for r in rows)


def test_pixels_of_before_a_restart_of_the_machine_are_not_trusted(tmp_path, monkeypatch):
    old = DecodedCache(str(tmp_path), 1)
    old.keep("ab12", 32, _image(1))
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(module, "_boot", lambda: "boot-2")
    assert DecodedCache(str(tmp_path), 1).read("ab12", 32) is None
    assert not old.folder.exists() and (tmp_path / "mine").exists()


def test_a_disk_that_fails_is_said_once_and_costs_nothing_else(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    cache = DecodedCache(str(tmp_path / "file"), 1)
    for k in range(3):
        cache.keep(f"{k:04x}", 32, _image(k))
        assert cache.read(f"{k:04x}", 32) is None
    assert capsys.readouterr().out.count("WARNING") == 1


def test_a_folder_that_another_user_has_made_is_not_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(module.os, "getuid", lambda: 4242)
    cache = DecodedCache("", 1)
    cache.keep("ab12", 32, _image(1))
    assert cache.read("ab12", 32) is None and "another user" in capsys.readouterr().out


def test_a_share_of_the_disk_stays_free_and_a_full_one_is_said(tmp_path, _disk_with_room, capsys):
    disk, cache = _disk_with_room, DecodedCache(str(tmp_path), 1)
    rows = [Row(key, "", 32, 32, "train", True, 0, None) for key in ("ab12", "cd34")]
    reserve = int(module.FREE_SHARE * 10**9)
    disk.total, disk.free = 10**9, reserve + 7000
    cache.make_room(rows, 32)
    assert not capsys.readouterr().out
    cache.keep("ab12", 32, _image(1))
    disk.free = reserve + 900
    cache.keep("cd34", 32, _image(2))
    assert cache.read("ab12", 32) is not None and cache.read("cd34", 32) is None
    cache.make_room(rows, 32)
    assert "--decoded-dir" in capsys.readouterr().out
    assert cache.read("ab12", 32) is not None  # it is of this run
