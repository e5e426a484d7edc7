"""What the driver of a sweep remembers of its trials."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from small import tiny_config

from dfssd.runtime.storage import Storage
from dfssd.sweep.driver import Progress, ended, for_asha, parameters, steps_run, trial_of, tune_config
from dfssd.sweep.points import make_trial, own_point
from dfssd.sweep.population import identity
from dfssd.sweep.space import load_space

SHIPPED = Path(__file__).parents[1] / "tune_spaces" / "loss_weights.py"


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


def _suggested(config, space, known, count):
    """Settings of the first points that a search asks for, as Tune does."""
    search = tune_config(space, config, "s", 1, known).search_alg
    search.set_search_properties("val/map50", "max", parameters(space, []))
    return [search.suggest(str(k))["point"]["settings"] for k in range(count)]


def test_a_search_begins_at_the_configs_own_values(tmp_path):
    """What a search finds is only worth something beside what one has without it."""
    config, space = tiny_config(tmp_path, share_p=0.3, lambda_u=1.5), load_space(str(SHIPPED))
    own = {"distill.share_p": 0.3, "distill.share_f": 0.5, "distill.lambda_u": 1.5}
    first, second = _suggested(config, space, [], 2)
    assert first == own and second != own
    assert _suggested(config, space, [(own, 0.4)], 1) != [own]  # it has ended: the search knows it


@pytest.mark.parametrize(
    ("axis", "value", "found"),
    [
        (tune.uniform(0.25, 2.0), 0.1, None),
        (tune.loguniform(0.05, 2.0), 0.05, 0.05),
        ([0.1, 0.5], 0.5, 0.5),
        ([0.1, 0.2], 0.5, None),
        (tune.choice([0.1, 0.5]), 0.5, 0.5),
        (tune.sample_from(lambda: 0.5), 0.5, None),
    ],
)
def test_values_outside_the_space_are_no_point_of_it(tmp_path, axis, value, found):
    config = tiny_config(tmp_path, share_f=value)
    expected = None if found is None else {"distill.share_f": found}
    assert own_point({"distill.share_f": axis}, config) == expected


def test_layers_are_found_among_lists_of_layers(tmp_path):
    config = tiny_config(tmp_path, taps=(4, 6))
    assert own_point({"distill.taps": [[15, 18], [4, 6]]}, config) == {"distill.taps": [4, 6]}


def test_asha_meets_the_configs_own_values_first_and_the_others_in_no_order(tmp_path):
    values = [round(0.1 * k, 1) for k in range(20)]
    (tmp_path / "s.py").write_text(f'SPACE = {{"distill.share_f": {values}}}\nSCHEDULER = "asha"\n')
    space, points = load_space(str(tmp_path / "s.py")), [{"settings": {"distill.share_f": v}} for v in values]
    own = [p["settings"]["distill.share_f"] for p in for_asha(points, space, tiny_config(tmp_path, share_f=1.3))]
    assert own[0] == 1.3 and sorted(own) == values and own[1:] != sorted(own[1:])
    foreign = [p["settings"]["distill.share_f"] for p in for_asha(points, space, tiny_config(tmp_path, share_f=1.25))]
    assert sorted(foreign) == values and foreign != values
