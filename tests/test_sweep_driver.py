"""What the driver of a sweep remembers of its trials."""

from types import SimpleNamespace

from small import tiny_config

from dfssd.storage import Storage
from dfssd.sweep.driver import Progress, ended, steps_run, trial_of
from dfssd.sweep.points import make_trial
from dfssd.sweep.population import identity


def _complete(config, point, steps):
    """A sweep's process in which a trial reports these steps and is stopped."""
    progress = Progress(config, "s", 1, SimpleNamespace(end=lambda *a: None), "val/map50")
    trial = SimpleNamespace(trial_id="t", config={"point": point})
    for step in steps:
        progress.on_trial_result(0, [], trial, {"step": step, "val/map50": step / 100})
    progress.on_trial_complete(0, [], trial)


def test_a_resumed_sweep_keeps_what_a_stopped_trial_has_reported(tmp_path):
    config, storage = tiny_config(tmp_path), Storage(str(tmp_path))
    point = {"order": 0, **identity(make_trial(config, "s", "a", 0, {"distill.share_f": 0.4}))}
    _complete(config, point, [10, 20, 30])
    assert steps_run(storage, "s", []) == (30, 1)
    _complete(config, point, [10])  # its scheduler has seen other trials before this one
    assert steps_run(storage, "s", []) == (30, 1)
    assert ended(storage, "s", "val/map50") == [({"distill.share_f": 0.4}, 0.3)]


def test_a_failed_trial_has_neither_ended_nor_been_stopped(tmp_path, capsys):
    config, storage = tiny_config(tmp_path), Storage(str(tmp_path))
    point = {"order": 0, **identity(make_trial(config, "s", "a", 0, {"distill.share_f": 0.4}))}
    run_name = trial_of({"point": point}, config, "s").config.run.run_name
    storage.write_json(f"{run_name}/failed.json", {"error": "no such layer\n  to do: name another"})
    _complete(config, point, [10])
    assert "failed: no such layer at step 10" in capsys.readouterr().out
    assert ended(storage, "s", "val/map50") == []
