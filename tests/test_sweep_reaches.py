"""Every key of every shipped space reaches the trial: two of its values give different losses in the first three steps."""

from functools import cache
from pathlib import Path

import pytest
from small import give_teacher_and_candidates, make_job

from dfssd.config import Config, Data
from dfssd.data.preparation.prepare import prepare
from dfssd.runtime.storage import Storage
from dfssd.sweep.points import Trial, apply, draw, make_trial, trials
from dfssd.sweep.space import load_space
from dfssd.train.in_process import train_in_process

SPACES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "tune_spaces").glob("*.py"))}
TINY = {
    **{"train.imgsz": 64, "train.batch": 4, "train.steps": 3, "train.val_every": 3, "train.log_every": 1},
    **{"train.amp": "fp32", "train.loader_workers": 0, "run.gpu": "never", "train.warmup_steps": 0, "train.lr": 0.02},
}


def known_trials(name: str) -> list[Trial]:
    import numpy as np

    space = load_space(str(SPACES[name]))
    if space.search == "grid":
        return trials(space, Config(), "s")
    rng = np.random.default_rng(0)
    return [make_trial(Config(), "s", str(k), 0, draw(space.axes, rng)) for k in range(4)]


def swept_keys() -> list[tuple[str, str]]:
    return [(name, key) for name in SPACES for key in sorted({k for t in known_trials(name) for k in t.settings})]


def two_settings(name: str, key: str) -> list[dict]:
    """A trial's settings as they are, which keys of one space share, and with another value of the key: of the space where
    it has two, else the default."""
    own = [t for t in known_trials(name) if key in t.settings]
    values = list({repr(t.settings[key]): t.settings[key] for t in own}.values())
    if key == "method":
        return [{"method": "label_only"}, {"method": "distill"}]
    if len(values) == 1:
        section, field = key.split(".")
        values.insert(0, getattr(getattr(Config(), section), field))
    settings = dict(own[0].settings)
    if key == "distill.unlabelled_ratio":  # swept where all images have labels; the other value needs one that has none
        del settings["data.label_fraction"]
    other = next(value for value in reversed(values) if value != settings[key])
    return [settings, {**settings, key: other}]


@pytest.fixture(scope="module")
def losses(strip, tmp_path_factory):
    """The losses of the first steps of a trial with these settings, by term and step."""
    storages: dict[float, Path] = {}

    def storage_for(fraction: float) -> Path:
        if fraction not in storages:
            folder = tmp_path_factory.mktemp("reach")
            prepare(Data(data=str(strip), label_fraction=fraction), 0, Storage(str(folder)).at("r", "dataset"))
            give_teacher_and_candidates(folder)
            storages[fraction] = folder
        return storages[fraction]

    @cache
    def run(items: tuple) -> list[dict]:
        settings = dict(items)
        config = apply(Config(data=Data(label_fraction=0.4)), {**TINY, **settings})
        folder = storage_for(config.data.label_fraction)
        method = settings.get("method", "distill")
        stage = "student" if method == "distill" else "label_only"
        run_uri = tmp_path_factory.mktemp("run")
        for name in ("dataset", "teacher", "pseudo"):
            (run_uri / name).symlink_to(folder / "r" / name)
        job = make_job(stage, str(run_uri), config)
        if settings.get("models.teacher"):
            own_teacher(run_uri, config)
        train_in_process(job)
        history = Storage(str(run_uri)).at(stage).read_json("history.json")
        return [{k: v for k, v in row.items() if k.startswith("loss/")} for row in history if "loss/total" in row]

    return lambda settings, anew=False: (run.__wrapped__ if anew else run)(tuple(settings.items()))


def own_teacher(run_uri: Path, config: Config) -> None:
    import torch

    from dfssd.data.manifest import read_manifest
    from dfssd.models.yolo.detector import build_detector, detector_bytes

    (run_uri / "teacher").unlink()
    torch.manual_seed(9)
    names = read_manifest(Storage(str(run_uri)).at("dataset")).names
    Storage(str(run_uri)).write("teacher/best.pt", detector_bytes(build_detector(config.models.teacher, names, 64), {}))


@pytest.mark.parametrize(("name", "key"), swept_keys())
def test_two_values_give_different_losses(losses, name: str, key: str) -> None:
    first, second = two_settings(name, key)
    assert first != second
    one, other = losses(first), losses(second)
    assert len(one) == len(other) == 3
    assert one != other


def test_the_same_values_give_the_same_losses(losses) -> None:
    """Else the test above would say nothing."""
    assert losses({"method": "distill"}, anew=True) == losses({"method": "distill"})
