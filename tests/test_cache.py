"""The cache on disk: hits, bounds, several processes, and faults that must not reach the training."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from dfssd.data import cache as module
from dfssd.data.cache import DiskCache
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage


@pytest.fixture
def store(monkeypatch):
    """An object store that counts how often it is asked."""
    asked = []

    def read(uri):
        asked.append(uri)
        if "missing" in uri:
            raise FileNotFoundError(uri)
        return uri.encode() * 1000

    monkeypatch.setattr(module, "read_uri", read)
    return asked


def _size(folder):
    return sum(f.stat().st_size for f in folder.iterdir())


def test_a_file_is_fetched_once(tmp_path, store):
    cache = DiskCache(str(tmp_path / "c"), 1)
    assert cache.read("s3://b/1") == cache.read("s3://b/1") == b"s3://b/1" * 1000
    assert DiskCache(str(tmp_path / "c"), 1).read("s3://b/1") and len(store) == 1  # also by the next process
    with pytest.raises(FileNotFoundError):
        cache.read("s3://b/missing")
    cache.read("/local/file")
    assert len(list((tmp_path / "c").iterdir())) == 1  # local files need no copy


def test_it_stays_below_its_limit_and_keeps_what_is_used(tmp_path, store):
    cache = DiskCache(str(tmp_path), 100_000 / 2**30)
    for k in range(40):
        cache.read(f"s3://b/{k:02d}")  # 9 kB each
        for file in tmp_path.iterdir():  # the clock of a file system may be too coarse to tell two files apart
            os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**9))
        cache.read("s3://b/00")
        assert _size(tmp_path) <= 100_000
    assert _size(tmp_path) > 60_000
    assert store.count("s3://b/00") == 1 and store.count("s3://b/39") == 1
    store.clear()
    cache.read("s3://b/05")
    assert store == ["s3://b/05"]  # long gone


def test_too_large_for_it_is_passed_on(tmp_path, store):
    assert len(DiskCache(str(tmp_path), 1e-6).read("s3://b/1")) == 8000
    assert not list(tmp_path.iterdir())


def test_many_at_once(tmp_path, store):
    caches = [DiskCache(str(tmp_path), 120_000 / 2**30) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        uris = [f"s3://b/{k % 30:02d}" for k in range(400)]
        found = list(pool.map(lambda k: caches[k % 4].read(uris[k]), range(400)))
    assert found == [u.encode() * 1000 for u in uris]
    assert not [f for f in tmp_path.iterdir() if f.name.startswith("part-")]
    assert _size(tmp_path) <= 120_000 + 8 * 8_000  # and what eight are writing at a time


def test_a_full_disk_is_no_error(tmp_path, store, capsys, monkeypatch):
    cache = DiskCache(str(tmp_path), 1)
    monkeypatch.setattr(
        module.tempfile, "NamedTemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    assert len(cache.read("s3://b/1")) == 8000 and "No space left" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(module, "read_uri", lambda uri: b"x" * 8000)
    monkeypatch.setattr(module.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert len(cache.read("s3://b/2")) == 8000 and "No space left" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "nothing half-written stays on it"


def test_a_folder_that_cannot_be_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DfssdError, match="cannot be written") as caught:
        DiskCache(str(tmp_path / "file" / "c"), 1)
    assert "--cache-dir" in caught.value.todo


def test_what_breaks_off_is_not_published_to_an_object_store(tmp_path):
    store = Storage(str(tmp_path))
    store.is_local = False  # closing the stream is what publishes there
    with pytest.raises(RuntimeError), store.writer("a/file") as stream:
        stream.write(b"half of it")
        raise RuntimeError
    assert not store.exists("a/file")
    store.write("a/file", b"all of it")
    assert store.read("a/file") == b"all of it"
