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
    ("HF_REPO", "me/-x", "HF_REPO='me/-x' is no name on the hub"),
    ("HF_REPO", "me/x.git", "HF_REPO='me/x.git'"),
    ("HF_REPO", "a/b/c", "HF_REPO='a/b/c'"),
    ("STEP", "9" * 5000, "is not a training step"),
    ("KEEP", "9" * 5000, "at least 2"),
    ("RUN", "r" * 101, "at most 100"),
    ("RUN", "a\nb", "control character"),
    ("WANDB_PROJECT", "a\udcffb", "not UTF-8"),
    ("WORK_DIR", "/w/\udcff", "not UTF-8"),
    ("WORK_DIR", "/w/a\nb", "control character"),
    ("WORK_DIR", "/w/a[1]", "WORK_DIR='/w/a[1]' has '[' in it"),
    ("WORK_DIR", "/w/a*/b", "has '*' in it"),
    ("WORK_DIR", "/w/why?", "has '?' in it"),
    ("WORK_DIR", "/w/a::b", "has '::' in it"),
    ("WORK_DIR", "/w/global_step_5/x", "global_step_"),
    ("WORK_DIR", "~nobody-of-this-name/x", "which folder ~nobody-of-this-name is"),
    ("MODEL", "/models/[1]", "MODEL='/models/[1]' has '[' in it"),
    ("MODEL", "~nobody-of-this-name/x", "which folder ~nobody-of-this-name is"),
    ("HF_ENDPOINT", "foo", "HF_ENDPOINT is no address"),
    ("HF_ENDPOINT", "https//mirror", "HF_ENDPOINT is no address"),
    ("WANDB_BASE_URL", "api.wandb.ai", "WANDB_BASE_URL is no address"),
    ("SSL_CERT_FILE", "/no/such.crt", "SSL_CERT_FILE='/no/such.crt': no such file"),
    ("REQUESTS_CA_BUNDLE", "/no/such.crt", "REQUESTS_CA_BUNDLE='/no/such.crt': no such file"),
])
def test_a_wrong_setting_is_named_with_the_value_and_the_cure(name, value, message):
    with pytest.raises(UsageError) as error:
        settings.read({name: value})
    assert message in str(error.value)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(UsageError) as error:
        settings.read({"GPUS": "eight", "RUN": "a/b", "INIT": "x"})
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("name", settings.SECRETS)
@pytest.mark.parametrize("value", [
    "test", "0", "1234567", "two words", "hf_abcdefg\n", "hf_äöüäöüäöü", "hf_abc\x00defg", "\udcff" * 9])
def test_what_cannot_be_a_token_is_refused_without_being_said(name, value):
    with pytest.raises(UsageError) as error:
        settings.read({name: value})
    assert f"{name} is no token" in str(error.value) and value not in str(error.value)
    assert settings.read({name: "hf_Abc123"}) == settings.read({name: ""}) == settings.read({})


@pytest.mark.parametrize(("name", "value"), [
    ("HF_ENDPOINT", "https://hf-mirror.example/"), ("HF_ENDPOINT", "http://127.0.0.1:9"), ("WANDB_BASE_URL", "http://wandb:8080/x"),
    ("SSL_CERT_FILE", __file__), ("REQUESTS_CA_BUNDLE", str(Path(__file__).parent)), ("WORK_DIR", "/w/a]b {c} 作業 (d) ü:1"),
    ("MODEL", "./a(1)"), ("MODEL", "/w/checkpoints/global_step_435/merged"), ("HF_REPO", "me/x-1.0_b")])
def test_unusual_values_that_work_are_taken(name, value):
    settings.read({name: value})


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
