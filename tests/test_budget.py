"""Without `--steps`: the number of steps follows from the data, is said, and is what a stage records."""

from dataclasses import replace

import pytest

from dfssd.config import Config, Data, Distill, Run, Train
from dfssd.config.checks import settings_without_effect
from dfssd.data.synthetic import make_dataset
from dfssd.errors import DfssdError
from dfssd.pipeline.budget import FEWEST, MOST, steps_for, with_expected_steps, with_steps
from dfssd.pipeline.context import Context
from dfssd.pipeline.dry_run import _with_steps as as_planned
from dfssd.pipeline.run import run_stage, run_stages
from dfssd.pipeline.stages import STAGES, is_wanted, make_stage, plan, row_of, settings_of, wanted
from dfssd.pipeline.training import train_job
from dfssd.runtime.artefact_names import DATASET, LABEL_ONLY, PSEUDO, QUALITY, STUDENT, TEACHER, ArtefactName
from dfssd.runtime.storage import Storage
from dfssd.sweep import job as sweep_job
from dfssd.sweep.data import as_labelled, with_equal_steps
from dfssd.sweep.space import find_space, load_space


def _config(storage="runs", steps=0, ratio=1.0, **train):
    return Config(
        run=Run(storage_path=str(storage), run_name="r"),
        train=Train(steps=steps, **train),
        distill=Distill(unlabelled_ratio=ratio),
    )


@pytest.mark.parametrize(
    ("train", "ratio", "images", "steps", "words"),
    [
        (
            {},
            1.0,
            (326, 2937),
            3672,
            "each of 2937 unlabelled images is seen 20 times, each of 326 labelled ones 180 times",
        ),
        ({}, 2.0, (326, 2937), 1836, "2937 unlabelled images is seen 20 times, each of 326 labelled ones 90 times"),
        ({"batch": 8}, 1.0, (326, 2937), 7343, "seen 20 times"),
        ({}, 1.0, (14, 100), FEWEST, "1000 steps, the fewest that are chosen without --steps: each of 100 unlabelled"),
        (
            {},
            1.0,
            (300, 10**6),
            MOST,
            "20000 steps, the most that are chosen without --steps: each of 1000000 unlabelled",
        ),
        ({}, 1.0, (3263, 0), 20000, "the most"),
        ({}, 0.0, (326, 2937), 2038, "each of 326 labelled images is seen 100 times"),
        ({"epochs_unlabelled": 5}, 1.0, (326, 2937), 918, "seen 5 times"),
        ({"epochs_unlabelled": 0.1}, 1.0, (10, 2937), 19, "seen with a chance of 10%"),
    ],
)
def test_steps_from_the_size_of_the_data(train, ratio, images, steps, words):
    got, why = steps_for(_config(ratio=ratio, **train), *images)
    assert got == steps and words in why and f"{steps} steps" in why, why
    batch = round(train.get("batch", 16) * ratio)
    if not train and steps not in (FEWEST, MOST) and batch:
        assert abs(steps * batch / images[1] - 20) < 0.02


def _dataset(run, labelled=326, train=3263, alone=0):
    splits = {"train": {"images": train}, "unlabelled-only": {"images": alone}}
    summary = {"names": ["a"], "labelled_images": labelled, "splits": splits}
    run.write_json("dataset/stage.json", {"digest": "d", "summary": summary, "outputs": {}})


def test_the_number_is_settled_once_and_is_what_counts(tmp_path, capsys):
    config = _config(tmp_path)
    run = Storage(str(tmp_path)).at("r")
    assert with_steps(config, run) is config, "before there is a data set"
    _dataset(run)
    own = with_steps(config, run)
    assert own.train.steps == own.teacher_steps() == own.mean_teacher_steps() == 3672
    assert "3672 steps: each of 2937 unlabelled images" in capsys.readouterr().out
    assert with_steps(own, run) is own and not capsys.readouterr().out, "it is said once"
    by_hand = _config(tmp_path, steps=3672)
    assert with_steps(by_hand, run) is by_hand, "a number that is given wins"
    other_way = with_steps(_config(tmp_path, epochs_unlabelled=20), run)
    for row in STAGES:
        name = ArtefactName(row.role)
        assert settings_of(own, name) == settings_of(by_hand, name) == settings_of(other_way, name)
    _dataset(run, alone=1000)
    assert with_steps(config, run).train.steps == 4922


def test_a_stage_trains_and_records_that_number(tmp_path, monkeypatch, capsys):
    """As a job runs it; typed again, it goes on, and a smaller data set would not."""
    run = Storage(str(tmp_path)).at("r")
    _dataset(run, labelled=20, train=48)
    monkeypatch.setattr(
        "dfssd.pipeline.run._run_held",
        lambda context, stage: {
            "state": stage.begin(False),
            "steps": train_job(context.config, context.run, stage.name).steps,
        },
    )
    states = [run_stage(Context(_config(tmp_path)), LABEL_ONLY) for _ in range(2)]
    assert states == [{"state": "new", "steps": FEWEST}, {"state": "interrupted", "steps": FEWEST}]
    assert run.read_json("label_only/started.json")["config"]["train"]["steps"] == FEWEST
    assert capsys.readouterr().out.count("1000 steps, the fewest") == 2, "once a command"
    with pytest.raises(DfssdError, match=r"train\.steps: 1000 -> 1680"):
        run_stage(Context(_config(tmp_path, steps=1680)), LABEL_ONLY)


def test_a_dry_run_says_about_how_many(capsys):
    tenth = _config().model_copy(update={"data": Data(label_fraction=0.1)})
    config = with_expected_steps(tenth, images=4140, labelled=4140)
    assert config.distill.unlabelled_ratio == 1 and config.train.steps == pytest.approx(3672, rel=0.05)
    assert "about, as the data looks: " in capsys.readouterr().out
    assert with_expected_steps(_config(), images=5000, labelled=400).train.steps == pytest.approx(
        20 * 4600 / 16, rel=0.02
    )


@pytest.mark.parametrize(
    ("labelled", "own", "ratio"), [(80, 0, 0.0), (8, 0, 1.0), (80, 5, 1.0)], ids=["all", "hidden", "others"]
)
def test_where_every_image_is_labelled_the_student_learns_from_labels_and_teacher_alone(tmp_path, labelled, own, ratio):
    run = Storage(str(tmp_path)).at("r")
    splits = {"train": {"images": 80}, "unlabelled-only": {"images": own}}
    run.write_json("dataset/stage.json", {"summary": {"splits": splits, "labelled_images": labelled}})
    config = with_steps(_config(steps=7), run)
    assert config.distill.unlabelled_ratio == ratio and config.train.steps == 7
    left_out = {row.role for row in STAGES if not row.wanted(config)}
    assert left_out == ({"mean_teacher", "pseudo", "quality"} if ratio == 0 else set())
    assert with_expected_steps(_config(), 100, 100).distill.unlabelled_ratio == 0  # as the dry run sees it
    assert with_steps(_config(steps=7, ratio=0.5), run).distill.unlabelled_ratio == ratio * 0.5


@pytest.mark.parametrize("hidden", [{"labels_per_class": 20}, {"labelled_list": "few.txt"}])
def test_hidden_labels_leave_unlabelled_images(hidden, capsys):
    config = _config().model_copy(update={"data": Data(**hidden)})
    assert with_expected_steps(config, images=8000, labelled=8000).train.steps == pytest.approx(
        20 * 6400 * 0.9 / 16, rel=0.02
    )
    assert "unlabelled images" in capsys.readouterr().out


def test_what_has_no_effect_is_said():
    assert any("leave --steps out" in n for n in settings_without_effect(_config(steps=9, epochs_unlabelled=3)))
    assert not [n for n in settings_without_effect(_config(epochs_unlabelled=3)) if "steps" in n]


def test_a_sweep_has_one_number_for_all_trials(tmp_path, capsys):
    """Trials and schedulers compare equal steps; the data's list of images gives the number where nobody does."""
    make_dataset(tmp_path / "data", images=20, side=64)
    config = _config(tmp_path).model_copy(update={"data": Data(data=str(tmp_path / "data"))})
    thresholds, fractions = (load_space(find_space(name)) for name in ("thresholds", "label_fraction"))
    settled = with_equal_steps(config, thresholds)
    planned = sweep_job._planned(settled, load_space(find_space("thresholds")))
    assert {t.config.train.steps for t in planned} == {settled.train.steps} and settled.train.steps >= FEWEST
    assert with_equal_steps(_config(steps=7), thresholds).train.steps == 7
    assert "unlabelled images" not in capsys.readouterr().out
    assert with_equal_steps(config, fractions).distill == config.distill
    assert "of 14 unlabelled images" in capsys.readouterr().out, "its rows hide labels"
    with pytest.raises(DfssdError, match="compare equal steps"):
        sweep_job._planned(
            settled, replace(load_space(find_space("thresholds")), rows={"none": {"train.steps": 0}}, axes={})
        )


def test_a_sweep_of_fully_labelled_data_is_told_at_once(tmp_path, capsys):
    """As the pipeline, it learns from labels and teacher alone; what asks for unlabelled images is refused at once."""
    make_dataset(tmp_path / "data", images=20, side=64)
    config = _config(tmp_path, steps=7).model_copy(update={"data": Data(data=str(tmp_path / "data"))})
    thresholds, divergence, fractions = (
        load_space(find_space(name)) for name in ("thresholds", "divergence", "label_fraction")
    )
    assert as_labelled(config, divergence).distill.unlabelled_ratio == 0
    assert "learn from labels and teacher alone" in capsys.readouterr().out
    with pytest.raises(DfssdError, match=r"nothing to pseudo-label, but the space asks for thresholds\.") as refused:
        as_labelled(config, thresholds)
    assert "row '" in str(refused.value) and "--unlabelled FOLDER" in str(refused.value)
    with pytest.raises(DfssdError, match="thresholds"):  # of a search that draws its points
        as_labelled(config, replace(thresholds, rows={}, axes={"thresholds.tau": [0.3, 0.5]}, search="optuna"))
    idle = {"as advised": {"thresholds.tau": 0.3, "distill.unlabelled_ratio": 0}}
    assert as_labelled(config, replace(thresholds, rows=idle)).distill.unlabelled_ratio == 0
    hidden = config.model_copy(update={"data": Data(data=str(tmp_path / "data"), label_fraction=0.3)})
    assert as_labelled(hidden, thresholds) == hidden and as_labelled(config, fractions) == config
    rows = {"all labels": {"data.label_fraction": 1.0}, "a tenth": {"data.label_fraction": 0.1}}
    with pytest.raises(DfssdError, match="row 'all labels'"):
        as_labelled(config, replace(fractions, rows=rows))
    make_dataset(tmp_path / "more", images=2, side=64)
    other = Data(data=str(tmp_path / "data"), unlabelled=(str(tmp_path / "more" / "images"),))
    assert as_labelled(config.model_copy(update={"data": other}), thresholds).distill.unlabelled_ratio == 1


def test_the_plan_without_unlabelled_images_has_neither_pseudo_labels_nor_later_rounds(tmp_path, capsys):
    """Planned as for any data; what the finished data set shows to be idle is left out, by name."""
    config = _config(tmp_path, steps=7)
    config = config.model_copy(update={"rounds": 2, "baseline": False})
    planned = list(plan(config, wanted(config)))
    without = with_expected_steps(config, 100, 100)
    left = [str(name) for name in planned if is_wanted(without, name)]
    assert left == ["dataset", "teacher", "student", "report", "export"]
    assert [str(n) for n in plan(without, wanted(without))] == left
    make_dataset(tmp_path / "data", images=8, side=64)
    own = config.model_copy(update={"data": Data(data=str(tmp_path / "data"))})
    planned = as_planned(Context(own), [DATASET, TEACHER])  # of a dry run, with --steps and before the data is prepared
    assert planned.distill.unlabelled_ratio == 0 and planned.train.steps == 7
    assert any("--rounds 2 has no effect" in note for note in settings_without_effect(without))
    run = Storage(str(tmp_path)).at("r")
    splits = {"train": {"images": 80}, "unlabelled-only": {"images": 0}}
    run.write_json("dataset/stage.json", {"digest": "d", "summary": {"splits": splits, "labelled_images": 80}})
    run.write_json("teacher/stage.json", {"digest": "d", "summary": {}})
    few = _config(tmp_path, steps=7, ratio=0.03)  # of 16 labelled images: no batch holds an unlabelled one
    assert PSEUDO not in row_of(STUDENT).inputs(few, run, 1) and not is_wanted(few, PSEUDO)
    with pytest.raises(DfssdError, match="nothing to pseudo-label"):
        run_stages(config, [PSEUDO, QUALITY])


def test_candidates_are_made_of_unlabelled_images_that_no_batch_will_hold(tmp_path):
    """`dfssd suggest` needs them, whatever the student learns from."""
    from dfssd.pipeline.labelling import needs

    run = Storage(str(tmp_path)).at("r")
    splits = {"train": {"images": 80}, "unlabelled-only": {"images": 0}}
    run.write_json("dataset/stage.json", {"digest": "d", "summary": {"splits": splits, "labelled_images": 8}})
    config = _config(tmp_path, steps=7, ratio=0)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dry_run": True})})
    assert needs(Context(config), make_stage(config, run, PSEUDO), ()) == []
