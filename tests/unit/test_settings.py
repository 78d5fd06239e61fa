"""The settings: read once, all mistakes named at once."""

from pathlib import Path

import pytest

from bridge import settings
from bridge.errors import UsageError


@pytest.mark.parametrize(("name", "value", "message"), [
    ("GPUS", "eight", "GPUS='eight' is not a number of GPUs"),
    ("GPUS", "0", "GPUS='0'"),
    ("GPUS", "-1", "GPUS='-1'"),
    ("TP", "two", "TP='two'"),
    ("STEP", "last", "STEP='last'"),
    ("PROFILE", "tutoral", "Did you mean tutorial?"),
    ("INIT", "ppo", "INIT='ppo' is unknown. Use one of: base, sft"),
    ("STAGE", "model", "STAGE='model' is unknown"),
    ("RUN", "a/b", "RUN='a/b' is not a run's name"),
    ("RUN", "..", "RUN='..'"),
    ("KEEP", "1", "at least 2"),
    ("PUBLIC", "yes", "PUBLIC='yes' is unknown. Use one of: 0, 1"),
    ("HF_REPO", "name-only", "OWNER/NAME"),
    ("WANDB_ENTITY", "YOU_TEAM", "placeholder"),
    ("HF_REPO", "YOU_HF_TEAM/x", "placeholder"),
])
def test_a_wrong_setting_is_named_with_the_value_and_the_cure(name, value, message):
    with pytest.raises(UsageError) as error:
        settings.read({name: value})
    assert message in str(error.value)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(UsageError) as error:
        settings.read({"GPUS": "eight", "RUN": "a/b", "INIT": "x"})
    assert len(error.value.problems) == 3


def test_an_empty_setting_counts_as_not_given():
    assert settings.read({"GPUS": "", "RUN": " "}) == settings.read({})


def test_the_defaults_are_the_tutorials_but_for_the_faster_profile():
    found = settings.read({})
    assert found.model == "meta-llama/Llama-3.2-1B-Instruct"
    assert found.profile == "tuned" and found.init == "base" and found.keep == 2 and not found.public


def test_the_work_folder_is_absolute_and_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/student")
    assert settings.read({"WORK_DIR": "~/work"}).work_dir == Path("/home/student/work")
    assert settings.read({"WORK_DIR": "some where/ü"}).work_dir == Path.cwd() / "some where/ü"


@pytest.mark.parametrize(("model", "folder"), [
    ("meta-llama/Llama-3.2-1B-Instruct", "/w/models/Llama-3.2-1B-Instruct"),
    ("smollm2", "/w/models/SmolLM2-135M-Instruct"),
    ("tiny", "/w/models/tiny"),
    ("/shared/models/mine", "/shared/models/mine"),
])
def test_each_kind_of_model_has_its_folder(model, folder):
    assert settings.read({"WORK_DIR": "/w", "MODEL": model}).model_dir == Path(folder)
