"""Damage what stages leave, and run two drivers at once: it is noticed, named, and mended or refused."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time
from pathlib import Path

import faulty
import numpy as np
import pyarrow.parquet as pq
import pytest
from small import tiny_config

from dfssd.data.manifest import pseudo_table, write_table
from dfssd.errors import DamagedFile, DfssdError, StorageError
from dfssd.runtime import lease as lease_module
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import ArtefactName as N
from dfssd.runtime.lease import Lease
from dfssd.runtime.storage import Storage


def _pseudo(run, shards=2):
    """A finished 'pseudo' of a finished 'teacher', as the jobs leave them."""
    teacher = Stage(run, N("teacher"), {"a": 1})
    if teacher.begin(False) != "finished":
        teacher.store.write("best.pt", b"weights")
        teacher.store.write("last.pt", b"others")
        teacher.finish(["best.pt", "last.pt"], {})
    stage = Stage(run, N("pseudo"), {"b": 1}, (N("teacher"),))
    state = stage.begin(False)
    if state == "finished":
        return state, stage
    for k in range(shards):
        name = f"shard-{k:05d}.parquet"
        if not stage.store.exists(name):
            ids = [f"{k}{i}" for i in range(8)]
            write_table(stage.store, name, pseudo_table(ids, "t", [np.zeros((1, 7), np.float32)] * 8))
    stage.store.write_json("numbers.json", {"n": 1})
    stage.finish([*(f"shard-{k:05d}.parquet" for k in range(shards)), "numbers.json"], {"n": 1})
    return state, stage


def _lose_rows(file):
    pq.write_table(pq.read_table(file).slice(0, 4), file)


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [_lose_rows, _flip, _cut, Path.unlink], ids=["rows lost", "flip", "cut", "deleted"])
def test_a_damaged_shard_is_made_again_and_a_reader_refuses_it(tmp_path, damage, capsys):
    run = Storage(str(tmp_path))
    _, stage = _pseudo(run)
    record = stage.record_of(N("pseudo"))
    damage(tmp_path / "pseudo" / "shard-00001.parquet")
    student = Stage(run, N("student"), {"c": 1}, (N("pseudo"),))
    with pytest.raises(DamagedFile, match=r"reads 'pseudo', which is damaged:\n    shard-00001.parquet") as caught:
        student.begin(False)
    assert "dfssd pseudo_label" in caught.value.todo and not run.exists("student/started.json")
    assert Stage(run, N("pseudo"), {"b": 1}, (N("teacher"),)).state() == "interrupted"
    whole = (tmp_path / "pseudo" / "shard-00000.parquet").stat().st_mtime_ns
    assert _pseudo(run)[0] == "interrupted"  # the same command, typed again
    assert "shard-00001.parquet is damaged" in capsys.readouterr().out
    assert stage.record_of(N("pseudo"))["digest"] == record["digest"] and _pseudo(run)[0] == "finished"
    assert (tmp_path / "pseudo" / "shard-00000.parquet").stat().st_mtime_ns == whole
    assert student.begin(False) == "new"


@pytest.mark.parametrize("damage", [_cut, Path.unlink, lambda f: f.write_bytes(b"")], ids=["cut", "deleted", "empty"])
def test_any_other_damage_is_named_with_the_remedy(tmp_path, damage):
    run = Storage(str(tmp_path))
    _pseudo(run)
    kept = (tmp_path / "teacher" / "best.pt").read_bytes()
    damage(tmp_path / "teacher" / "best.pt")
    for ask in (Stage(run, N("teacher"), {"a": 1}).state, lambda: Stage(run, N("teacher"), {"a": 1}).begin(False)):
        with pytest.raises(DamagedFile, match=r"'teacher' is damaged:\n    best.pt: it") as caught:
            ask()
        assert "--overwrite" in caught.value.todo and "restore" in caught.value.todo
    (tmp_path / "teacher" / "best.pt").write_bytes(kept)
    assert Stage(run, N("teacher"), {"a": 1}).begin(False) == "finished"
    damage(tmp_path / "teacher" / "best.pt")
    assert Stage(run, N("teacher"), {"a": 1}).begin(True) == "new" and not run.exists("teacher/last.pt")


def test_a_bit_flipped_in_an_input_is_noticed_before_anything_starts(tmp_path):
    run = Storage(str(tmp_path))
    _pseudo(run)
    student = Stage(run, N("student"), {"c": 1}, (N("teacher"), N("pseudo")))
    assert student.begin(False) == "new"
    _flip(tmp_path / "teacher" / "last.pt")  # which nobody reads
    assert student.begin(False) == "interrupted"
    _flip(tmp_path / "teacher" / "best.pt")
    with pytest.raises(DamagedFile, match=r"reads 'teacher'.*\n    best.pt: its sha256 differs"):
        student.begin(False)
    with pytest.raises(DamagedFile):  # --overwrite of the reader does not help, and must delete nothing
        Stage(run, N("student"), {"c": 2}, (N("teacher"), N("pseudo"))).begin(True)
    assert run.exists("student/started.json")


@pytest.mark.parametrize("content", [b"", b'{"config": {', b"[]", b"5", b'{"config": {}}', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["stage.json", "started.json"])
def test_a_damaged_record_is_a_user_error_that_names_the_file(tmp_path, name, content):
    run = Storage(str(tmp_path))
    _pseudo(run)
    run.write(f"teacher/{name}", content)
    if name == "started.json":
        run.delete("teacher/stage.json")
    with pytest.raises(DamagedFile) as caught:
        Stage(run, N("teacher"), {"a": 1}).begin(False)
    assert f"teacher/{name}" in caught.value.where and "--overwrite" in caught.value.todo
    if name == "stage.json":
        with pytest.raises(DamagedFile):  # a stage that reads it
            Stage(run, N("student"), {}, (N("teacher"),)).begin(False)
    assert Stage(run, N("teacher"), {"a": 1}).begin(True) == "new"


def test_a_power_cut_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    """What is renamed into place lies on the disk already: else a file of length 0 can stand there after a power cut."""
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append(str(Path(f"/proc/self/fd/{f}").readlink())), fsync(f))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append(f"{self} -> {to}"), replace(self, to))[1])
    Storage(str(tmp_path)).write("a/x.json", b"new")
    file = f"{tmp_path}/a/x.json"
    order = [one for one in order if str(tmp_path) in one]  # and none of threads that other tests have left
    assert order == [f"{file}.part", f"{file}.part -> {file}", f"{tmp_path}/a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_at_every_write_of_a_stage(tmp_path, monkeypatch, code):
    """Whichever write it meets, the stage ends in a sentence, and goes on once there is room."""
    for n in range(50):
        run, writes = Storage(str(tmp_path / str(n))), []
        Path(run.uri).mkdir()

        def rule(name, path, n=n, writes=writes):
            if name != "write":
                return None
            writes.append(path)
            return OSError(code, os.strerror(code), path) if len(writes) > n else None

        with monkeypatch.context() as patch:
            faulty.install(patch, rule)
            try:
                with Lease(run, "pseudo"):
                    _pseudo(Storage(run.uri))
                break
            except StorageError as error:
                assert error.todo and ("full" in error.what or "refuses" in error.what)
        assert not list(tmp_path.rglob("*.part")), "what was half written takes no room"
        assert _pseudo(run)[0] in ("new", "interrupted") and _pseudo(run)[0] == "finished"  # there is room again
    assert n > 8, "every write was met"


@pytest.mark.parametrize("damage", [_lose_rows, _cut], ids=["rows lost", "cut"])
def test_a_damaged_shard_of_an_unfinished_labelling_is_labelled_again(tmp_path, damage):
    """No stage.json tells its size yet."""
    from dfssd.pseudo.shards import _is_whole

    _pseudo(Storage(str(tmp_path)))
    store, shard = (
        Storage(str(tmp_path)).at("pseudo"),
        {"file": "shard-00001.parquet", "ids": [f"1{i}" for i in range(8)]},
    )
    assert _is_whole(store, shard)
    damage(tmp_path / "pseudo" / "shard-00001.parquet")
    assert not _is_whole(store, shard)


# Leases


def _hold(folder, ready, leave):
    with Lease(Storage(folder), "teacher"):
        ready.set()
        leave.wait(600)


@pytest.fixture
def other(tmp_path):
    """A second process that holds the lease."""
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready, leave))
    process.start()
    try:
        assert ready.wait(240), process.exitcode
        yield process, leave
    finally:
        process.kill()
        process.join()


def test_a_second_driver_is_refused_and_told_who_the_first_is_until_that_one_dies(tmp_path, other, monkeypatch):
    process, _ = other
    monkeypatch.setattr(lease_module, "GRACE_S", 0.1)
    with (
        pytest.raises(DfssdError, match=rf"is being made by process {process.pid} on \S+ \(since 20\d\d-") as caught,
        Lease(Storage(str(tmp_path)), "teacher"),
    ):
        pass
    assert "--run-name" in caught.value.todo
    with Lease(Storage(str(tmp_path)), "label_only"):
        pass  # another stage of the same run
    process.kill()
    process.join()
    begun = time.monotonic()
    with Lease(Storage(str(tmp_path)), "teacher"):
        assert time.monotonic() - begun < lease_module.WATCH_S, "it is seen to be dead, and not watched"
    assert [p.name for p in (tmp_path / "leases").iterdir()] == [lease_module.LOCK]


def test_a_holder_elsewhere_is_watched_not_compared_by_clock(tmp_path, monkeypatch):
    store = Storage(str(tmp_path)).at("leases")
    there = {"host": "far", "pid": 7, "since": "2001-01-01 00:00:00 UTC", "machine": "far", "token": "t", "beat": 0}
    store.write_json("teacher.json", there)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.3):
            there["beat"] += 1
            store.write_json("teacher.json", there)

    monkeypatch.setattr(lease_module, "WATCH_S", 300.0)  # a busy machine's beats may be late
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        with pytest.raises(DfssdError, match="process 7 on far"), Lease(Storage(str(tmp_path)), "teacher"):
            pass
    finally:
        stop.set()
        thread.join()
    monkeypatch.setattr(lease_module, "WATCH_S", 0.5)
    with Lease(Storage(str(tmp_path)), "teacher"):  # it gives no sign of life any more
        assert store.read_json("teacher.json")["host"] != "far"


def test_of_many_that_come_at_once_after_a_death_one_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "GRACE_S", 0.2)
    monkeypatch.setattr(Lease, "_lives", lambda self, other: other.get("pid") != 999_999)
    store = Storage(str(tmp_path)).at("leases")
    for _ in range(3):
        store.write_json("x.json", {"machine": lease_module.machine(), "pid": 999_999, "began": "1", "token": "dead"})
        got, refused, every = [], [], threading.Semaphore(0)

        def take(got=got, refused=refused, every=every):
            try:
                with Lease(Storage(str(tmp_path)), "x") as lease:
                    got.append(lease)
                    for _ in range(3):  # it holds on until the others have been refused, however late they come
                        every.acquire(timeout=200)
            except DfssdError as error:
                refused.append(error)
                every.release()

        threads = [threading.Thread(target=take) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(got) == 1 and len(refused) == 3 and not got[0].lost


def test_who_is_late_to_remove_a_dead_lease_never_touches_the_one_that_came_after_it(tmp_path):
    """Not for a moment: its holder would take itself for robbed, and a third would find the place free."""
    late, seen = Lease(Storage(str(tmp_path)), "x"), b'{"token": "dead"}'
    with Lease(Storage(str(tmp_path)), "x") as holder:
        thread = threading.Thread(target=lambda: [late._remove(seen) for _ in range(300)])
        thread.start()
        while thread.is_alive():
            holder.check()
        thread.join()
        assert not late._take()


def test_a_process_that_stands_still_with_the_lock_holds_up_nobody_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "LOCK_S", 0.3)
    (tmp_path / "leases").mkdir()
    with (tmp_path / "leases" / lease_module.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Lease(Storage(str(tmp_path)), "x") as lease:
            lease.check()
        assert [p.name for p in (tmp_path / "leases").iterdir()] == [lease_module.LOCK]


def test_a_folder_of_leases_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("a file in the run's place")
    with pytest.raises(StorageError, match="the storage refuses"), Lease(Storage(str(tmp_path / "run")), "x"):
        pass


def test_who_was_taken_for_dead_does_not_finish(tmp_path):
    run = Storage(str(tmp_path))
    stage = Stage(run, N("teacher"), {})
    with stage.lease():
        stage.begin(False)
        run.write_json("leases/teacher.json", {"host": "b", "pid": 1, "token": "another"})
        with pytest.raises(DfssdError, match="another driver has taken over"):
            stage.finish([], {})
    assert not run.exists("teacher/stage.json") and run.exists("leases/teacher.json")


def test_a_stage_is_refused_while_another_driver_makes_it(tmp_path, other, monkeypatch):
    from dfssd.pipeline.context import Context
    from dfssd.pipeline.run import run_stage

    process, _ = other
    monkeypatch.setattr(lease_module, "GRACE_S", 0.1)
    config = tiny_config(tmp_path.parent, run_name=tmp_path.name)
    with pytest.raises(DfssdError, match=f"is being made by process {process.pid}"):
        run_stage(Context(config), N("teacher"))
    assert not (tmp_path / "teacher").exists()
