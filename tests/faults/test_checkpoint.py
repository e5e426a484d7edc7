import errno
import gzip
import hashlib
import io
import json
import pickle
import threading
from pathlib import Path

import faulty
import pytest
import torch
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.errors import DfssdError, StorageError
from dfssd.runtime import retry
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint


def _make(tmp_path, *steps):
    for step in steps:
        state = {"step": step, "fingerprint": "f", "w": torch.arange(1000) + step}
        checkpoint.store_newest(Storage(str(tmp_path)), step, state, keep=9)
    return Storage(str(tmp_path))


def test_the_newest_whole_one_is_loaded(tmp_path):
    assert checkpoint.load_newest(Storage(str(tmp_path / "none")), "f") is None
    assert checkpoint.load_newest(_make(tmp_path, 5, 20, 10), "f")["step"] == 20


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "bad manifest", "list", "number", "no state"])
def test_a_damaged_one_is_passed_over_loudly(tmp_path, capsys, damage):
    store = _make(tmp_path, 10, 20)
    state, manifest = (tmp_path / "step_0000020" / n for n in ("state.pt", "MANIFEST.json"))
    data = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "empty":
        state.write_bytes(b"")
    elif damage == "bad manifest":
        manifest.write_text("{")
    elif damage in ("list", "number"):
        manifest.write_text("[]" if damage == "list" else '{"state.pt": 5}')
    else:
        state.unlink()
    assert checkpoint.load_newest(store, "f")["step"] == 10
    assert "damaged" in capsys.readouterr().out
    assert checkpoint.load_newest(store, "f")["step"] == 10  # marked: said once
    assert "damaged" not in capsys.readouterr().out


def test_one_that_is_written_again_starts_clean_and_one_that_is_brought_back_counts(tmp_path):
    store, state = _make(tmp_path, 10, 20), tmp_path / "step_0000020" / "state.pt"
    kept = state.read_bytes()
    state.write_bytes(kept[:-1] + b"x")
    assert checkpoint.load_newest(store, "f")["step"] == 10
    assert (state.parent / "BAD").read_text().startswith(hashlib.sha256(state.read_bytes()).hexdigest())
    state.write_bytes(kept)  # restored from a backup, as the message says
    assert checkpoint.load_newest(store, "f")["step"] == 20
    state.write_bytes(b"x")
    assert checkpoint.load_newest(store, "f")["step"] == 10
    _make(tmp_path, 20)
    assert checkpoint.load_newest(store, "f")["step"] == 20 and not (state.parent / "BAD").exists()


@pytest.mark.parametrize("part", ["state.pt", "MANIFEST.json"])
def test_a_passing_read_error_is_waited_for_and_marks_nothing(tmp_path, monkeypatch, part):
    _make(tmp_path, 10, 20)
    rule, met = faulty.eio("open_input_stream", part, times=3)
    faulty.install(monkeypatch, rule)
    assert checkpoint.load_newest(Storage(str(tmp_path)), "f")["step"] == 20 and len(met) == 3
    assert not list(tmp_path.rglob("BAD"))


def test_a_storage_that_does_not_answer_stops_the_run_and_marks_nothing(tmp_path, monkeypatch):
    _make(tmp_path, 10, 20)
    rule, met = faulty.eio("open_input_stream", "state.pt")
    with monkeypatch.context() as patch:
        faulty.install(patch, rule)
        with pytest.raises(StorageError, match=f"does not answer, after {retry.RETRY_S:.0f} s"):
            checkpoint.load_newest(Storage(str(tmp_path)), "f")
    assert len(met) > 2 and not list(tmp_path.rglob("BAD"))
    assert checkpoint.load_newest(Storage(str(tmp_path)), "f")["step"] == 20  # it is back: nothing was lost


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "is full"), (errno.EROFS, "refuses"), (errno.EACCES, "refuses")]
)
def test_a_full_or_read_only_storage_says_so_at_once_and_keeps_what_is_there(tmp_path, monkeypatch, code, said):
    for part in ("state.pt", "MANIFEST.json"):
        _make(tmp_path, 10, 20)
        rule, met = faulty.failing(code, "write", f"step_0000030/{part}")
        with monkeypatch.context() as patch:
            faulty.install(patch, rule)
            with pytest.raises(StorageError, match=said) as caught:
                _make(tmp_path, 30)
        assert len(met) == 1 and caught.value.todo
        assert checkpoint.load_newest(Storage(str(tmp_path)), "f")["step"] == 20
        _make(tmp_path, 30)  # there is room again
        assert checkpoint.load_newest(Storage(str(tmp_path)), "f")["step"] == 30


def test_another_format_is_named_with_what_reads_it(tmp_path):
    state = {"format": 99, "step": 5, "fingerprint": "f"}
    checkpoint.store_newest(Storage(str(tmp_path)), 5, state, keep=9)
    with pytest.raises(DfssdError, match=r"has format 99, this version of dfssd reads format 1"):
        checkpoint.load_newest(Storage(str(tmp_path)), "f")


@pytest.mark.parametrize("content", ["pickle", "number", "nothing of ours"])
def test_a_state_that_is_none_is_a_user_error_and_its_code_is_not_run(tmp_path, content):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was run",))

    made = {"pickle": Code(), "number": 5, "nothing of ours": {"a": 1}}[content]
    buffer = io.BytesIO()
    torch.save(made, buffer)
    for data in [buffer.getvalue(), *([pickle.dumps(made)] if content == "pickle" else [])]:
        store = _make(tmp_path, 5)
        store.write("step_0000005/state.pt", data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        store.write_json("step_0000005/MANIFEST.json", {"state.pt": entry})
        with pytest.raises(DfssdError, match=r"is no checkpoint of this project") as caught:
            checkpoint.load_newest(store, "f")
        assert "step_0000005" in caught.value.where and not (tmp_path / "was run").exists()


class _Rank(WorkerGroup):
    """One worker of two, in a thread: `gather` meets the other one's at a barrier."""

    def gather(self, value):
        shelf, barrier = self.shared
        shelf[self.rank] = value
        barrier.wait(200)
        both = [shelf[0], shelf[1]]
        barrier.wait(200)
        return both


def _two_ranks(stores):
    """What each of two workers loads, each from its own view of the storage: a step or an error."""
    shared, found = ({}, threading.Barrier(2)), {}

    def work(rank):
        workers = _Rank(rank, 2)
        object.__setattr__(workers, "shared", shared)
        try:
            state = checkpoint.load_agreed(stores[rank], "f", workers)
            found[rank] = state["step"] if state else None
        except DfssdError as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return found[0], found[1]


def test_all_workers_go_on_from_the_checkpoint_that_rank_0_has_chosen(tmp_path):
    nothing, both = Storage(str(tmp_path / "n")), _make(tmp_path / "a", 10, 20)
    assert _two_ranks([nothing, nothing]) == (None, None)
    assert _two_ranks([both, both]) == (20, 20)
    (tmp_path / "a" / "step_0000020" / "MANIFEST.json").unlink()  # rank 0 cannot take 20, rank 1 would not care
    assert _two_ranks([both, both]) == (10, 10)


def test_workers_that_see_different_checkpoints_stop(tmp_path):
    """As they do where --storage-path is a folder of each machine's own."""
    here, there = _make(tmp_path / "a", 10), Storage(str(tmp_path / "b"))
    state = {"step": 10, "fingerprint": "f", "w": torch.zeros(3)}
    checkpoint.store_newest(there, 10, state, keep=9)
    found = _two_ranks([here, there])
    for error in found:
        assert "different checkpoints of step 10" in error.what and "one storage that all machines see" in error.todo
    (tmp_path / "a" / "step_0000010" / "state.pt").write_bytes(b"x")  # an error of rank 0 reaches all
    assert all("none of them is whole" in str(e) for e in _two_ranks([here, here]))


FORMAT_1 = Path(__file__).parent / "checkpoint_format_1.pt.gz"


def test_a_checkpoint_of_format_1_still_loads(prepared):
    """Made by the first version with a format that is read: a student with teacher, policy and balance, weights all 0.

    What later versions write may hold more; what is missing here must then have a default.
    """
    from dfssd.train.build import build_session

    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared))
    session = build_session(job, WorkerGroup(), torch.device("cpu"))
    session.load_state(checkpoint._unpack(gzip.decompress(FORMAT_1.read_bytes()), "fixture"))
    assert session.step == 3 and session.history and session.best["metrics"]["map50"] >= 0
    assert all(not p.any() for p in session.student.detector.parameters())


def test_if_none_is_whole_it_stops_and_never_starts_over(tmp_path):
    store = _make(tmp_path, 10)
    (tmp_path / "step_0000010" / "state.pt").write_bytes(b"x")
    with pytest.raises(DfssdError, match="none of them is whole"):
        checkpoint.load_newest(store, "f")


def test_one_that_was_being_written_does_not_count(tmp_path, capsys):
    store = _make(tmp_path, 10, 20)
    (tmp_path / "step_0000020" / "MANIFEST.json").unlink()
    assert checkpoint.load_newest(store, "f")["step"] == 10
    (tmp_path / "step_0000010" / "MANIFEST.json").unlink()
    assert checkpoint.load_newest(store, "f") is None  # killed during the first one: there is nothing to go on from
    assert "WARNING" not in capsys.readouterr().out


def test_other_settings_are_refused(tmp_path):
    with pytest.raises(DfssdError, match="other settings") as caught:
        checkpoint.load_newest(_make(tmp_path, 10), "g")
    assert "--run-name" in caught.value.todo


def test_a_cut_ray_snapshot_is_set_aside(tmp_path, capsys):
    store = Storage(str(tmp_path))
    store.write("checkpoint_manager_snapshot.json", b'{"a": [1, ')
    checkpoint.mend_ray_snapshot(store)
    assert not store.exists("checkpoint_manager_snapshot.json")
    assert store.read("checkpoint_manager_snapshot.json.corrupt-0") == b'{"a": [1, '
    assert "set aside" in capsys.readouterr().out
    store.write_json("checkpoint_manager_snapshot.json", {"a": 1})
    checkpoint.mend_ray_snapshot(store)
    assert json.loads(store.read("checkpoint_manager_snapshot.json")) == {"a": 1}
