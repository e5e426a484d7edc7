"""One table an enumeration: what follows from it agrees with it."""

import inspect
import re
from typing import Annotated, Literal, get_args, get_origin

import pytest
from documented import DOCS, blocks, written

from dfssd.config import Config, Distill, Thresholds
from dfssd.config.checks import settings_without_effect
from dfssd.config.choices import (
    BOX_LOSSES,
    DIVERGENCES,
    FORMATS,
    IN_LOOP_POLICIES,
    POLICIES,
    PRECISIONS,
    Choice,
    ThresholdPolicy,
    floors,
    in_words,
    temperatures,
)
from dfssd.config.file import checked
from dfssd.config.flags import parse
from dfssd.config.sections import SECTIONS
from dfssd.data.formats import read
from dfssd.data.formats.read import JSON_FORMATS
from dfssd.distill import divergences
from dfssd.errors import DfssdError
from dfssd.models.precision import DTYPES
from dfssd.models.yolo.box_loss import BOX_LOSSES as BOX_LOSS_FUNCTIONS
from dfssd.pipeline.stages import policies_at_work
from dfssd.pseudo.thresholds import MOVING, THRESHOLDS
from dfssd.runtime.artefact_names import MEAN_TEACHER, STUDENT, TEACHER

TABLES = {  # by flag: the section of its setting, and the table
    "--divergence": ("distill", DIVERGENCES),
    "--threshold-policy": ("thresholds", POLICIES),
    "--mean-teacher-policy": ("mean_teacher", IN_LOOP_POLICIES),
    "--amp": ("train", PRECISIONS),
    "--teacher-amp": ("distill", PRECISIONS),
    "--box-loss": ("train", BOX_LOSSES),
    "--format": ("data", FORMATS),
}


def test_every_row_has_its_function():
    assert set(THRESHOLDS) == set(POLICIES) and set(MOVING) == {name for name, row in POLICIES.items() if row.moves}
    assert all(callable(getattr(divergences, row.function)) for row in DIVERGENCES.values())
    assert set(DTYPES) == set(PRECISIONS) - {"auto"} and set(BOX_LOSS_FUNCTIONS) == set(BOX_LOSSES)
    assert all(callable(one) for pair in JSON_FORMATS.values() for one in pair)
    asked = set(re.findall(r'"([\w-]+)"', " ".join(re.findall(r"_asked\((.*?)\)", inspect.getsource(read)))))
    assert asked | set(JSON_FORMATS) == set(FORMATS) - {"auto"}


def tables_of(annotation, *metadata):
    """Tables of a setting and the type beside each; of a tuple those of what is in it."""
    found = [(annotation, one) for one in metadata if isinstance(one, Choice)]
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return found + tables_of(inner, *more)
    return found + [one for inner in get_args(annotation) for one in tables_of(inner)]


def literals(annotation):
    """Names in a type, wherever in it."""
    return [
        name
        for inner in get_args(annotation)
        for name in ([inner] if get_origin(annotation) is Literal else literals(inner))
    ]


def test_every_enumeration_of_the_settings_is_a_table_that_its_help_is_made_of():
    seen = []
    for section in SECTIONS.values():
        for name, info in section.model_fields.items():
            tables = tables_of(info.annotation, *info.metadata)
            assert bool(tables) or not literals(info.annotation), f"{name} has values and no table"
            for kind, choice in tables:
                assert kind is str or get_args(kind) == choice.names, f"{name}: its type and its table differ"
                said = in_words(choice.table) in info.description or name == "teacher_amp"  # "as --amp"
                assert said, f"the help of {name} does not follow from its table"
                seen.append(name)
    assert len(seen) >= 18


@pytest.mark.parametrize("page", blocks())
def test_the_tables_of_the_documentation_are_those_of_the_code(page):
    text = (DOCS / page).read_text()
    assert written(text, blocks()[page]) == text, f"docs/{page} is behind its table: run python tests/documented.py"


def test_the_command_line_offers_the_rows_and_says_what_they_are(capsys):
    for flag, (section, table) in TABLES.items():
        field = flag[2:].replace("-", "_")
        for name in table:
            config, _ = parse("", [f"{section}.{field}"], [flag, name])
            assert getattr(getattr(config, section), field) == name
        with pytest.raises(SystemExit) as ended:
            parse("", [f"{section}.{field}"], [flag, "all"])
        assert ended.value.code == 2
    with pytest.raises(ValueError, match=f"'kll' is none of {', '.join(DIVERGENCES)}"):
        Distill(divergence="kll")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse("", sorted({section for section, _ in TABLES.values()}), ["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(row.says in said for _, table in TABLES.values() for row in table.values())
    assert f"0: {temperatures()}." in said and f"0: {floors()}." in said


@pytest.mark.parametrize("name", POLICIES)
def test_flags_that_a_policy_does_not_use_are_told(name):
    other = {"tau": 0.31, "tau_min": 0.32, "tau_max": 0.33, "tau_decay": 0.34}
    for field, value in other.items():
        config = Config(thresholds=Thresholds(threshold_policy=name, **{"tau_min": 0.01, field: value}))
        said = " ".join(settings_without_effect(config))
        assert (f"--{field.replace('_', '-')} has no effect" in said) == (field not in POLICIES[name].uses)


def test_a_limit_that_the_mean_teacher_reads_has_an_effect():
    config = Config(thresholds=Thresholds(threshold_policy="fixed", tau=0.4, tau_max=0.8, tau_decay=0.9))
    said = settings_without_effect(config, policies_at_work(config, [TEACHER, MEAN_TEACHER, STUDENT]))
    assert said == ["--tau-decay has no effect with --threshold-policy fixed and --mean-teacher-policy match"]
    said = settings_without_effect(config, policies_at_work(config, [MEAN_TEACHER]))
    assert said == [f"--{flag} has no effect with --mean-teacher-policy match" for flag in ("tau", "tau-decay")]
    said = settings_without_effect(config, policies_at_work(config, [STUDENT]))
    assert said == [f"--{flag} has no effect with --threshold-policy fixed" for flag in ("tau-max", "tau-decay")]


def test_the_help_of_a_threshold_names_the_policies_that_read_it():
    for field in Thresholds.model_fields.keys() - {"threshold_policy"}:
        said = Thresholds.model_fields[field].description
        named = {name for name in POLICIES if re.search(rf"\b{name}\b", said.partition("Read by ")[2] or said)}
        assert named == {name for name, row in POLICIES.items() if field in row.uses}, field


def test_a_policy_that_no_level_moves_is_swept_as_it_is(monkeypatch):
    from dfssd.sweep.space import find_space, load_space

    ours = load_space(find_space("thresholds"))
    assert len(ours.rows) == sum(5 if row.varied else 1 for row in POLICIES.values())
    assert {row.varied for row in POLICIES.values()} - {""} and all(
        r.varied in {"", *r.uses} for r in POLICIES.values()
    )
    monkeypatch.setitem(POLICIES, "top_k", ThresholdPolicy("the best", frozenset({"tau_max"}), ":"))
    more = load_space(find_space("thresholds"))
    assert more.rows == ours.rows | {"top_k": {"thresholds.threshold_policy": "top_k"}} and more.x == ours.x


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_temperature_is_told_where_there_is_none(name):
    said = " ".join(settings_without_effect(Config(distill=Distill(divergence=name, feature_tau=2.0))))
    assert ("--feature-tau has no effect" in said) == (not DIVERGENCES[name].tau)


def test_a_sweep_refuses_a_name_that_is_in_no_table():
    from dfssd.sweep.points import apply

    with pytest.raises(DfssdError, match="'kll' is none of"):
        apply(Config(), {"distill.divergence": "kll"})
    with pytest.raises(DfssdError, match="--tta flip: must be 'none' or 'flips'"):
        checked({"pseudo": {"tta": "flip"}})
    with pytest.raises(DfssdError, match=rf"^--divergence 'kll' is none of {', '.join(DIVERGENCES)}"):
        checked({"distill": {"divergence": "kll"}})
    assert apply(Config(), {"distill.taps": "4,15"}).distill.taps == (4, 15)
