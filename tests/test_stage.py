import pytest

from dfssd.errors import DfssdError, find_user_error, nearest
from dfssd.runtime.artefact import Stage, code_version
from dfssd.runtime.artefact_names import ArtefactName
from dfssd.runtime.records import differences
from dfssd.runtime.storage import Storage


def _stage(tmp_path, name="b", inputs=(), **config):
    return Stage(Storage(str(tmp_path)), ArtefactName(name), {"train": config}, tuple(map(ArtefactName, inputs)))


def _finish(stage, content=b"x", overwrite=False):
    state = stage.begin(overwrite)
    stage.store.write("out.bin", content)
    stage.finish(["out.bin"], {"n": 1})
    return state


def test_finished_is_skipped_interrupted_goes_on(tmp_path):
    assert _stage(tmp_path, lr=1).begin(False) == "new"
    assert _stage(tmp_path, lr=1).begin(False) == "interrupted"
    _finish(_stage(tmp_path, lr=1))
    assert _stage(tmp_path, lr=1).begin(False) == "finished"
    record = Storage(str(tmp_path)).read_json("b/stage.json")
    assert record["outputs"]["out.bin"]["bytes"] == 1 and record["summary"] == {"n": 1}
    assert record["code_version"] == code_version()


@pytest.mark.parametrize("finished", [True, False])
def test_changed_settings_are_refused_with_the_difference(tmp_path, finished):
    stage = _stage(tmp_path, lr=1, batch=4)
    _finish(stage) if finished else stage.begin(False)
    with pytest.raises(DfssdError, match=r"config\.train\.lr: 1 -> 2") as caught:
        _stage(tmp_path, lr=2, batch=4).begin(False)
    assert "batch" not in caught.value.what
    assert "--run-name" in caught.value.todo and "--overwrite" in caught.value.todo


def test_overwrite_removes_what_differs_and_keeps_what_matches(tmp_path):
    _finish(_stage(tmp_path, lr=1))
    assert _stage(tmp_path, lr=1).begin(True) == "finished"
    assert _stage(tmp_path, lr=2).begin(True) == "new"
    assert not Storage(str(tmp_path)).exists("b/out.bin")


def test_a_changed_input_counts_as_a_change(tmp_path):
    _finish(_stage(tmp_path, "a"))
    _finish(_stage(tmp_path, "b", ("a",)))
    assert _stage(tmp_path, "b", ("a",)).state() == "finished"
    Storage(str(tmp_path)).delete("a")
    _finish(_stage(tmp_path, "a"), b"other")
    with pytest.raises(
        DfssdError, match=r"made with other inputs:\n    its input 'a' is another one now, or was made again"
    ):
        _stage(tmp_path, "b", ("a",)).state()


def test_a_missing_input_says_which(tmp_path):
    with pytest.raises(DfssdError, match="needs the artefact 'a'"):
        _stage(tmp_path, "b", ("a",)).begin(False)


@pytest.mark.parametrize("lr", [1, 2])
def test_overwrite_deletes_nothing_while_an_input_is_missing(tmp_path, lr):
    _finish(_stage(tmp_path, "a"))
    _finish(_stage(tmp_path, "b", ("a",), lr=1))
    Storage(str(tmp_path)).delete("a")
    with pytest.raises(DfssdError, match="needs the artefact 'a'"):
        _stage(tmp_path, "b", ("a",), lr=lr).begin(True)
    assert Storage(str(tmp_path)).exists("b/out.bin") and Storage(str(tmp_path)).exists("b/stage.json")


def test_storage_shows_no_half_written_file(tmp_path):
    store = Storage(str(tmp_path))
    store.write("x", b"old")
    with pytest.raises(ZeroDivisionError), store.writer("x") as stream:
        stream.write(b"new and longer")
        raise ZeroDivisionError
    assert store.read("x") == b"old" and store.files() == ["x"]


def test_unwritable_storage_and_unknown_scheme_are_user_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DfssdError, match="not writable"):
        Storage(str(tmp_path / "file" / "runs")).check_writable()
    with pytest.raises(DfssdError, match="cannot be opened"):
        Storage("nope://bucket/x")


def test_small_helpers():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "d": 3}) == ["c: 2 -> (unset)", "d: (unset) -> 3"]
    assert "imgsz" in nearest("imgz", ["imgsz", "batch"]) and nearest("xyzzy", ["imgsz"]) == ""
    import pickle

    error = pickle.loads(pickle.dumps(DfssdError("a", where="b", todo="c")))
    assert str(error) == "a\n  where: b\n  to do: c"
    outer = RuntimeError("ray")
    outer.__cause__ = error
    assert find_user_error(outer) is error and find_user_error(ValueError()) is None
