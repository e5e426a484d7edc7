"""Spaces: what is refused and why, what trials they mean, and what trials share."""

from pathlib import Path

import pytest
from ray import tune

from dfssd.config import Config, Data, all_keys
from dfssd.config.checks import settings_without_effect
from dfssd.errors import DfssdError
from dfssd.sweep import shared
from dfssd.sweep.points import apply, in_words, make_trial, trials
from dfssd.sweep.space import Space, find_space, load_space

SPACES = sorted((Path(__file__).parents[1] / "tune_spaces").glob("*.py"))


def space_of(tmp_path: Path, text: str) -> Space:
    (tmp_path / "own.py").write_text(text)
    return load_space(str(tmp_path / "own.py"))


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(DfssdError) as caught:
        space_of(tmp_path, text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('SPACE = {"distill.lamda_p": [1]}', "did you mean 'distill.lambda_p'"),
        ('SPACE = {"lambda_p": [1]}', "did you mean 'distill.lambda_p'"),
        ('ROWS = {"a": {"data.label_fractoin": 1}}', "did you mean 'data.label_fraction'"),
        ('BASE = {"train.step": 1}\nROWS = {"a": {}}', "did you mean 'train.steps'"),
        ('SEED = (1,)\nROWS = {"a": {}}', "did you mean 'SEEDS'"),
        ('SPACE = {"run.seed": [0, 1]}', "SEEDS sets the seeds"),
        ("SPACE = {}", "the space is empty"),
        ('ROWS = {"a": {}}\nSEEDS = ()', "SEEDS is empty"),
        ('ROWS = {"a": {}}\nMODE = "maximum"', "give one of max, min"),
        ('from ray import tune\nSPACE = {"train.lr": tune.uniform(0, 1)}', "cannot be enumerated"),
        ('SPACE = {"train.lr": [1]}\nSEARCH = "random"', "set TRIALS"),
        ('SPACE = {"train.lr": [1]}\nSEARCH = "optuna"\nTRIALS = 3\nSEEDS = (0, 1)', "has one seed"),
        ('ROWS = {"a": {}}\nMETRIC = "val/mpa50"', "did you mean 'val/map50'"),
        ('ROWS = {"a": {}}\nMETRIC = "test/map50"\nSCHEDULER = "asha"', "METRIC is 'test/map50'"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_meant(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


def test_a_missing_file_names_the_ones_there_are() -> None:
    with pytest.raises(DfssdError, match=r"did you mean 'smoke.py'"):
        load_space(str(SPACES[0].with_name("smok.py")))


def test_a_value_that_the_config_does_not_allow_is_named() -> None:
    with pytest.raises(DfssdError, match=r"distill\.lambda_p.*greater than or equal to 0"):
        apply(Config(), {"distill.lambda_p": -1})
    with pytest.raises(DfssdError, match="give one of distill, label_only"):
        apply(Config(), {"method": "labels"})


def test_every_setting_can_be_swept_by_its_key() -> None:
    """Setting each key to its own value changes nothing; to another value, exactly that key."""
    config, tree = Config(), Config().model_dump()
    for key in all_keys():
        section, _, name = key.rpartition(".")
        value = tree[section][name] if section else tree[name]
        assert apply(config, {key: value}) == config
    changed = apply(config, {"distill.lambda_f": 3.5, "train.imgsz": 96})
    assert (changed.distill.lambda_f, changed.train.imgsz) == (3.5, 96)
    assert apply(changed, {"distill.lambda_f": 1.0, "train.imgsz": 640}) == config


@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
def test_the_shipped_spaces_are_whole(path: Path) -> None:
    space = load_space(str(path))
    config = apply(Config(data=Data(data="somewhere")), space.base)
    found = trials(space, config, "s")
    assert space.doc, "says what it is for"
    assert len({t.id for t in found}) == len(found)
    assert len({(t.row, t.seed) for t in found}) == len(found), "no two points are one row of the table"
    if space.search == "grid":
        assert len(found) == len(space.seeds) * len({t.row for t in found})
    else:
        assert space.trials > 0


def test_trials_are_a_function_of_the_space(tmp_path: Path) -> None:
    text = (
        "from ray import tune\n"
        'SPACE = {"train.lr": tune.loguniform(1e-4, 1e-2), "distill.lambda_u": [0.5, 1.0]}\n'
        'SEARCH, TRIALS, SEEDS = "random", 5, (3, 4)'
    )
    first, second = (trials(space_of(tmp_path, text), Config(), "s") for _ in range(2))
    assert [t.id for t in first] == [t.id for t in second]
    assert len(first) == 10
    assert len({t.config.train.lr for t in first}) == 5
    assert [t.config.run.seed for t in first[:2]] == [3, 4]
    assert first[0].config.run.run_name == f"s/trials/{first[0].id}"


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the data's content depends on its name here: there is none."""
    monkeypatch.setattr("dfssd.pipeline.data.content", lambda config: config.data.data)


def homes(*points: dict[str, object], seed: int = 0) -> set[str]:
    made = [make_trial(Config(data=Data(data="d")), "s", "row", seed, dict(p)) for p in points]
    return set(shared.needed(made, "s"))


def test_stages_are_shared_where_nothing_they_depend_on_is_swept() -> None:
    assert len(homes({})) == 3  # dataset, teacher, pseudo
    assert homes({"distill.divergence": "mse"}, {"distill.lambda_p": 0.0}, {"thresholds.tau": 0.3}) == homes({})
    assert homes({"method": "label_only"}) < homes({})
    assert len(homes({}, {"data.label_fraction": 0.2})) == 6, "other labels, another teacher"
    only_pseudo = homes({}, {"pseudo.tta": "none"}) - homes({})
    assert len(only_pseudo) == 1
    assert "pseudo-" in only_pseudo.pop()
    assert not homes({}) & homes({}, seed=1)


def test_a_stage_is_made_after_those_it_reads() -> None:
    made = make_trial(Config(data=Data(data="d")), "s", "row", 0, {})
    assert [str(name) for _, name in shared.needed([made], "s").values()] == ["dataset", "teacher", "pseudo"]


def test_a_space_reads_the_same_in_every_process() -> None:
    """A sweep is recognised by its space when it is resumed; Ray Tune's own words hold an address in memory."""
    made = [tune.loguniform(0.05, 2.0), tune.quniform(0, 1, 0.1), tune.randint(1, 4), tune.choice([1, 2]), [3, 4]]
    assert len({in_words(axis) for axis in made}) == len(made) and not any("0x" in in_words(axis) for axis in made)
    assert in_words(tune.loguniform(0.05, 2.0)) == in_words(made[0]) != in_words(tune.uniform(0.05, 2.0))
    assert in_words(made[0]) != in_words(tune.loguniform(0.05, 3.0)) and in_words(made[1]) != in_words(
        tune.quniform(0, 1, 0.2)
    )


def test_no_row_of_our_spaces_sets_what_has_no_effect() -> None:
    """Trials that differ in nothing would be the same run under names that claim differences."""
    for file in sorted((Path(find_space("thresholds")).parent).glob("*.py")):
        space = load_space(str(file))
        if space.search == "grid" and not file.stem.startswith("_"):
            base = apply(Config(), space.base)
            known = set(settings_without_effect(base))
            for trial in trials(space, base, "s"):
                assert set(settings_without_effect(trial.config)) <= known, (file.stem, trial.row)
