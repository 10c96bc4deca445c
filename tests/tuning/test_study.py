"""Studies: which are continued, and which are refused."""

from pathlib import Path
from typing import Any

import optuna
import pytest

from fake_tune import FOLDER, SPACE, fake_study, work
from gpt_lightning.tuning.space import read_space
from gpt_lightning.tuning.storage import StudyStorage, sqlite_url
from gpt_lightning.tuning.study import StudyConfig, TuneStudy


def open_study(**changes: Any) -> TuneStudy:
    settings = {
        "space": SPACE,
        "settings": {"data": {"text": "sample"}},
        "sampler": "tpe",
        "seed": 1,
    }
    settings |= changes
    space = read_space(settings.pop("space"), lambda name: True)
    config = StudyConfig(space, **settings)
    return TuneStudy.create_or_continue(
        StudyStorage(sqlite_url(FOLDER / "study.db")), FOLDER, config
    )


def test_study_is_continued_with_the_same_space_and_settings() -> None:
    assert open_study().config.to_json() == open_study().config.to_json()
    loaded = TuneStudy.load(StudyStorage(sqlite_url(FOLDER / "study.db")), FOLDER)
    assert loaded.config == open_study().config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"model.lr": {"low": 0.0, "high": 2.0}}},
         "study: study has another space: model.lr.high is 1.0 there and 2.0 here; give that, or"),
        ({"space": {"model.lr": [0.0, 1.0]}}, "another space: model.lr is {"),
        ({"space": {**SPACE, "a": [1]}}, "another space: a is null there and [1] here"),
        ({"settings": {"data": {"text": "b.txt"}}},
         'other settings: data.text is "sample" there and "b.txt" here'),
        ({"settings": {"data": {"text": "sample"}, "model": {"compile": True}}},
         'other settings: model is null there and {"compile": true} here'),
        ({"sampler": "random"}, 'another sampler: is "tpe" there and "random" here'),
        ({"seed": 2}, "another seed: is 1 there and 2 here"),
    ],
)  # fmt: skip
def test_study_of_other_settings_is_refused(changes: dict[str, Any], message: str) -> None:
    open_study()
    before = (FOLDER / "study.db").read_bytes()
    with pytest.raises(ValueError, match="study: study has") as raised:
        open_study(**changes)
    assert message in str(raised.value)
    assert (FOLDER / "study.db").read_bytes() == before


def test_folder_of_a_run_is_refused() -> None:
    FOLDER.mkdir(parents=True)
    (FOLDER / "config.yaml").touch()
    with pytest.raises(ValueError, match="study: checkpoints/study is the folder of a run"):
        open_study()
    assert [path.name for path in FOLDER.iterdir()] == ["config.yaml"]


def test_trials_of_a_lost_database_are_not_resumed(tmp_path: Path) -> None:
    """Their checkpoints have other settings than the trials of a new study."""
    work(fake_study(), 1)
    (FOLDER / "study.db").unlink()
    with pytest.raises(ValueError, match="trial-0000 is there already, from another study"):
        fake_study()
    assert not (FOLDER / "study.db").exists()


def test_study_of_another_program_is_refused_unless_it_is_empty() -> None:
    """A process that has just created the study has not recorded its space yet."""
    FOLDER.mkdir(parents=True)
    database = StudyStorage(sqlite_url(FOLDER / "study.db")).connect()
    other = optuna.create_study(storage=database, study_name="study")
    assert open_study().results() == []
    other = optuna.create_study(storage=database, study_name="other")
    other.ask()
    with pytest.raises(ValueError, match="study: other was made by another program"):
        TuneStudy.load(StudyStorage(sqlite_url(FOLDER / "study.db")), FOLDER.with_name("other"))


def test_importances_need_different_losses() -> None:
    study = fake_study()
    assert study.importances() == {}
    work(study, 3)
    assert study.importances() == {"model.lr": 1.0}
