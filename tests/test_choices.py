"""One table an enumeration: what follows from it agrees with it."""

import pytest

from dfssd.config import Config, Distill, Thresholds
from dfssd.config.checks import settings_without_effect
from dfssd.config.choices import DIVERGENCES, POLICIES, floors, temperatures
from dfssd.config.flags import parse
from dfssd.distill import divergences
from dfssd.errors import DfssdError
from dfssd.pseudo.thresholds import THRESHOLDS


def test_every_row_has_its_function():
    assert set(THRESHOLDS) == set(POLICIES)
    assert all(callable(getattr(divergences, row.function)) for row in DIVERGENCES.values())


def test_the_command_line_offers_the_rows_and_says_what_they_are(capsys):
    for name in DIVERGENCES:
        assert parse("", ["distill"], ["--divergence", name])[0].distill.divergence == name
    for name in POLICIES:
        assert parse("", ["thresholds"], ["--threshold-policy", name])[0].thresholds.threshold_policy == name
    for words in (["--divergence", "kll"], ["--threshold-policy", "all"]):
        with pytest.raises(SystemExit) as ended:
            parse("", ["distill", "thresholds"], words)
        assert ended.value.code == 2
    with pytest.raises(ValueError, match=f"'kll' is none of {', '.join(DIVERGENCES)}"):
        Distill(divergence="kll")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse("", ["distill", "thresholds"], ["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(row.says in said for row in (*DIVERGENCES.values(), *POLICIES.values()))
    assert f"0: {temperatures()}." in said and f"0: {floors()}." in said


@pytest.mark.parametrize("name", POLICIES)
def test_flags_that_a_policy_does_not_use_are_told(name):
    other = {"tau": 0.31, "tau_min": 0.32, "tau_max": 0.33, "tau_decay": 0.34}
    for field, value in other.items():
        config = Config(thresholds=Thresholds(threshold_policy=name, **{"tau_min": 0.01, field: value}))
        said = " ".join(settings_without_effect(config))
        assert (f"--{field.replace('_', '-')} has no effect" in said) == (field not in POLICIES[name].uses)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_temperature_is_told_where_there_is_none(name):
    said = " ".join(settings_without_effect(Config(distill=Distill(divergence=name, feature_tau=2.0))))
    assert ("--feature-tau has no effect" in said) == (not DIVERGENCES[name].tau)


def test_a_sweep_refuses_a_name_that_is_in_no_table():
    from dfssd.sweep.points import apply

    with pytest.raises(DfssdError, match="'kll' is none of"):
        apply(Config(), {"distill.divergence": "kll"})
    assert apply(Config(), {"distill.taps": "4,15"}).distill.taps == (4, 15)
